"""Entry of a flow run's process: `python -I -m flows.dispatcher.flow_process RUN_ID`, started by the worker.

Of the run's data on Prefect's server only the flow's name and the JSON parameters are used: the name is looked up in
`flows.allowed_flows`, the parameters are validated by its form. The deployment's entry point, pull steps, job variables
and stored results are never read, since everybody who has Prefect's password can write them.
The process is terminated when its worker exits, and reports the run as crashed.
"""

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from uuid import UUID

from prefect._internal.control_listener import configure_from_env
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.engine import handle_engine_signals
from prefect.flow_engine import run_flow
from prefect.logging.loggers import flow_run_logger
from prefect.states import Failed

from flows.allowed_flows import find_flow, parse_form
from infra.confined_child import PR_SET_PDEATHSIG
from infra.settings import get_home_folder
from yuan.data.text import make_storable


class StorableRecord(logging.LogRecord):
    """Hold a log line that Prefect's server can store; for one invalid line it rejects the whole batch."""

    def getMessage(self) -> str:
        return make_storable(super().getMessage())


def main() -> None:
    logging.setLogRecordFactory(StorableRecord)
    for name in ("flows", "feedback", "yuan", "infra"):
        logging.getLogger(name).setLevel(logging.INFO)  # Prefect adds a handler to these and no level
    os.setsid()
    # A separate log file: an exited worker closes its pipes, and a flow that writes to one could not report its end.
    log = os.open(_get_log_file(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() == 1:
        sys.exit("the worker has exited")
    flow_run_id = UUID(sys.argv[1])
    configure_from_env()  # the worker's control channel, which distinguishes a cancelled flow from a crashed one
    with handle_engine_signals(flow_run_id):
        run(flow_run_id)


def run(flow_run_id: UUID) -> None:
    """Run the allowed flow that a flow run names; fail a run with an unknown flow or invalid parameters."""
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(flow_run_id)
        name = client.read_flow(flow_run.flow_id).name
        try:
            form = parse_form(name, flow_run.parameters)
        except ValueError as refusal:
            flow_run_logger(flow_run).error(str(refusal))
            client.set_flow_run_state(flow_run_id, Failed(message=str(refusal)), force=True)
            return
    run_allowed_flow(name, flow_run, form)


def run_allowed_flow(name: str, flow_run: FlowRun, form: object) -> None:
    # return_type="state", since Prefect would unpickle the result of a state that the server sent.
    flow = find_flow(name).load()
    run_flow(flow, flow_run=flow_run, parameters={"form": form}, return_type="state")


def _get_log_file() -> Path:
    return get_home_folder() / "logs" / "flows.log"


if __name__ == "__main__":
    main()

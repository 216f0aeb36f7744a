"""Entry of a flow run's process: `python -m flows.engine`, the command of our deployments.

Prefect's own command would first make a workspace, and a worker killed with -9 would leave its
flow behind as Running. Here the flow dies with its worker and reports itself crashed.
"""

import ctypes
import logging
import os
import runpy
import signal
import sys
from pathlib import Path

from infra.settings import home_folder

PR_SET_PDEATHSIG = 1


def main() -> None:
    for name in ("flows", "feedback", "yuan", "infra"):
        logging.getLogger(name).setLevel(logging.INFO)  # Prefect adds a handler to these and no level
    os.setsid()
    # A log of its own: a worker that dies closes its pipes, and a flow that writes into one could not report.
    log = os.open(_log_file(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() == 1:
        sys.exit("the worker is gone")
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def _log_file() -> Path:
    return home_folder() / "logs" / "flows.log"


if __name__ == "__main__":
    main()

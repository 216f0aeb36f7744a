"""The worker: `python -m flows.dispatcher.worker` starts a process for each flow run of the work pool.

Prefect's own worker takes command, environment and working folder from job variables of pool, deployment and flow run,
so that Prefect's password allows arbitrary commands. This worker fixes all three in code and passes only the run's id.
"""

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import anyio.abc
from prefect.client.schemas.objects import FlowRun, State
from prefect.runner._control_channel import ControlChannel
from prefect.runner._flow_run_executor import FlowRunExecutorContext
from prefect.runner._process_manager import ProcessHandle
from prefect.utilities.processutils import run_process
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from flows.allowed_flows import WORK_POOL_NAME
from flows.duties import WORKER_HEARTBEAT_FILE
from flows.prefect_gate.deployment_rules import WORK_POOL_TEMPLATE
from flows.supervisor.pool_launcher import CLUSTER_CONFIG_VARIABLES
from infra.confinement import SAFE_VARIABLE_PREFIXES, SAFE_VARIABLES
from infra.keeper import STACK_ID_VARIABLE
from infra.settings import HOME_VARIABLE, get_home_folder
from infra.telemetry import NO_TELEMETRY_VARIABLES

WORKER_NAME = "embedded"
WORKER_HEARTBEAT_EVERY_S = 5.0
# Concurrent runs: a round, a reproduction and four more. Each is a process; 200 at once would overload the machine.
MAX_FLOW_RUNS = 6
FLOW_PROCESS_COMMAND = (sys.executable, "-I", "-m", "flows.dispatcher.flow_process")
# The only variables that a flow's process inherits. `-I` ignores PYTHON variables and modules in the working folder.
INHERITED_VARIABLES = (
    *(
        "PATH",
        "HOME",
        "TMPDIR",
        *SAFE_VARIABLES,
        *CLUSTER_CONFIG_VARIABLES,
        HOME_VARIABLE,
        STACK_ID_VARIABLE,
        *NO_TELEMETRY_VARIABLES,
    ),
    *("PREFECT_HOME", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_CLIENT_RETRY_EXTRA_CODES"),
    *("PREFECT_CLIENT_MAX_RETRIES", "PREFECT_LOGGING_EXTRA_LOGGERS", "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"),
)


class FixedJob(BaseJobConfiguration):
    """Configure every flow run's job in the same way; the server's template and variables are not read."""

    @classmethod
    async def resolve_for_flow_run(cls, flow_run: FlowRun, **sources: Any) -> "FixedJob":
        job = cls(name=flow_run.name)
        job._related_objects = {"flow-run": flow_run}
        return job


class NoHooks:
    """Run no hooks: our flows have none, and Prefect would load the deployment's code for them."""

    async def run_cancellation_hooks(self, flow_run: FlowRun, state: State[Any]) -> None:
        pass

    async def run_crashed_hooks(self, flow_run: FlowRun, state: State[Any]) -> None:
        pass


class FlowProcessStarter:
    """Start `flows.dispatcher.flow_process` for a flow run."""

    def __init__(self, control: ControlChannel) -> None:
        self._control = control

    async def start(
        self, flow_run: FlowRun, task_status: anyio.abc.TaskStatus[ProcessHandle] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Start the process, report its handle, and wait until it has exited."""
        port, token = self._control.register(flow_run.id)
        env = {**build_flow_environment(), "PREFECT__CONTROL_PORT": str(port), "PREFECT__CONTROL_TOKEN": token}
        folder = make_working_folder()
        await run_process(
            [*FLOW_PROCESS_COMMAND, str(flow_run.id)],
            stream_output=True,
            task_status=task_status,
            task_status_handler=ProcessHandle,
            env={**env, "PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS": "false"},
            cwd=folder,
        )


class Worker(BaseWorker[FixedJob, BaseVariables, BaseWorkerResult]):
    """Run each flow run of the pool as a process with a fixed command."""

    type = "process"
    job_configuration = FixedJob

    @staticmethod
    def __dispatch_key__() -> str:
        return "cotrain"  # a key of our own, so that Prefect's process worker stays registered

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        return WORK_POOL_TEMPLATE

    async def run(
        self,
        flow_run: FlowRun,
        configuration: FixedJob,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> BaseWorkerResult:
        """Run one flow run to completion; a process that exits without a report is reported as crashed."""
        async with FlowRunExecutorContext() as context:
            executor = context.create_executor(
                flow_run, FlowProcessStarter(context.control_channel), hook_runner=NoHooks(), propose_submitting=False
            )
            async with anyio.create_task_group() as group:
                results: list[int | None] = []

                async def execute(*, task_status: anyio.abc.TaskStatus[ProcessHandle]) -> None:
                    result = await executor.submit(task_status=task_status)
                    results.append(result.status_code if result is not None else None)

                handle: ProcessHandle = await group.start(execute)
                if task_status is not None and handle.pid is not None:
                    task_status.started(handle.pid)
        if not results or results[0] is None:
            raise RuntimeError(f"the process of flow run {flow_run.id} could not be started; see logs/worker.log")
        return BaseWorkerResult(status_code=results[0], identifier=str(handle.pid))


def build_flow_environment() -> dict[str, str]:
    """Build the environment of a flow's process."""
    return {
        name: text
        for name, text in os.environ.items()
        if name in INHERITED_VARIABLES or name.startswith(SAFE_VARIABLE_PREFIXES)
    }


def make_working_folder() -> Path:
    folder = get_home_folder() / "work"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


async def run_worker() -> None:
    """Run the worker without end, and write heartbeats while the event loop is responsive."""
    heartbeats = asyncio.create_task(write_heartbeats(get_home_folder() / WORKER_HEARTBEAT_FILE))
    try:
        await Worker(WORK_POOL_NAME, name=WORKER_NAME, create_pool_if_not_found=True, limit=MAX_FLOW_RUNS).start()
    finally:
        heartbeats.cancel()


async def write_heartbeats(file: Path) -> None:
    while True:
        with contextlib.suppress(OSError):  # a full disk stops no flow run
            file.touch()
        await asyncio.sleep(WORKER_HEARTBEAT_EVERY_S)


def main() -> None:
    asyncio.run(run_worker())


if __name__ == "__main__":
    main()

"""Define the interface of every launcher: a job of equal processes on some nodes, and its exit."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

# What a rank needs of its supervisor's environment. Nothing else is passed: batch systems store it on their own disks.
RANK_VARIABLES = ("COTRAIN_HOME", "OMP_NUM_THREADS", "PYTHONPATH", "LD_LIBRARY_PATH")
RANK_VARIABLE_PREFIXES = ("NCCL_", "GLOO_", "TORCH_")

HOST_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
JobExitCause = Literal["preempted", "node lost", "out of memory", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Describe a job: processes that run a module on a folder, started by torchrun on each node.

    Attributes:
        name: unique among all jobs, and a DNS label.
        module: the Python module that each process runs, with the folder as its argument.
        folder: shared by all nodes.
        environment: variables of the processes.
        log_name: name of the file in the folder to which output goes.
        excluded_hosts: hosts on which no process is started.
        input_folders: folders outside of `folder` that the processes read, shared by all nodes.
        devices_per_process: what a batch system that counts devices gives to each process.
        is_distributed: False for one process that needs no process group, which this machine starts without torchrun.
    """

    name: str
    module: str
    folder: Path
    num_processes: int
    processes_per_node: int
    environment: Mapping[str, str]
    log_name: str
    excluded_hosts: tuple[str, ...] = ()
    input_folders: tuple[Path, ...] = ()
    devices_per_process: int = 1
    is_distributed: bool = True

    def __post_init__(self) -> None:
        if self.num_processes % self.num_nodes:
            raise ValueError(
                f"processes must fill their nodes evenly, got {self.num_processes} processes on nodes of "
                f"{self.processes_per_node}; put the same number on every node"
            )
        if not self.is_distributed and self.num_processes != 1:
            raise ValueError(
                f"a job of {self.num_processes} processes needs a process group; leave is_distributed true"
            )
        if invalid_hosts := [host for host in self.excluded_hosts if not HOST_NAME_PATTERN.fullmatch(host)]:
            raise ValueError(f"excluded_hosts must hold valid host names, got {invalid_hosts}; correct or remove them")

    @property
    def num_nodes(self) -> int:
        return -(-self.num_processes // self.processes_per_node)

    @property
    def parent_heartbeat_file(self) -> Path:
        """Return the file with the supervisor's heartbeat for other machines; see `infra.parent_heartbeat`."""
        return self.folder / f".alive-{self.name}"


@dataclass(frozen=True, kw_only=True)
class JobExit:
    """Hold how a job ended.

    Attributes:
        status: an exit status; 0 for success.
        cause: None if the launcher cannot determine it.
        message: what the launcher reports about the exit.
    """

    status: int
    cause: JobExitCause | None = None
    message: str = ""


class RunningJob(Protocol):
    """Represent a job that was started."""

    def wait(self, seconds: float) -> JobExit | None:
        """Wait at most so many seconds for the job to end; None if it still runs."""


class Launcher(Protocol):
    """Start jobs; all processes of a job have exited when the block of `run` ends."""

    def run(self, job: Job) -> AbstractContextManager[RunningJob]: ...

    def end(self, name: str, within_s: float) -> bool:
        """End all processes of the job of this name.

        Returns:
            True if none remains within `within_s` seconds.
        """


class LauncherUnreachable(RuntimeError):
    """Report that the batch system does not respond; the same call may succeed later."""


def make_job_name(lease_id: str) -> str:
    """Return the name of the one job that runs under a lease; the reaper ends the job by it when its holder exits."""
    return f"cotrain-{lease_id}"


def select_rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Select the environment variables that are passed to processes on other machines."""
    return {
        name: text
        for name, text in environment.items()
        if name in RANK_VARIABLES or name.startswith(RANK_VARIABLE_PREFIXES)
    }

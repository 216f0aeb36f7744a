"""What every launcher takes and gives: a job of equal processes on some nodes, and how it ended."""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

# What a rank needs of its supervisor's environment. Nothing else travels: batch systems keep it on their own disks.
RANK_VARIABLES = ("COTRAIN_HOME", "OMP_NUM_THREADS", "PYTHONPATH", "LD_LIBRARY_PATH")
RANK_VARIABLE_PREFIXES = ("NCCL_", "GLOO_", "TORCH_")

HOST_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
JobEndingCause = Literal["preempted", "node lost", "out of memory", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Processes that run `module` on a folder which all nodes see, started by torchrun on each node.

    `name` is unlike that of every other job, and a DNS label. Output goes to `log_name` in the folder. Nothing is
    started on the machines of `avoid`.
    """

    name: str
    module: str
    folder: Path
    num_processes: int
    processes_per_node: int
    environment: Mapping[str, str]
    log_name: str = "train.log"
    avoid: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_processes % self.num_nodes:
            raise ValueError(
                f"{self.num_processes} processes do not fill nodes of {self.processes_per_node} evenly; put as many on "
                "every node"
            )
        if wrong := [host for host in self.avoid if not HOST_NAME_PATTERN.fullmatch(host)]:
            raise ValueError(f"machines to avoid are named as hosts are, got {wrong}")

    @property
    def num_nodes(self) -> int:
        return -(-self.num_processes // self.processes_per_node)

    @property
    def parent_heartbeat_file(self) -> Path:
        """What processes on other machines take for their supervisor's sign of life; see `infra.liveness`."""
        return self.folder / f".alive-{self.name}"


@dataclass(frozen=True, kw_only=True)
class JobEnding:
    """How a job ended, as far as its launcher can tell: a status that is 0 if all is well, and a cause it knows."""

    status: int
    cause: JobEndingCause | None = None
    message: str = ""


class RunningJob(Protocol):
    """A job that was started."""

    def wait(self, seconds: float) -> JobEnding | None:
        """Wait for its end, at most so long; None if it runs still."""


class Launcher(Protocol):
    """Starts jobs; none of a job's processes outlives the block that `run` opens."""

    def run(self, job: Job) -> AbstractContextManager[RunningJob]: ...

    def end(self, name: str, within_s: float) -> bool:
        """End what there is of the job of this name; whether nothing is left of it in that time."""


class LauncherUnreachable(RuntimeError):
    """The batch system does not answer; the same may work later."""


def poll_ending(ask: Callable[[], JobEnding | None], seconds: float, pause_s: float) -> JobEnding | None:
    """Ask until there is an ending, or the time is over; at least once."""
    end = time.monotonic() + seconds
    while True:
        ending = ask()
        if ending is not None or time.monotonic() >= end:
            return ending
        time.sleep(min(pause_s, seconds))


def select_rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Of an environment, what may travel to other machines."""
    return {
        name: text
        for name, text in environment.items()
        if name in RANK_VARIABLES or name.startswith(RANK_VARIABLE_PREFIXES)
    }

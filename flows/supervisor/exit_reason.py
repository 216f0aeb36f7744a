"""Classify the exit of a run's processes, from the ranks' exit notes, their heartbeats and the launcher's status."""

import time
from dataclasses import dataclass
from enum import Enum, StrEnum

from infra.error_text import SafeMessageError
from infra.launchers.job import HOST_NAME_PATTERN, JobExit, JobExitCause
from yuan.data.text import make_printable
from yuan.safe_files import NotRegularFileError, read_file_end
from yuan.train.exit_status import ExitNote, ExitStatus, read_exit_notes
from yuan.train.heartbeat import read_heartbeats
from yuan.train.run_folder import TRAIN_LOG_FILE, RunFolder


class ExitReason(StrEnum):
    """Reasons for the end of a run's processes; the values are stored in events and shown to users."""

    FINISHED = "finished"
    OUT_OF_MEMORY = "out of memory"
    BAD_DATA = "bad data"
    NUMERICAL = "numerical"
    LOST_DEVICE = "lost device"
    HUNG = "hung"
    DISK_FULL = "disk full"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class TrainingFailed(SafeMessageError, RuntimeError):
    """The run cannot continue; the message is the reason, as shown to users."""


class ExitPolicy(Enum):
    """Reactions of the supervisor to an exit; the values describe them."""

    COMPLETE = "the weights are exported; nothing remains to do"
    RESTART = "start the processes again, a limited number of times without a new checkpoint"
    REPLACE_DEVICE = "take the device of the failed rank out of use, and start the processes as for RESTART"
    REPLAN = "plan for less memory, a limited number of times, and start the processes"
    WAIT = "queue for devices again, and start the processes when they are granted"
    STOP = "fail the run, since a restart would not help"


# A new fault is one row here, and one in each table below that detects it.
POLICY_BY_REASON: dict[ExitReason, ExitPolicy] = {
    ExitReason.FINISHED: ExitPolicy.COMPLETE,
    ExitReason.OUT_OF_MEMORY: ExitPolicy.REPLAN,
    ExitReason.BAD_DATA: ExitPolicy.STOP,
    ExitReason.NUMERICAL: ExitPolicy.STOP,
    # Every start checks that the plan fits the remaining devices, and plans again if it does not.
    ExitReason.LOST_DEVICE: ExitPolicy.REPLACE_DEVICE,
    ExitReason.HUNG: ExitPolicy.RESTART,
    ExitReason.DISK_FULL: ExitPolicy.RESTART,
    ExitReason.PREEMPTED: ExitPolicy.WAIT,
    ExitReason.CANCELLED: ExitPolicy.STOP,
    ExitReason.UNKNOWN: ExitPolicy.RESTART,
}
# Launchers name causes in words of their own: infra knows jobs and nodes, and imports no package of the domain.
REASON_BY_CAUSE: dict[JobExitCause, ExitReason] = {
    "preempted": ExitReason.PREEMPTED,
    "node lost": ExitReason.LOST_DEVICE,
    "out of memory": ExitReason.OUT_OF_MEMORY,
    "cancelled": ExitReason.CANCELLED,
}
# A rank can only exit with a number, and yuan, which defines them, cannot import flows. Ordered by priority, the root
# cause first: a lost device makes the other ranks hang or lose their peer. None: an effect of another exit, no cause.
REASON_BY_STATUS: dict[ExitStatus, ExitReason | None] = {
    ExitStatus.DEVICE_LOST: ExitReason.LOST_DEVICE,
    ExitStatus.OUT_OF_MEMORY: ExitReason.OUT_OF_MEMORY,
    ExitStatus.DISK_FULL: ExitReason.DISK_FULL,
    ExitStatus.NUMERICAL: ExitReason.NUMERICAL,
    ExitStatus.BAD_DATA: ExitReason.BAD_DATA,
    ExitStatus.HUNG: ExitReason.HUNG,
    ExitStatus.UNKNOWN: ExitReason.UNKNOWN,
    ExitStatus.PEER_LOST: None,
    ExitStatus.PARENT_GONE: None,
    ExitStatus.FINISHED: None,
}
RANK_HEARTBEAT_TIMEOUT_S = 4.0  # a rank writes a heartbeat every second
RANK_EXIT_GRACE_S = 3.0  # time for ranks to exit by themselves
LOG_TAIL_CHARACTERS = 800
LOG_TAIL_BYTES = 4 * LOG_TAIL_CHARACTERS
MAX_EXIT_MESSAGE_CHARACTERS = 3000


@dataclass(frozen=True, kw_only=True)
class RunExit:
    """The end of a run's processes.

    Attributes:
        message: explains the reason. It may quote output of ranks; its lines are made printable here, since it goes
            to logs and web pages.
        rank: the rank that failed first, if known.
        host: that rank's machine, if known.
    """

    reason: ExitReason
    message: str
    rank: int | None = None
    host: str | None = None

    def __post_init__(self) -> None:
        lines = self.message[:MAX_EXIT_MESSAGE_CHARACTERS].split("\n")
        printable_message = "\n".join(make_printable(line, MAX_EXIT_MESSAGE_CHARACTERS) for line in lines)
        object.__setattr__(self, "message", printable_message)

    @property
    def policy(self) -> ExitPolicy:
        return POLICY_BY_REASON[self.reason]


def classify_exit(folder: RunFolder, job_exit: JobExit, started_at: float) -> RunExit:
    """Classify the exit of a job that was started at `started_at`, in seconds since the epoch."""
    if folder.is_finished:
        return RunExit(reason=ExitReason.FINISHED, message="the weights are exported")
    # The launcher knows best, except for a kill by the OOM killer, which may have hit other processes of the host.
    is_oom_kill = job_exit.cause == "out of memory"
    launcher_message = job_exit.message or f"the launcher reports: {job_exit.cause}"
    if job_exit.cause is not None and not is_oom_kill:
        return RunExit(reason=REASON_BY_CAUSE[job_exit.cause], message=launcher_message)

    # A rank's own status, by priority; a hang counts less than the OOM kill that may have caused it.
    notes = read_exit_notes(folder.path, started_at)
    for status, reason in REASON_BY_STATUS.items():
        if status == ExitStatus.HUNG and is_oom_kill:
            return RunExit(reason=ExitReason.OUT_OF_MEMORY, message=launcher_message)
        note = next((note for note in notes if note.status == status), None)
        if note is not None and reason is not None:
            return _classify_note(folder, reason, note, started_at)

    # No rank left a note: the one whose heartbeat stopped first was killed.
    silent_ranks = _find_silent_ranks(folder, started_at, time.time())
    prefix = f"rank {silent_ranks[0]} was killed or its machine is lost; " if len(silent_ranks) == 1 else ""
    message = f"{prefix}status {job_exit.status}; {read_log_tail(folder)}"
    return RunExit(reason=ExitReason.UNKNOWN, message=message, rank=_get_single_rank(silent_ranks))


def has_hung_rank(folder: RunFolder, started_at: float) -> bool:
    """Return True if a rank exited for lack of progress more than RANK_EXIT_GRACE_S ago; the others then hang too."""
    return any(
        note.status == ExitStatus.HUNG and time.time() - note.time > RANK_EXIT_GRACE_S
        for note in read_exit_notes(folder.path, started_at)
    )


def read_log_tail(folder: RunFolder) -> str:
    """Return the last lines of the processes' output."""
    try:
        tail = read_file_end(folder.path, TRAIN_LOG_FILE, LOG_TAIL_BYTES)
    except FileNotFoundError:
        return "no log"
    except NotRegularFileError as error:
        return f"the log {error.strerror}"
    return tail.decode(errors="replace")[-LOG_TAIL_CHARACTERS:]


def _classify_note(folder: RunFolder, reason: ExitReason, note: ExitNote, started_at: float) -> RunExit:
    message = f"rank {note.rank}: {note.message}"
    if reason != ExitReason.HUNG:
        host = note.host if HOST_NAME_PATTERN.fullmatch(note.host) else None  # it is written into a batch script
        return RunExit(reason=reason, message=message, rank=note.rank, host=host)

    # The rank that reports a hang waited for another one, whose heartbeat may have stopped.
    silent_ranks = _find_silent_ranks(folder, started_at, note.time)
    liveness = "all ranks were alive"
    if silent_ranks:
        liveness = f"without heartbeat: rank {', '.join(map(str, silent_ranks))}"
    return RunExit(reason=reason, message=f"{message}; {liveness}", rank=_get_single_rank(silent_ranks))


def _find_silent_ranks(folder: RunFolder, started_at: float, at: float) -> list[int]:
    """Return the ranks without a heartbeat for RANK_HEARTBEAT_TIMEOUT_S at a time, which were stopped or had exited.

    Args:
        started_at: start of the job, in seconds since the epoch; heartbeats of earlier jobs are ignored.
        at: the time, in seconds since the epoch; the newest heartbeat's, if that is earlier.
    """
    heartbeats = read_heartbeats(folder.path)
    heartbeat_times = {rank: heartbeat.time for rank, heartbeat in heartbeats.items() if heartbeat.time >= started_at}
    newest_time = max(heartbeat_times.values(), default=at)
    reference_time = min(newest_time, at)
    return [
        rank
        for rank, heartbeat_time in heartbeat_times.items()
        if reference_time - heartbeat_time > RANK_HEARTBEAT_TIMEOUT_S
    ]


def _get_single_rank(ranks: list[int]) -> int | None:
    return ranks[0] if len(ranks) == 1 else None

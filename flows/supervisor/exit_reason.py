"""Why a run's processes ended: one class and the reason, out of what ranks, heartbeats and launcher say."""

import time
from dataclasses import dataclass, replace
from typing import Literal

from infra.launchers.job import HOST_NAME_PATTERN, JobEnding, JobEndingCause
from yuan.data.text import make_printable
from yuan.train.exit_status import ExitNote, ExitStatus, read_exit_notes
from yuan.train.heartbeat import read_heartbeats
from yuan.train.run_files import NotRegularFileError, read_file_end
from yuan.train.run_folder import RunFolder

ExitKind = Literal[
    "finished",
    "out of memory",
    "bad data",
    "numerical",
    "lost device",
    "hung",
    "disk full",
    "preempted",
    "cancelled",
    "unknown",
]

EXIT_KIND_BY_CAUSE: dict[JobEndingCause, ExitKind] = {
    "preempted": "preempted",
    "node lost": "lost device",
    "out of memory": "out of memory",
    "cancelled": "cancelled",
}
# What a rank says of itself, the plainest first: a lost device makes its peers hang or lose their peer.
EXIT_KIND_BY_RANK_STATUS: dict[ExitStatus, ExitKind] = {
    ExitStatus.DEVICE_LOST: "lost device",
    ExitStatus.OUT_OF_MEMORY: "out of memory",
    ExitStatus.DISK_FULL: "disk full",
    ExitStatus.NUMERICAL: "numerical",
    ExitStatus.BAD_DATA: "bad data",
    ExitStatus.HUNG: "hung",
}
RANK_HEARTBEAT_TIMEOUT_S = 4.0  # a rank's heartbeat comes every second
RANK_EXIT_GRACE_S = 3.0  # for ranks that can, to leave by themselves
LOG_TAIL_CHARACTERS = 800
LOG_TAIL_BYTES = 4 * LOG_TAIL_CHARACTERS
MAX_REASON_CHARACTERS = 3000


@dataclass(frozen=True, kw_only=True)
class RunEnding:
    """The class of an ending, why, and the rank it began with and its machine if they are known.

    The reason may quote ranks; its lines are made printable here, since it goes to logs and pages.
    """

    kind: ExitKind
    reason: str
    rank: int | None = None
    host: str | None = None

    def __post_init__(self) -> None:
        lines = self.reason[:MAX_REASON_CHARACTERS].split("\n")
        object.__setattr__(self, "reason", "\n".join(make_printable(line, MAX_REASON_CHARACTERS) for line in lines))


def classify(folder: RunFolder, ending: JobEnding, since: float) -> RunEnding:
    """Name the ending of a job that was started at `since`, in seconds since the epoch."""
    if folder.is_exported:
        return RunEnding(kind="finished", reason="the weights are exported")
    told = RunEnding(kind="unknown", reason=ending.message or f"the launcher says: {ending.cause}")
    if ending.cause is not None and ending.cause != "out of memory":
        return replace(told, kind=EXIT_KIND_BY_CAUSE[ending.cause])
    notes = read_exit_notes(folder.path, since)
    for status, kind in EXIT_KIND_BY_RANK_STATUS.items():
        if (
            status == ExitStatus.HUNG and ending.cause == "out of memory"
        ):  # others on the machine may have been killed, too
            return replace(told, kind="out of memory")
        note = next((note for note in notes if note.status == status), None)
        if note is not None:
            return _classify_note(folder, kind, note, since)
    errors = [note for note in notes if note.status == ExitStatus.UNKNOWN]
    if errors:
        return RunEnding(kind="unknown", reason=f"rank {errors[0].rank}: {errors[0].message}", rank=errors[0].rank)
    silent = _find_silent_ranks(folder, since, time.time())
    who = f"rank {silent[0]} was killed or its machine is gone; " if len(silent) == 1 else ""
    return RunEnding(
        kind="unknown", reason=f"{who}status {ending.status}; {read_log_tail(folder)}", rank=_get_single_rank(silent)
    )


def has_hung_rank(folder: RunFolder, since: float) -> bool:
    """Whether a rank left a while ago because there was no progress, so that the others hang and will not leave."""
    return any(
        note.status == ExitStatus.HUNG and time.time() - note.time > RANK_EXIT_GRACE_S
        for note in read_exit_notes(folder.path, since)
    )


def read_log_tail(folder: RunFolder) -> str:
    """The last lines of what the processes printed."""
    try:
        return read_file_end(folder.path, "train.log", LOG_TAIL_BYTES).decode(errors="replace")[-LOG_TAIL_CHARACTERS:]
    except FileNotFoundError:
        return "no log"
    except NotRegularFileError as error:
        return f"the log {error.strerror}"


def _classify_note(folder: RunFolder, kind: ExitKind, note: ExitNote, since: float) -> RunEnding:
    if kind != "hung":
        host = note.host if HOST_NAME_PATTERN.fullmatch(note.host) else None  # it will be in a batch script
        return RunEnding(kind=kind, reason=f"rank {note.rank}: {note.message}", rank=note.rank, host=host)
    silent = _find_silent_ranks(folder, since, note.time)
    who = f"; silent: rank {', '.join(map(str, silent))}" if silent else "; every rank gave signs of life"
    return RunEnding(kind=kind, reason=f"rank {note.rank}: {note.message}{who}", rank=_get_single_rank(silent))


def _find_silent_ranks(folder: RunFolder, since: float, at: float) -> list[int]:
    """Ranks that had given no sign of life for a while, and so were stopped or dead."""
    beats = {rank: beat["time"] for rank, beat in read_heartbeats(folder.path).items() if beat["time"] >= since}
    newest = max(beats.values(), default=at)
    return [rank for rank, last in beats.items() if min(newest, at) - last > RANK_HEARTBEAT_TIMEOUT_S]


def _get_single_rank(ranks: list[int]) -> int | None:
    return ranks[0] if len(ranks) == 1 else None

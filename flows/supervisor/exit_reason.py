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

Kind = Literal[
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

LAUNCHERS: dict[JobEndingCause, Kind] = {
    "preempted": "preempted",
    "node lost": "lost device",
    "out of memory": "out of memory",
    "cancelled": "cancelled",
}
# What a rank says of itself, the plainest first: a lost device makes its peers hang or lose their peer.
RANKS: dict[ExitStatus, Kind] = {
    ExitStatus.DEVICE_LOST: "lost device",
    ExitStatus.OUT_OF_MEMORY: "out of memory",
    ExitStatus.DISK_FULL: "disk full",
    ExitStatus.NUMERICAL: "numerical",
    ExitStatus.BAD_DATA: "bad data",
    ExitStatus.HUNG: "hung",
}
SILENT_S = 4.0  # a rank's heartbeat comes every second
LEAVING_S = 3.0  # for ranks that can, to leave by themselves
LOG_CHARACTERS = 800
LOG_BYTES = 4 * LOG_CHARACTERS
REASON_CHARACTERS = 3000


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The class of an ending, why, and the rank it began with and its machine if they are known.

    The reason may quote ranks; its lines are made printable here, since it goes to logs and pages.
    """

    kind: Kind
    reason: str
    rank: int | None = None
    host: str | None = None

    def __post_init__(self) -> None:
        lines = self.reason[:REASON_CHARACTERS].split("\n")
        object.__setattr__(self, "reason", "\n".join(make_printable(line, REASON_CHARACTERS) for line in lines))


def classify(folder: RunFolder, ending: JobEnding, since: float) -> Ended:
    """Name the ending of a job that was started at `since`, in seconds since the epoch."""
    if folder.is_exported:
        return Ended(kind="finished", reason="the weights are exported")
    told = Ended(kind="unknown", reason=ending.said or f"the launcher says: {ending.cause}")
    if ending.cause is not None and ending.cause != "out of memory":
        return replace(told, kind=LAUNCHERS[ending.cause])
    notes = read_exit_notes(folder.path, since)
    for status, kind in RANKS.items():
        if (
            status == ExitStatus.HUNG and ending.cause == "out of memory"
        ):  # others on the machine may have been killed, too
            return replace(told, kind="out of memory")
        note = next((note for note in notes if note.status == status), None)
        if note is not None:
            return _told(folder, kind, note, since)
    errors = [note for note in notes if note.status == ExitStatus.UNKNOWN]
    if errors:
        return Ended(kind="unknown", reason=f"rank {errors[0].rank}: {errors[0].message}", rank=errors[0].rank)
    silent = _silent(folder, since, time.time())
    who = f"rank {silent[0]} was killed or its machine is gone; " if len(silent) == 1 else ""
    return Ended(kind="unknown", reason=f"{who}status {ending.status}; {log_end(folder)}", rank=_only(silent))


def has_given_up(folder: RunFolder, since: float) -> bool:
    """Whether a rank left a while ago because there was no progress, so that the others hang and will not leave."""
    return any(
        note.status == ExitStatus.HUNG and time.time() - note.time > LEAVING_S
        for note in read_exit_notes(folder.path, since)
    )


def log_end(folder: RunFolder) -> str:
    """The last lines of what the processes printed."""
    try:
        return read_file_end(folder.path, "train.log", LOG_BYTES).decode(errors="replace")[-LOG_CHARACTERS:]
    except FileNotFoundError:
        return "no log"
    except NotRegularFileError as error:
        return f"the log {error.strerror}"


def _told(folder: RunFolder, kind: Kind, note: ExitNote, since: float) -> Ended:
    if kind != "hung":
        host = note.host if HOST_NAME_PATTERN.fullmatch(note.host) else None  # it will be in a batch script
        return Ended(kind=kind, reason=f"rank {note.rank}: {note.message}", rank=note.rank, host=host)
    silent = _silent(folder, since, note.time)
    who = f"; silent: rank {', '.join(map(str, silent))}" if silent else "; every rank gave signs of life"
    return Ended(kind=kind, reason=f"rank {note.rank}: {note.message}{who}", rank=_only(silent))


def _silent(folder: RunFolder, since: float, at: float) -> list[int]:
    """Ranks that had given no sign of life for a while, and so were stopped or dead."""
    beats = {rank: beat["time"] for rank, beat in read_heartbeats(folder.path).items() if beat["time"] >= since}
    newest = max(beats.values(), default=at)
    return [rank for rank, last in beats.items() if min(newest, at) - last > SILENT_S]


def _only(ranks: list[int]) -> int | None:
    return ranks[0] if len(ranks) == 1 else None

"""Why a rank ended: exit statuses by class, and the note that a rank leaves, since torchrun hides statuses."""

import errno
import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from yuan.train.guard import NumericalError
from yuan.train.run_files import list_names, read_file
from yuan.train.run_folder import write_json

EXIT_NOTES_FOLDER = "exits"
HOST_NAME_VARIABLES = ("SLURMD_NODENAME", "NODE_NAME")  # a batch system's own name for this machine


class ExitStatus(IntEnum):
    """Exit statuses of a rank; from sysexits.h where one fits."""

    FINISHED = 0
    UNKNOWN = 1
    BAD_DATA = 65
    PEER_LOST = 68
    DEVICE_LOST = 69
    OUT_OF_MEMORY = 71
    NUMERICAL = 72
    HUNG = 73
    DISK_FULL = 74
    PARENT_GONE = 75  # of infra.process_group: the supervisor closed the run, or died


# What CUDA, NCCL and gloo say; a lost device is looked for before a lost peer, which is its effect elsewhere.
OUT_OF_MEMORY_PATTERN = re.compile(r"out of memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
DEVICE_LOST_PATTERN = re.compile(
    r"uncorrectable ECC|device is lost|fallen off the bus|unspecified launch failure|no CUDA-capable device"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|invalid device ordinal|hardware error|\bXid\b",
    re.IGNORECASE,
)
PEER_LOST_PATTERN = re.compile(
    r"connection (closed|reset|refused)|timed out|broken pipe|ncclRemoteError|remote process exited|socket timeout"
    r"|unhandled system error|monitoredBarrier",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class ExitNote:
    """What a rank says of its end, and on which machine it was."""

    rank: int
    status: int
    message: str
    time: float
    host: str = ""


def classify_error(error: BaseException) -> ExitStatus:
    """The class of an error that ended a rank.

    >>> classify_error(ValueError("the plan lays out 3 layers")), classify_error(RuntimeError("CUDA out of memory"))
    (<ExitStatus.BAD_DATA: 65>, <ExitStatus.OUT_OF_MEMORY: 71>)
    """
    text = str(error)
    if isinstance(error, NumericalError):
        return ExitStatus.NUMERICAL
    if isinstance(error, ValueError | FileNotFoundError):  # before the words, which a name of a file may have
        return ExitStatus.BAD_DATA
    if isinstance(error, MemoryError) or OUT_OF_MEMORY_PATTERN.search(text):
        return ExitStatus.OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExitStatus.DISK_FULL
    if DEVICE_LOST_PATTERN.search(text):
        return ExitStatus.DEVICE_LOST
    if PEER_LOST_PATTERN.search(text):
        return ExitStatus.PEER_LOST
    return ExitStatus.UNKNOWN


def get_host_name() -> str:
    """This machine, as its batch system names it; else as it names itself."""
    return next((os.environ[name] for name in HOST_NAME_VARIABLES if os.environ.get(name)), socket.gethostname())


def write_exit_note(run: Path, rank: int, status: ExitStatus, message: str) -> None:
    """Say why this rank ends; without room on the disk nothing is said."""
    try:
        (run / EXIT_NOTES_FOLDER).mkdir(exist_ok=True)
        note = ExitNote(rank=rank, status=int(status), message=message[:2000], time=time.time(), host=get_host_name())
        write_json(run / EXIT_NOTES_FOLDER / f"{rank}.json", asdict(note))
    except OSError:
        pass


def read_exit_notes(run: Path, since: float) -> list[ExitNote]:
    """The notes left at or after a time, the earliest first."""
    found = []
    for name in list_names(run, EXIT_NOTES_FOLDER):
        if not name.endswith(".json"):
            continue
        try:
            found.append(ExitNote(**json.loads(read_file(run, f"{EXIT_NOTES_FOLDER}/{name}"))))
        except (ValueError, TypeError, OSError):
            continue
    return sorted((note for note in found if note.time >= since), key=lambda note: note.time)

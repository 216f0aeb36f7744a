"""Exit statuses of a rank by error class, and the exit note that a rank writes, since torchrun hides statuses."""

import errno
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from yuan.device_faults import (
    DEVICE_LOST_STATUS,
    OUT_OF_MEMORY_STATUS,
    describes_lack_of_memory,
    describes_lost_device,
)
from yuan.safe_files import list_names, read_file
from yuan.train.guard import NumericalError
from yuan.train.rank_json import RANK_FILE_PATTERN, get_count, get_number, get_text, parse_rank_object
from yuan.train.run_folder import write_json

EXIT_NOTES_FOLDER = "exits"
MAX_NOTE_CHARACTERS = 2000
MAX_HOST_CHARACTERS = 255
MAX_CLOCK_DIFFERENCE_S = 600.0  # between the machines of a run
HOST_NAME_VARIABLES = ("SLURMD_NODENAME", "NODE_NAME")  # names of this machine set by Slurm and Kubernetes


class ExitStatus(IntEnum):
    """Exit statuses of a rank; the values of sysexits.h where one fits."""

    FINISHED = 0
    UNKNOWN = 1
    BAD_DATA = 65
    PEER_LOST = 68
    DEVICE_LOST = DEVICE_LOST_STATUS
    OUT_OF_MEMORY = OUT_OF_MEMORY_STATUS
    NUMERICAL = 72
    HUNG = 73
    DISK_FULL = 74
    PARENT_GONE = 75  # set by infra.process_group: the supervisor closed the run or exited


# Messages of NCCL and gloo. A lost device is matched before a lost peer, since one causes the other.
PEER_LOST_PATTERN = re.compile(
    r"connection (closed|reset|refused)|timed out|broken pipe|ncclRemoteError|remote process exited|socket timeout"
    r"|unhandled system error|monitoredBarrier",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class ExitNote:
    """Exit report of a rank: status, message, time, and the machine it ran on."""

    rank: int
    status: int
    message: str
    time: float
    host: str = ""

    @classmethod
    def from_json(cls, rank: int, data: Mapping[str, Any]) -> "ExitNote":
        """Read the note of a rank.

        Raises:
            ValueError: if it is another rank's, or has no status or time.
        """
        status, timestamp = get_count(data, "status"), get_number(data, "time")
        if get_count(data, "rank") != rank or status is None or timestamp is None:
            raise ValueError(f"an exit note of rank {rank} needs its rank, a status and a time")
        message = get_text(data, "message", MAX_NOTE_CHARACTERS)
        return cls(
            rank=rank, status=status, message=message, time=timestamp, host=get_text(data, "host", MAX_HOST_CHARACTERS)
        )


def classify_error(error: BaseException) -> ExitStatus:
    """Map an error that ended a rank to an exit status.

    >>> classify_error(ValueError("the plan splits 3 layers")), classify_error(RuntimeError("CUDA out of memory"))
    (<ExitStatus.BAD_DATA: 65>, <ExitStatus.OUT_OF_MEMORY: 71>)
    """
    text = str(error)
    if isinstance(error, NumericalError):
        return ExitStatus.NUMERICAL
    if isinstance(
        error, ValueError | FileNotFoundError
    ):  # before the patterns: a file name in the message could match one
        return ExitStatus.BAD_DATA
    if describes_lack_of_memory(error):
        return ExitStatus.OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExitStatus.DISK_FULL
    if describes_lost_device(text):
        return ExitStatus.DEVICE_LOST
    if PEER_LOST_PATTERN.search(text):
        return ExitStatus.PEER_LOST
    return ExitStatus.UNKNOWN


def get_host_name() -> str:
    """Return the name that the batch system gives this machine, else its host name."""
    return next((os.environ[name] for name in HOST_NAME_VARIABLES if os.environ.get(name)), socket.gethostname())


def write_exit_note(run: Path, rank: int, status: ExitStatus, message: str) -> None:
    """Write why this rank exits; writes nothing if the disk is full."""
    try:
        (run / EXIT_NOTES_FOLDER).mkdir(exist_ok=True)
        text = message[:MAX_NOTE_CHARACTERS]
        note = ExitNote(rank=rank, status=int(status), message=text, time=time.time(), host=get_host_name())
        write_json(run / EXIT_NOTES_FOLDER / f"{rank}.json", asdict(note))
    except OSError:
        pass


def read_exit_notes(run: Path, since: float) -> list[ExitNote]:
    """Return the exit notes written since a time, earliest first; ignore notes that are not valid, or of the future.

    A note of the future would count at each later start of the run.
    """
    notes, latest = [], time.time() + MAX_CLOCK_DIFFERENCE_S
    for name in list_names(run, EXIT_NOTES_FOLDER):
        if not RANK_FILE_PATTERN.fullmatch(name):
            continue
        try:
            data = parse_rank_object(read_file(run, f"{EXIT_NOTES_FOLDER}/{name}"))
            notes.append(ExitNote.from_json(int(name.removesuffix(".json")), data))
        except (ValueError, OSError):
            continue
    return sorted((note for note in notes if since <= note.time <= latest), key=lambda note: note.time)

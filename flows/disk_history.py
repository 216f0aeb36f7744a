"""The space that the disk of the home folder has lost over recent rounds, and the rounds until it is full."""

import itertools
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.files import open_log, read_last_lines
from infra.stored_values import read_count

DISK_HISTORY_FILE = Path("work/disk.jsonl")  # below the home folder; the worker writes it
MAX_DISK_RECORDS = 12  # that count; a line has far less than the limit of `read_last_lines`


@dataclass(frozen=True)
class DiskRecord:
    """The bytes in use on the disk of the home folder at the end of a round."""

    round: int
    used_bytes: int


@dataclass(frozen=True)
class DiskForecast:
    """Growth of the used space, and the rounds that the free space lasts.

    Attributes:
        bytes_per_round: the median over recent rounds.
        rounds_left: rounds that fit until the disk is full.
    """

    bytes_per_round: int
    free_bytes: int
    rounds_left: int
    num_rounds: int


def record_disk_usage(home: Path, round_number: int) -> None:
    """Append the space in use at the end of a round; a repeated call for a round counts once."""
    file = home / DISK_HISTORY_FILE
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    record = DiskRecord(round_number, shutil.disk_usage(home).used)
    with os.fdopen(open_log(file), "ab") as out:
        out.write(json.dumps(asdict(record)).encode() + b"\n")


def read_disk_history(home: Path) -> list[DiskRecord]:
    """Return the newest records, one for each round, oldest first; damaged lines are ignored."""
    try:
        lines = read_last_lines(home / DISK_HISTORY_FILE, MAX_DISK_RECORDS)
    except OSError:
        return []
    records: dict[int, DiskRecord] = {}
    for line in lines:
        try:
            fields = json.loads(line)
            number, used = read_count(fields["round"]), read_count(fields["used_bytes"])
        except (ValueError, KeyError, TypeError):
            continue
        if number is not None and used is not None:
            records[number] = DiskRecord(number, used)
    return [records[number] for number in sorted(records)]


def forecast_disk(records: Sequence[DiskRecord], free_bytes: int) -> DiskForecast | None:
    """Compute how many rounds fit on the disk; None if fewer than two rounds have ended, or it does not fill.

    >>> history = [DiskRecord(1, 10), DiskRecord(2, 30), DiskRecord(3, 50), DiskRecord(5, 95)]
    >>> forecast_disk(history, 50)
    DiskForecast(bytes_per_round=20, free_bytes=50, rounds_left=2, num_rounds=4)
    >>> forecast_disk(history[:1], 50) is None
    True
    """
    growths = [
        (later.used_bytes - earlier.used_bytes) / (later.round - earlier.round)
        for earlier, later in itertools.pairwise(records)
    ]
    bytes_per_round = int(statistics.median(growths)) if growths else 0
    if bytes_per_round <= 0:
        return None
    return DiskForecast(bytes_per_round, free_bytes, free_bytes // bytes_per_round, len(records))

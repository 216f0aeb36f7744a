"""The outcome of the last cleanup, which `cotrain doctor` and `cotrain status` read."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from infra.files import read_regular, replace_file
from infra.stored_values import read_text, read_timestamp

CLEANUP_RECORD_FILE = Path("work/cleanup.json")  # below the home folder; the worker and operators write it
MAX_PROBLEM_CHARACTERS = 2000


@dataclass(frozen=True)
class CleanupRecord:
    """The outcome of a cleanup.

    Attributes:
        ended_at: in seconds since 1970.
        problems: why files of an area were not removed, by the area.
        failing_since: when the first of the cleanups in a row with a problem ended.
    """

    ended_at: float
    problems: Mapping[str, str] = field(default_factory=dict)
    failing_since: float | None = None


def write_cleanup_record(home: Path, problems: Mapping[str, str]) -> None:
    """Record that a cleanup has ended."""
    now = time.time()
    earlier = read_cleanup_record(home)
    failing_since = (earlier.failing_since if earlier is not None else None) or now
    file = home / CLEANUP_RECORD_FILE
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    record = CleanupRecord(now, dict(problems), failing_since if problems else None)
    replace_file(file, json.dumps(asdict(record)))


def read_cleanup_record(home: Path) -> CleanupRecord | None:
    """Return the outcome of the last cleanup; None if there was none, or its record is damaged."""
    try:
        content = json.loads(read_regular(home / CLEANUP_RECORD_FILE))
        ended_at, stored = read_timestamp(content["ended_at"]), content["problems"]
        problems = {str(area): read_text(text, MAX_PROBLEM_CHARACTERS) or "unknown" for area, text in stored.items()}
        failing_since = read_timestamp(content.get("failing_since"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return None if ended_at is None else CleanupRecord(ended_at, problems, failing_since)

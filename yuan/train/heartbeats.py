"""What each rank said last of itself, for those who watch a run from outside."""

import json
import re
from pathlib import Path
from typing import Any

from yuan.train.run_files import names_in, read_file

FOLDER, NAME = "heartbeats", re.compile(r"[0-9]{1,6}\.json")


def read_heartbeats(run: Path) -> dict[int, dict[str, Any]]:
    """By rank: its pid, the time, the step after which and the instruction in which it was."""
    found = {}
    for name in names_in(run, FOLDER):
        if not NAME.fullmatch(name):
            continue
        try:
            found[int(name.removesuffix(".json"))] = json.loads(read_file(run, f"{FOLDER}/{name}"))
        except (ValueError, OSError):
            continue
    return found

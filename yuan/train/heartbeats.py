"""What each rank said last of itself, for those who watch a run from outside."""

import json
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"


def read_heartbeats(run: Path) -> dict[int, dict[str, Any]]:
    """By rank: its pid, the time, the step after which and the instruction in which it was."""
    found = {}
    for file in sorted((run / FOLDER).glob("[0-9]*.json")):
        try:
            found[int(file.stem)] = json.loads(file.read_text())
        except (ValueError, OSError):
            continue
    return found

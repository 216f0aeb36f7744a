"""The keeper's state file, which `up`, `status` and `doctor` read: its pid and the states of its services."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.files import read_regular
from infra.processes import has_exited
from infra.stored_values import read_count, read_number, read_text, read_timestamp

KEEPER_STATE_FILE = "stack.json"
MAX_STATE_TEXT_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True)
class ServiceState:
    """Hold the state of one service; the keeper writes it to the state file for `up`, `status` and `doctor`.

    Attributes:
        state: waiting (for other services), starting, ready, failed, restarting or stopped;
            unknown if the file has no valid one.
        seconds: time that the last start took until the service was ready.
        ready_at: last time the service became ready, in seconds since 1970; kept while it is down.
        restart_reason: reason for the last restart.
        error: error of the last start; None if it succeeded.
    """

    state: str = "waiting"
    pid: int | None = None
    seconds: float | None = None
    ready_at: float | None = None
    restarts: int = 0
    restart_reason: str | None = None
    error: str | None = None

    @classmethod
    def from_json(cls, stored: object) -> "ServiceState":
        """Read the stored fields; one that is missing or wrong is unknown, others than this release's are ignored."""
        content = stored if isinstance(stored, dict) else {}
        return cls(
            state=read_text(content.get("state"), MAX_STATE_TEXT_CHARACTERS) or "unknown",
            pid=read_count(content.get("pid")) or None,
            seconds=read_number(content.get("seconds")),
            ready_at=read_timestamp(content.get("ready_at")),
            restarts=read_count(content.get("restarts")) or 0,
            restart_reason=read_text(content.get("restart_reason"), MAX_STATE_TEXT_CHARACTERS),
            error=read_text(content.get("error"), MAX_STATE_TEXT_CHARACTERS),
        )


@dataclass(frozen=True)
class KeeperState:
    """Hold the content of the state file: the keeper's pid, and the states of its services by name."""

    pid: int
    services: Mapping[str, ServiceState]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are stored."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: object) -> "KeeperState":
        """Read the stored fields.

        Raises:
            ValueError: if there is no pid; the file is then not that of a keeper.
        """
        content = stored if isinstance(stored, dict) else {}
        pid, services = read_count(content.get("pid")), content.get("services")
        if not pid:
            raise ValueError(f"{KEEPER_STATE_FILE} has no pid")
        states = services.items() if isinstance(services, dict) else ()
        return cls(pid, {name: ServiceState.from_json(state) for name, state in states})


def read_keeper_state(folder: Path) -> KeeperState | None:
    """Read the keeper's state file; return None if there is none, it is damaged, or its keeper has exited."""
    try:
        state = KeeperState.from_json(json.loads(read_regular(folder / KEEPER_STATE_FILE)))
    except (OSError, ValueError, RecursionError):
        return None
    return None if has_exited(state.pid) else state


def read_service_states(folder: Path) -> Mapping[str, ServiceState]:
    """Read the states of the services by name from the keeper's state file; empty where `read_keeper_state` is None."""
    state = read_keeper_state(folder)
    return state.services if state else {}

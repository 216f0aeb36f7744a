"""The keeper's state file, which `up`, `status` and `doctor` read: its pid and the states of its services."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from infra.processes import has_exited

KEEPER_STATE_FILE = "stack.json"


@dataclass(frozen=True, kw_only=True)
class ServiceState:
    """Hold the state of one service; the keeper writes it to the state file for `up`, `status` and `doctor`.

    Attributes:
        state: waiting (for other services), starting, ready, failed, restarting or stopped.
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
    def from_json(cls, stored: Mapping[str, Any]) -> "ServiceState":
        """Read the stored fields; the keeper's version may have others than this one."""
        return cls(**{item.name: stored[item.name] for item in fields(cls) if item.name in stored})


@dataclass(frozen=True)
class KeeperState:
    """Hold the content of the state file: the keeper's pid, and the states of its services by name."""

    pid: int
    services: Mapping[str, ServiceState]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are stored."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "KeeperState":
        """Read the stored fields.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: if they are not those of a state file.
        """
        services = {name: ServiceState.from_json(state) for name, state in stored["services"].items()}
        return cls(int(stored["pid"]), services)


def read_keeper_state(folder: Path) -> KeeperState | None:
    """Read the keeper's state file; return None if there is none, it is damaged, or its keeper has exited."""
    try:
        state = KeeperState.from_json(json.loads((folder / KEEPER_STATE_FILE).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None if has_exited(state.pid) else state


def read_service_states(folder: Path) -> Mapping[str, ServiceState]:
    """Read the states of the services by name from the keeper's state file; empty where `read_keeper_state` is None."""
    state = read_keeper_state(folder)
    return state.services if state else {}

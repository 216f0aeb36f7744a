"""What a flow's steps work with, opened once per process."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sqlalchemy.orm import Session, sessionmaker

from infra.database import open_engine, open_sessions
from infra.objects import Objects, open_objects
from infra.settings import Settings, load_settings
from infra.tracker import Tracker


@dataclass(frozen=True)
class Context:
    """Settings and open connections; in a round's flow also which attempt at the round this is."""

    settings: Settings
    sessions: sessionmaker[Session]
    objects: Objects
    attempt: int = 0

    @cached_property
    def tracker(self) -> Tracker:
        return Tracker(self.settings)

    @property
    def runs(self) -> Path:
        return self.settings.home / "runs"

    def lock_of(self, round_id: str) -> Path:
        """A file that one process at a time holds to work on the round."""
        self.runs.mkdir(parents=True, exist_ok=True)
        return self.runs / f".round-{round_id}.lock"

    @property
    def salt(self) -> str:
        return self.settings.split_salt.get_secret_value()


def open_context() -> Context:
    """Read the settings and connect; for process entries."""
    settings = load_settings()
    return Context(settings, open_sessions(open_engine(settings)), open_objects(settings))

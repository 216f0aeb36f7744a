"""Settings and connections of flow steps and the dispatcher, opened once per process."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sqlalchemy.orm import Session, sessionmaker

from infra.database import make_session_factory, open_engine
from infra.object_store import ObjectStore, open_object_store
from infra.settings import DispatcherSettings, FlowSettings, RecordsAccess, load_settings
from infra.tracker import Tracker


@dataclass(frozen=True)
class RecordsContext:
    """Settings and connections of a process that uses the platform's records: its database and the tracker."""

    settings: RecordsAccess
    sessions: sessionmaker[Session]

    @cached_property
    def tracker(self) -> Tracker:
        return Tracker(self.settings)


@dataclass(frozen=True)
class DispatcherContext(RecordsContext):
    """Settings and connections of the dispatcher."""

    settings: DispatcherSettings


@dataclass(frozen=True)
class Context(RecordsContext):
    """Settings and connections of a flow's steps.

    Attributes:
        attempt: number of the attempt at the round; 0 outside of a round's flow.
    """

    settings: FlowSettings
    objects: ObjectStore
    attempt: int = 0

    @property
    def runs(self) -> Path:
        return self.settings.home / "runs"

    def get_round_lock(self, round_id: str) -> Path:
        """Return the lock file that a process must hold to work on the round."""
        self.runs.mkdir(parents=True, exist_ok=True)
        return self.runs / f".round-{round_id}.lock"

    @property
    def salt(self) -> str:
        return self.settings.split_salt.get_secret_value()


def open_context(kind: type[FlowSettings] = FlowSettings) -> Context:
    """Read the settings and connect; for process entries. Operators' commands pass `Settings`."""
    settings = load_settings(kind)
    return Context(settings, make_session_factory(open_engine(settings)), open_object_store(settings))


def open_dispatcher_context() -> DispatcherContext:
    """Read the dispatcher's settings and connect."""
    settings = load_settings(DispatcherSettings)
    return DispatcherContext(settings, make_session_factory(open_engine(settings)))

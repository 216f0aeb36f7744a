"""Settings and connections of flow steps and the dispatcher, opened once per process."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx
from sqlalchemy.orm import Session, sessionmaker

from infra.database import make_session_factory, open_engine
from infra.object_store import ObjectStore, open_object_store
from infra.settings import DispatcherSettings, FlowSettings, RecordsAccess, Settings, load_settings
from infra.tracker import Tracker
from infra.version_cache import VersionCache
from yuan.data.text import make_printable
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, parse_digests

SERVER_CHECK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RecordsContext:
    """Settings and connections of a process that uses the platform's records: its database and the tracker."""

    settings: RecordsAccess
    sessions: sessionmaker[Session]

    @cached_property
    def tracker(self) -> Tracker:
        return Tracker(self.settings)

    @cached_property
    def versions(self) -> VersionCache:
        """Return the cache of versions, which this process may fill."""
        settings = self.settings
        return VersionCache(settings.home, settings.max_cache_bytes, self.tracker, MODEL_MANIFEST_FILE, parse_digests)


@dataclass(frozen=True)
class DispatcherContext(RecordsContext):
    """Settings and connections of the dispatcher."""

    settings: DispatcherSettings
    objects: ObjectStore


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
    """Read the settings and connect; for process entries."""
    settings = load_settings(kind)
    return Context(settings, make_session_factory(open_engine(settings)), open_object_store(settings))


def open_operator_context() -> Context:
    """Read all settings and connect, for an operator's command, which fails at once if a server does not answer.

    The client libraries of MLflow and S3 retry for seconds, which suits a flow and not a person.

    Raises:
        ValueError: if a setting is wrong, or MLflow or the object store does not answer.
        sqlalchemy.exc.OperationalError: if PostgreSQL does not.
    """
    context = open_context(Settings)
    with context.sessions() as session:
        session.connection()
    require_server("MLflow", f"{context.settings.mlflow_url}/health", "COTRAIN_MLFLOW_URL")
    require_server("the object store", context.settings.s3_endpoint, "COTRAIN_S3_ENDPOINT")
    return context


def require_server(name: str, url: str, variable: str) -> None:
    """Check that a server answers, with whatever status.

    Raises:
        ValueError: if it does not.
    """
    try:
        httpx.get(url, timeout=SERVER_CHECK_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        fix = f"see `cotrain status` and {variable}"
        raise ValueError(f"{name} does not answer at {make_printable(url)} ({error}); {fix}") from None


def open_dispatcher_context() -> DispatcherContext:
    """Read the dispatcher's settings and connect."""
    settings = load_settings(DispatcherSettings)
    # One attempt: the dispatcher repeats a duty that fails, and a store that hangs must not hold up the others.
    objects = open_object_store(settings, attempts=1)
    return DispatcherContext(settings, make_session_factory(open_engine(settings)), objects)

"""Open the records of a pool's devices, for the operator's commands."""

from dataclasses import dataclass

from sqlalchemy.orm import Session, sessionmaker

from feedback import leases
from flows.supervisor.pool_launcher import load_configured_pool
from infra.database import make_session_factory, open_engine
from infra.settings import Settings, load_settings


@dataclass(frozen=True)
class PoolRecords:
    """Hold a pool's name and sessions of the database that has its devices, leases and queue."""

    pool: str
    sessions: sessionmaker[Session]


def open_pool_records(name: str = "") -> PoolRecords:
    """Open the records of the named pool, or of this installation's pool, which is first registered from its file.

    Raises:
        ValueError: if the settings or the pool's file are invalid.
        infra.faults.DATABASE_ERRORS: if the database does not answer.
    """
    settings = load_settings(Settings)
    sessions, configured = make_session_factory(open_engine(settings)), load_configured_pool(settings)
    if name in ("", configured.name):
        with sessions.begin() as session:
            leases.register_pool(session, configured)
    return PoolRecords(name or configured.name, sessions)

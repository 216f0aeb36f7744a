"""Advisory locks of the platform's database: numbers that serialize transactions which no common row serializes."""

from enum import IntEnum, unique

from sqlalchemy import func, select
from sqlalchemy.orm import Session


@unique
class AdvisoryLock(IntEnum):
    """Numbers of the advisory locks; arbitrary, and the same in every release that uses one database."""

    DATASETS = 7_310_211
    REGISTRATIONS = 7_310_212
    SHARDS = 7_310_213


def hold_advisory_lock(session: Session, lock: AdvisoryLock) -> None:
    """Wait for a lock and hold it until the session's transaction ends."""
    session.execute(select(func.pg_advisory_xact_lock(lock.value)))

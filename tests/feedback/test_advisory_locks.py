"""Advisory locks, on PostgreSQL."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from feedback.advisory_locks import AdvisoryLock, hold_advisory_lock


def test_an_advisory_lock_blocks_other_transactions_until_the_holder_ends(engine):
    def is_free(number):
        with Session(engine) as session:
            return session.scalar(select(func.pg_try_advisory_xact_lock(number)))

    with Session(engine) as holder:
        hold_advisory_lock(holder, AdvisoryLock.DATASETS)
        assert not is_free(7_310_211)  # the number in earlier releases, whose processes may still run
        assert is_free(7_310_212)
        hold_advisory_lock(holder, AdvisoryLock.REGISTRATIONS)
        assert not is_free(7_310_212)
    assert is_free(7_310_211) and is_free(7_310_212)

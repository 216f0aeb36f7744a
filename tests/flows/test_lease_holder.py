"""Test the wait for a lease, on the real database."""

import dataclasses

import pytest
from sqlalchemy.exc import OperationalError

from feedback import leases
from feedback.tables import Lease
from flows.supervisor.lease_holder import hold_lease
from infra.database import make_session_factory
from yuan.plan.pool import make_cpu_pool

DEVICE_CLASS = make_cpu_pool().groups[0].device_class


class InterruptedSessions:
    """Sessions of which one transaction fails as in an outage; `failing_number` counts from 1."""

    def __init__(self, sessions, failing_number):
        self._sessions, self._failing_number = sessions, failing_number
        self._num_begun = 0

    def begin(self):
        self._num_begun += 1
        if self._num_begun == self._failing_number:
            raise OperationalError("SELECT 1", {}, Exception("connection refused"))
        return self._sessions.begin()


@pytest.fixture
def sessions(engine):
    sessions = make_session_factory(engine)
    with sessions.begin() as session:
        leases.register_pool(session, dataclasses.replace(make_cpu_pool(), name="lease-test"))
    return sessions


def test_an_outage_at_the_first_poll_does_not_end_the_wait(sessions):
    interrupted = InterruptedSessions(sessions, failing_number=2)  # the first one requests the lease
    nums_ahead = []
    with hold_lease(
        interrupted, "lease-test", {DEVICE_CLASS: 2}, run_id="r", team="t", report_waiting=nums_ahead.append
    ) as lease:
        assert len(lease.devices) == 2 and nums_ahead == [0]
    with sessions() as session:
        assert session.get_one(Lease, lease.id).released_at is not None

"""Fixtures: a reporter and a cut-off time."""

from datetime import datetime, timedelta, timezone

import pytest

from feedback.accounts import add_contributor
from feedback.tables import new_id


@pytest.fixture
def later():
    return datetime.now(timezone.utc) + timedelta(minutes=1)


@pytest.fixture
def reporter(session):
    return add_contributor(session, new_id()).contributor

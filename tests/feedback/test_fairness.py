"""Requests of one account do not block those of other accounts."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from sqlalchemy import text

from feedback.accounts import add_contributor
from feedback.api.app import make_app
from feedback.tables import new_id
from infra.database import make_session_factory, open_engine
from tests.serving import serve_app
from tests.waiting import wait_until

CONNECTIONS = 16
FLOOD = 40


@pytest.fixture
def url(stores, objects):
    """Serve a portal with the number of database connections that the stack uses."""
    engine = open_engine(stores, pool_size=CONNECTIONS)
    with serve_app(make_app(stores, engine, objects)) as url:
        yield url
    engine.dispose()


@pytest.fixture
def other_headers(engine):
    with make_session_factory(engine).begin() as session:
        return {"Authorization": f"Bearer {add_contributor(session, f'other-{new_id()}').token}"}


@contextmanager
def lock_table(engine, table):
    """Block every query of a table until the `with` block ends."""
    with engine.begin() as connection:
        connection.execute(text(f"lock table {table} in access exclusive mode"))
        yield


def count_waiting_queries(engine, table):
    query = "select count(*) from pg_locks where not granted and relation = to_regclass(:table)"
    with engine.connect() as connection:
        return connection.execute(text(query), {"table": table}).scalar()


def test_others_are_served_while_one_account_floods_the_portal_with_slow_requests(engine, url, account, other_headers):
    def ask(name, headers):
        return httpx.get(f"{url}/api/v1/{name}", headers=headers, timeout=60).status_code

    with ThreadPoolExecutor(FLOOD) as callers:
        with lock_table(engine, "outbox"):
            flood = [callers.submit(ask, "notices", account.headers) for _ in range(FLOOD)]
            wait_until(lambda: count_waiting_queries(engine, "outbox") >= CONNECTIONS // 4)
            assert all(ask("datasets", other_headers) == 200 for _ in range(20))
            assert httpx.get(url, timeout=60).status_code == 200
            assert not any(request.done() for request in flood)
            assert count_waiting_queries(engine, "outbox") == CONNECTIONS // 4
        assert {future.result() for future in flood} == {200}


def test_requests_without_a_token_share_one_connection_limit(engine, url, account):
    with ThreadPoolExecutor(FLOOD) as callers:
        with lock_table(engine, "promotion"):  # the front page names the champion
            flood = [callers.submit(httpx.get, url, timeout=60) for _ in range(FLOOD)]
            wait_until(lambda: count_waiting_queries(engine, "promotion") >= CONNECTIONS // 4)
            assert httpx.get(f"{url}/api/v1/feedback", headers=account.headers, timeout=60).status_code == 200
            assert not any(request.done() for request in flood)
        assert {future.result().status_code for future in flood} == {200}


def test_requests_with_unknown_tokens_share_one_connection_limit(engine, url, account, other_headers):
    def ask(number):
        return httpx.get(url, headers={"Authorization": f"Bearer ct_made_up_{number}"}, timeout=60).status_code

    def list_feedback(headers):
        return httpx.get(f"{url}/api/v1/feedback", headers=headers, timeout=60).status_code

    assert list_feedback(account.headers) == 200
    with ThreadPoolExecutor(FLOOD) as callers:
        with lock_table(engine, "promotion"):
            flood = [callers.submit(ask, number) for number in range(FLOOD)]
            wait_until(lambda: count_waiting_queries(engine, "promotion") >= CONNECTIONS // 4)
            assert list_feedback(account.headers) == 200
            assert list_feedback(other_headers) == 200  # also for an account whose token the portal has not seen before
            assert not any(request.done() for request in flood)
            assert count_waiting_queries(engine, "promotion") == CONNECTIONS // 4
        assert {future.result() for future in flood} == {200}
    assert list_feedback({"Authorization": "Bearer ct_made_up_0"}) == 401

"""Provide real services to the tests: embedded PostgreSQL and S3, started once per session."""

import os
import subprocess
import time
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from hypothesis import settings
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from feedback import rounds
from feedback.accounts import add_contributor
from feedback.api.app import make_app
from feedback.tables import Round, new_id
from flows.stack.services import make_services
from flows.stack.stack_config import (
    PORT_RANGE,
    PORT_RANGE_VARIABLE,
    load_or_make_config,
    write_environment,
)
from flows.stack.stores import remove_weed_sockets
from infra.database import make_session_factory, open_engine
from infra.keeper import STACK_ID_VARIABLE, kill_stack_processes
from infra.listeners import open_listener
from infra.object_store import open_object_store
from infra.settings import Settings
from yuan.model.model_manifest import ModelManifest

MAX_WORKERS = 8
# Each process of pytest-xdist chooses ports of its own: two stacks that start at once could choose the same free port.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and PORT_RANGE_VARIABLE not in os.environ:
    number, width = int(worker.removeprefix("gw")) % MAX_WORKERS, (PORT_RANGE[1] - PORT_RANGE[0]) // MAX_WORKERS
    os.environ[PORT_RANGE_VARIABLE] = f"{PORT_RANGE[0] + number * width}-{PORT_RANGE[0] + (number + 1) * width - 1}"

settings.register_profile("untimed", deadline=None)  # no deadlines: a busy machine must not fail a test
settings.load_profile("untimed")


def start(service, stack_id):
    """Start one service of the embedded stack and wait until its check passes."""
    service.before()
    (service.cwd / "log").parent.mkdir(exist_ok=True)
    with open_listener(service.listen) if service.listen else open(os.devnull) as stdin:
        process = subprocess.Popen(
            service.command(),
            env={**service.env, STACK_ID_VARIABLE: stack_id},
            cwd=service.cwd,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    end = time.monotonic() + 60
    while True:
        try:
            service.check()
            break
        except Exception:
            assert process.poll() is None and time.monotonic() < end, f"{service.name} did not start"
            time.sleep(0.05)
    service.after()
    return process


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Return the settings of a home folder whose PostgreSQL and S3 run."""
    home = tmp_path_factory.mktemp("home")
    config = load_or_make_config(home, durable=False)
    write_environment(home, config)
    settings = Settings(_env_file=home / "env", home=home)
    processes = [start(service, config.stack_id) for service in make_services(home, config, settings)[:2]]
    yield settings
    kill_stack_processes(config.stack_id, spare={os.getpid()})
    for process in processes:
        process.wait()
    remove_weed_sockets(config)  # as the keeper does


@pytest.fixture(scope="session")
def engine(stores):
    engine = open_engine(stores)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine):
    """Return a session on empty tables; its changes are rolled back."""
    with engine.connect() as connection:
        transaction = connection.begin()
        connection.execute(text('truncate contributor, "case", round, snapshot, device_pool, audit_event cascade'))
        with Session(connection, join_transaction_mode="create_savepoint", expire_on_commit=False) as session:
            yield session
        transaction.rollback()


@pytest.fixture(scope="session")
def objects(stores):
    return open_object_store(stores)


@pytest.fixture(scope="session")
def first_version(engine):
    """Return the version that reports refer to: number 1, registered by a finished training round."""
    with make_session_factory(engine).begin() as session:
        number = (session.scalar(select(func.max(Round.number))) or 0) + 1  # tests before may have committed rounds
        training_round = Round(number=number, requested_by="test", parameters={}, state="promoted")
        session.add(training_round)
        session.flush()
        rounds.add_version(session, training_round.id, 1, ModelManifest({}, {}))
    return 1


@pytest.fixture(scope="session")
def portal(stores, engine, objects, first_version):
    with TestClient(make_app(stores, engine, objects)) as client:
        yield client


@pytest.fixture
def account(engine):
    """Create a contributor for this test only; return its id, headers and token."""
    with make_session_factory(engine).begin() as session:
        account = add_contributor(session, f"test-{new_id()}")
        headers = {"Authorization": f"Bearer {account.token}"}
        return SimpleNamespace(id=account.contributor.id, headers=headers, token=account.token)


@pytest.fixture
def operator(stores):
    return {"Authorization": f"Bearer {stores.operator_token.get_secret_value()}"}

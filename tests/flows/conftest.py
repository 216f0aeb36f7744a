"""Provide a complete embedded stack to each test module."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest
from sqlalchemy import update

from feedback import rounds
from feedback.client import Client
from feedback.contracts import RoundParameters
from feedback.tables import PoolDevice, Round, new_id
from flows.context import Context
from flows.demo.demo_corpus import BASE_SKILLS
from flows.stack.stack_config import load_config
from flows.supervisor.run_reporter import RunReporter
from flows.supervisor.supervisor import Supervisor
from infra.database import make_session_factory, open_engine
from infra.keeper import find_stack_pids
from infra.keeper_state import read_service_states
from infra.settings import Settings
from tests.waiting import wait_until
from tests.yuan.runs import prepare_run
from yuan.data.rows import dump_rows
from yuan.data.skills import load_skills

ROOT = Path(__file__).parents[2]


class Stack:
    """Control the stack of one home folder through the command line and the client."""

    def __init__(self, home):
        self.home = home

    def cotrain(self, *args, check=False):
        """Run a command with --json; return its exit status, and its JSON or, without any, its stderr."""
        command = [sys.executable, "-m", "flows.cli.app", *args, "--json"]
        env = {**os.environ, "COTRAIN_HOME": str(self.home)}
        result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=200)
        assert not check or result.returncode == 0, result.stderr
        return result.returncode, json.loads(result.stdout) if result.stdout else result.stderr

    @cached_property
    def settings(self):
        return Settings(_env_file=self.home / "env", home=self.home)

    def client(self, token):
        return Client(self.settings.portal_url, token)

    def pid(self, name):
        return read_service_states(self.home)[name].pid

    def kill(self, name):
        os.kill(self.pid(name), signal.SIGKILL)

    def processes(self, word):
        """Return the pids of the stack's processes whose command line has the word as an argument."""
        pids = []
        for pid in find_stack_pids(load_config(self.home).stack_id):
            with contextlib.suppress(OSError):
                if word in Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0"):
                    pids.append(pid)
        return pids

    wait_until = staticmethod(wait_until)

    @classmethod
    def follow(cls, client, training_round):
        """Wait until a round has ended."""
        return cls.wait_until(
            lambda: (r := client.round(training_round.id)).state != "running" and r, timeout_s=600, pause_s=0.5
        )

    @staticmethod
    def push(client, folder, rows, **more):
        file = folder / "rows.jsonl"
        file.write_bytes(dump_rows(rows))
        return client.push_dataset(file, **more)


@pytest.fixture(scope="module")
def stack(request, tmp_path_factory):
    """Start a stack with the `SETTINGS` of the test module."""
    stack = Stack(tmp_path_factory.mktemp("stack"))
    (stack.home / "env.local").write_text(getattr(request.module, "SETTINGS", ""))
    try:
        stack.cotrain("up", check=True)
        yield stack
    finally:
        stack.cotrain("down", check=True)


@pytest.fixture(scope="module")
def operator(stack):
    with stack.client(stack.settings.operator_token.get_secret_value()) as client:
        yield client


@pytest.fixture(scope="module")
def contributor(operator, stack):
    with stack.client(operator.add_contributor("tester").token) as client:
        yield client


@pytest.fixture(scope="module")
def sessions(stack):
    engine = open_engine(stack.settings)
    yield make_session_factory(engine)
    engine.dispose()


@pytest.fixture(scope="module")
def base_dataset(operator, stack, tmp_path_factory):
    """Upload a small base mixture for the first round."""
    rows = [row for skill in load_skills(BASE_SKILLS)[:4] for row in skill.make_rows(300, seed=0)]
    stack.push(operator, tmp_path_factory.mktemp("rows"), rows, name="base", purpose="base")


@pytest.fixture
def supervise(stores, engine, objects, portal, tmp_path):
    """Return a function that prepares a run in a new round and returns its supervisor; no device is lost."""
    context, round_ids = Context(stores, make_session_factory(engine), objects), []

    def make_supervisor(training_inputs, train_config):
        with context.sessions.begin() as session:
            session.execute(update(Round).values(state="cancelled"))
            training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
            run = rounds.get_or_create_training_run(session, training_round.id)
            session.execute(update(PoolDevice).values(lost_reason=None, lost_host=None))
        round_ids.append(training_round.id)
        folder = prepare_run(tmp_path / "run", training_inputs, train_config)
        with context.sessions.begin() as session:
            rounds.get_or_store_plan(session, training_round.id, folder.read_spec().plan)
        reporter = RunReporter(context, training_round.id, folder, lambda status: None)
        return Supervisor(context, training_round.id, run.id, folder, reporter)

    yield make_supervisor
    with context.sessions.begin() as session:
        for round_id in round_ids:
            rounds.finish_round(session, round_id, "cancelled", "the test is over")

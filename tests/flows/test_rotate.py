"""Test secret rotation: new secrets are valid, and old ones are refused."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import httpx
import psycopg
import pytest
from botocore.exceptions import ClientError

from feedback.client import Client, PortalError
from feedback.tables import new_id
from flows.stack.stack_config import ROTATABLE_SECRET_NAMES, WEED_CERTIFICATE, load_config
from infra.keeper_state import read_keeper_state
from infra.mlflow_rules import CONSUMER_ACCOUNT, READER_ACCOUNT
from infra.settings import Settings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def make_account_checks(home):
    """Return, for each account of a stack, a function that raises if the account's secret is refused."""
    settings, config = Settings(_env_file=home / "env", home=home), load_config(home)
    secret = config.secrets

    def database(role, name, password):
        url = f"postgresql://{role}:{password}@127.0.0.1:{config.ports['postgres']}/{name}"
        return lambda: psycopg.connect(url, connect_timeout=5).close()

    def store():
        keys = {"aws_access_key_id": secret["s3_access_key"], "aws_secret_access_key": secret["s3_secret_key"]}
        client = boto3.client("s3", endpoint_url=settings.s3_endpoint, region_name="us-east-1", **keys)
        client.list_objects_v2(Bucket="cotrain", MaxKeys=1)

    def get(url, **request):
        return lambda: httpx.get(url, timeout=10, **request).raise_for_status()

    def operate():
        with Client(settings.portal_url, settings.operator_token.get_secret_value()) as client:
            client.add_contributor(new_id())

    mlflow = f"{settings.mlflow_url}/api/2.0/mlflow/registered-models/get?name=yuan"
    token = {"Authorization": f"Bearer {settings.model_server_token.get_secret_value()}"}
    return {
        "postgres": database("postgres", "postgres", secret["postgres"]),
        "database": database("cotrain", "cotrain", secret["database"]),
        "mlflow_database": database("mlflow", "mlflow", secret["mlflow_database"]),
        "prefect_database": database("prefect", "prefect", secret["prefect_database"]),
        "store": store,
        "mlflow": get(mlflow, auth=(settings.mlflow_username, secret["mlflow"])),
        "consumer": get(mlflow, auth=(CONSUMER_ACCOUNT, secret["mlflow_consumer"])),
        "reader": get(mlflow, auth=(READER_ACCOUNT, secret["mlflow_reader"])),
        "prefect": get(f"{settings.prefect_api_url}/deployments/name/cotrain-round/local",
                       auth=("cotrain", secret["prefect"])),
        "model server": get(f"{settings.model_server_url}/v1/models", headers=token),
        "operator": operate,
    }  # fmt: skip


def is_accepted(check):
    try:
        check()
    except (psycopg.OperationalError, ClientError, httpx.HTTPStatusError, PortalError):
        return False
    return True


def find_refused_accounts(checks):
    """Return the names of the accounts whose secrets are refused."""
    return {name for name, check in checks.items() if not is_accepted(check)}


def test_all_secrets_of_a_running_stack_are_rotated(stack):
    before = make_account_checks(stack.home)
    old, certificate = load_config(stack.home).secrets, (stack.home / WEED_CERTIFICATE).read_bytes()
    _, output = stack.cotrain("rotate", check=True)
    assert (stack.home / WEED_CERTIFICATE).read_bytes() != certificate
    assert set(output["rotated"]) == set(ROTATABLE_SECRET_NAMES)
    assert find_refused_accounts(make_account_checks(stack.home)) == set()
    assert find_refused_accounts(before) == before.keys()
    now = load_config(stack.home)
    assert {name for name in old if old[name] == now.secrets[name]} == {"split_salt"}
    assert now.retired == {}


def test_secrets_rotated_while_the_stack_is_down_are_valid_after_up(stack):
    stack.cotrain("down", check=True)
    old = load_config(stack.home).secrets
    for _ in range(2):  # the server still has the first secret, which is retired twice
        stack.cotrain("rotate", "--secret", "postgres", "--secret", "mlflow", check=True)
    stack.cotrain("up", check=True)
    now = load_config(stack.home).secrets
    assert {name for name in old if old[name] != now[name]} == {"postgres", "mlflow"}
    assert find_refused_accounts(make_account_checks(stack.home)) == set()


@pytest.mark.parametrize("seconds", [1.2, 3.0, 8.0])
def test_killed_rotation_is_repeated_and_no_old_secret_remains_valid(stack, seconds):
    """Kill the command and its keeper, as a power cut would: while it writes, stops the stack or starts it."""
    stack.cotrain("up", check=True)
    before = make_account_checks(stack.home)
    assert find_refused_accounts(before) == set()
    command = [sys.executable, "-m", "flows.cli.app", "rotate"]
    with subprocess.Popen(command, env={**os.environ, "COTRAIN_HOME": str(stack.home)}, cwd=ROOT) as process:
        time.sleep(seconds)
        process.kill()
    if state := read_keeper_state(stack.home):
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGKILL)
    stack.cotrain("rotate", check=True)
    stack.cotrain("up", check=True)
    assert find_refused_accounts(make_account_checks(stack.home)) == set()
    assert find_refused_accounts(before) == before.keys()
    assert load_config(stack.home).retired == {}


def test_split_salt_cannot_be_rotated(stack):
    status, output = stack.cotrain("rotate", "--secret", "split_salt")
    assert status == 1 and "must never change" in output

"""The OpenAPI description against the real portal: schemathesis generates requests and checks every response."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from feedback import rounds
from feedback.api.app import make_app
from infra.database import make_session_factory
from tests.serving import serve_app
from tests.yuan.model_server import TOKEN, make_served_model, serve_model
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.service import ModelService

CONFIG = Path(__file__).with_name("schemathesis.toml")
SEED = 15
EXAMPLES = 500


@pytest.fixture(scope="module")
def portal_url(stores, engine, objects, first_version):
    """Serve the portal in front of a real model server."""
    service = ModelService(ModelServerMetrics())
    service.swap_in(make_served_model(1))
    with serve_model(service) as model:
        changes = {"model_server_url": model, "model_server_token": SecretStr(TOKEN)}
        changes |= dict.fromkeys(
            ("max_daily_reports", "max_daily_datasets"), 1_000_000
        )  # one account sends all requests
        with serve_app(make_app(stores.model_copy(update=changes), engine, objects)) as url:
            yield url
    with make_session_factory(engine).begin() as session:
        if (training_round := rounds.find_running_round(session)) is not None:
            rounds.finish_round(session, training_round.id, "cancelled", "the test is over")


def run_schemathesis(portal_url, headers, scratch, examples, *options):
    """Run schemathesis over all operations, with every check, and return its report."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", CONFIG, "run", f"{portal_url}/openapi.json"]
    command += ["--max-examples", examples, "--seed", SEED, "--header", f"Authorization: {headers['Authorization']}"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(CONFIG.with_name("schemathesis_hooks.py"))}
    result = subprocess.run(
        [*map(str, command), *options], cwd=scratch, env=environment, capture_output=True, text=True, check=False
    )
    report = "\n".join(line[:300] for line in (result.stdout + result.stderr).splitlines())
    assert result.returncode == 0, report
    return report


@pytest.mark.slow
@pytest.mark.timeout(3000)  # 5 minutes on a quiet machine of two cores
@pytest.mark.parametrize("role", ["contributor", "operator"])
def test_every_response_conforms_to_the_openapi_description(portal_url, account, operator, tmp_path, role):
    print(run_schemathesis(portal_url, operator if role == "operator" else account.headers, tmp_path, EXAMPLES))

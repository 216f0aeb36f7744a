"""The real MLflow server, for the tests of its gate and its pages."""

import pytest

from flows.stack.stack_config import load_config
from tests.conftest import start
from tests.infra.mlflow import fill_mlflow, mlflow_service


@pytest.fixture(scope="session")
def mlflow(stores, tmp_path_factory):
    """What lies in the MLflow of the stores, which runs; it starts in 6 s, so only slow tests use it."""
    process = start(mlflow_service(stores), load_config(stores.home).stack_id)
    yield fill_mlflow(stores, tmp_path_factory.mktemp("mlflow"))
    process.terminate()
    process.wait()

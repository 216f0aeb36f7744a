"""Provide the real MLflow server to the tests of its gate and its pages."""

import pytest

from flows.stack.stack_config import load_config
from infra.object_store import open_object_store
from infra.settings import StoreAccess
from tests.conftest import start
from tests.infra.mlflow import fill_mlflow, make_mlflow_service


@pytest.fixture(scope="session")
def mlflow(stores, tmp_path_factory):
    """Start and fill the MLflow server of the stores; it takes 6 s to start, so only slow tests use it."""
    process = start(make_mlflow_service(stores), load_config(stores.home).stack_id)
    yield fill_mlflow(stores, tmp_path_factory.mktemp("mlflow"))
    process.terminate()
    process.wait()


@pytest.fixture
def bucket(stores):
    """Return MLflow's bucket, with the keeper's keys."""
    secrets = load_config(stores.home).secrets
    access = StoreAccess(
        s3_endpoint=stores.s3_endpoint,
        s3_access_key=secrets["s3_admin_access_key"],
        s3_secret_key=secrets["s3_admin_secret_key"],
    )
    return open_object_store(access, "mlflow")

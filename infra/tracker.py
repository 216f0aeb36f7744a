"""MLflow: runs and their metrics, registered versions, aliases, and who may read them."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from infra.settings import CONSUMER, TrackerAccess

MODEL_NAME = "yuan"
EXPERIMENT = "yuan"
IMPATIENT_S = 5


class Tracker:
    """The tracking server as the platform uses it; every call can be repeated."""

    def __init__(self, settings: TrackerAccess) -> None:
        self._url = settings.mlflow_url
        self._auth = (settings.mlflow_username, settings.mlflow_password.get_secret_value())
        # The client library knows no other way to be given an account.
        os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = self._auth
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        # Who asks again is the step; the library would do so for minutes, and what waits for it could not be ended.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"
        self._client = MlflowClient(settings.mlflow_url)

    @contextlib.contextmanager
    def impatiently(self) -> Iterator[None]:
        """Give up on a server that hangs after seconds, not minutes; for small requests of one that watches a run."""
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(IMPATIENT_S)
        try:
            yield
        finally:
            del os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]

    def start_run(self, name: str, tags: Mapping[str, str]) -> str:
        """Find or make the run with this name, and return its id."""
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None, "set_up makes the experiment"
        found = self._client.search_runs(
            [experiment.experiment_id], f"attributes.run_name = '{name}'", max_results=1, order_by=["start_time ASC"]
        )
        if found:
            return str(found[0].info.run_id)
        return str(self._client.create_run(experiment.experiment_id, run_name=name, tags=dict(tags)).info.run_id)

    def log(self, run_id: str, metrics: Iterable[Mapping[str, Any]], params: Mapping[str, Any] | None = None) -> None:
        """Send metric rows, each with its `step`, in one request a thousand; values of None are left out."""
        now = int(time.time() * 1000)
        points = [
            Metric(key, float(value), now, int(row["step"]))
            for row in metrics
            for key, value in row.items()
            if key != "step" and value is not None
        ]
        pairs = [Param(key, str(value)) for key, value in (params or {}).items()]
        self._client.log_batch(run_id, metrics=points[:1000], params=pairs)
        for start in range(1000, len(points), 1000):
            self._client.log_batch(run_id, metrics=points[start : start + 1000])

    def log_artifact(self, run_id: str, file: Path, folder: str | None = None) -> None:
        self._client.log_artifact(run_id, str(file), folder)

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        self._client.set_terminated(run_id, status)

    def register(self, run_id: str, folder: Path, tags: Mapping[str, str]) -> int:
        """Upload a model folder to a run and register it; the same run gives the same version again."""
        found = self._client.search_model_versions(f"name = '{MODEL_NAME}' and run_id = '{run_id}'")
        if found:
            return int(found[0].version)
        self._client.log_artifacts(run_id, str(folder), "model")
        made = self._client.create_model_version(MODEL_NAME, f"runs:/{run_id}/model", run_id, tags=dict(tags))
        return int(made.version)

    def _run_of(self, version: int) -> str:
        return str(self._client.get_model_version(MODEL_NAME, str(version)).run_id)

    def aliases(self) -> dict[str, int]:
        """Alias to version, as MLflow has it now."""
        found = self._client.get_registered_model(MODEL_NAME).aliases
        return {alias: int(version) for alias, version in found.items()}

    def set_alias(self, alias: str, version: int | None) -> None:
        """Point an alias at a version, or remove it."""
        if version is None:
            self._client.delete_registered_model_alias(MODEL_NAME, alias)
        else:
            self._client.set_registered_model_alias(MODEL_NAME, alias, str(version))

    def download(self, version: int, folder: Path) -> Path:
        """Fetch a version's model folder."""
        folder.mkdir(parents=True, exist_ok=True)
        return Path(self._client.download_artifacts(self._run_of(version), "model", str(folder)))

    def set_up(self, consumer_password: str) -> None:
        """Make the experiment, the registered model and the read-only consumer account with this password."""
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
        try:
            self._client.create_registered_model(MODEL_NAME)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self._account(CONSUMER, consumer_password)
        self._grant(CONSUMER, "registered_model", MODEL_NAME)
        self._grant(CONSUMER, "experiment", str(experiment_id))

    def _account(self, name: str, password: str) -> None:
        made = self._post("2.0/mlflow/users/create", {"username": name, "password": password})
        if not (made.status_code == 400 and "ALREADY_EXISTS" in made.text):
            made.raise_for_status()
            return
        url = f"{self._url}/api/2.0/mlflow/users/update-password"  # it may have been rotated since
        body = {"username": name, "password": password}
        httpx.patch(url, json=body, auth=self._auth, timeout=30).raise_for_status()

    def _grant(self, user: str, kind: str, name: str) -> None:
        body = {"username": user, "resource_type": kind, "resource_id": name, "permission": "READ"}
        done = self._post("3.0/mlflow/users/permissions/grant", body)
        if not (done.status_code == 400 and "ALREADY_EXISTS" in done.text):
            done.raise_for_status()

    def _post(self, path: str, body: dict[str, str]) -> httpx.Response:
        return httpx.post(f"{self._url}/api/{path}", json=body, auth=self._auth, timeout=30)

"""MLflow: runs and their metrics, registered versions, aliases, and who may read them.

A version keeps the number it was first registered under. MLflow never gives the number of a deleted version again, so a
version that is registered anew gets another number there, and a tag that says which version it is. Everything here
takes and gives the platform's numbers; what MLflow's aliases point at is for it to know.
"""

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

from infra.error_text import SafeMessageError
from infra.settings import TrackerAccess

REGISTERED_MODEL_NAME = "yuan"
EXPERIMENT_NAME = "yuan"
WORKSPACE_NAME = "default"  # MLflow's own, which always exists
READERS_ROLE = "readers"
SHORT_REQUEST_TIMEOUT_S = 5
VERSION_TAG = "cotrain.version"  # of what was registered anew: the version it is


class VersionLost(SafeMessageError, ValueError):
    """Somebody deleted a version from the registry, or its files from the registry's store."""


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
        self._versions: dict[int, int] = {}  # by MLflow's number; neither ever changes

    @contextlib.contextmanager
    def use_short_timeout(self) -> Iterator[None]:
        """Give up on a server that hangs after seconds, not minutes; for small requests of one that watches a run."""
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(SHORT_REQUEST_TIMEOUT_S)
        try:
            yield
        finally:
            del os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]

    def start_run(self, name: str, tags: Mapping[str, str]) -> str:
        """Find or make the run with this name, and return its id."""
        experiment = self._client.get_experiment_by_name(EXPERIMENT_NAME)
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

    def log_text(self, run_id: str, name: str, text: str) -> None:
        """Store a text as an artifact of a run, under a name that may have folders."""
        self._client.log_text(run_id, text, name)

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        self._client.set_terminated(run_id, status)

    def register_version(self, run_id: str, folder: Path, tags: Mapping[str, str], version: int | None = None) -> int:
        """Upload a model folder to a run and register it; the same run gives the same version again.

        Args:
            version: the number that a lost version had, which it keeps.

        Returns:
            The version: the one given, or the number that MLflow gives a new one.
        """
        found = self._client.search_model_versions(f"name = '{REGISTERED_MODEL_NAME}' and run_id = '{run_id}'")
        if found:
            return self._get_version(int(found[0].version))
        if self._client.get_run(run_id).info.lifecycle_stage == "deleted":
            self._client.restore_run(run_id)
        self._client.log_artifacts(run_id, str(folder), "model")
        # By the run's own address, not `runs:/`: the server cannot show artifacts of a version that has the latter.
        source = f"{self._client.get_run(run_id).info.artifact_uri}/model"
        kept = {} if version is None else {VERSION_TAG: str(version)}
        made = self._client.create_model_version(REGISTERED_MODEL_NAME, source, run_id, tags={**tags, **kept})
        return int(made.version) if version is None else version

    def has_version(self, version: int) -> bool:
        """Whether a version is in the registry; its files may be gone all the same, see `missing`."""
        return self._find_number(version) is not None

    def find_missing_files(self, version: int, names: Iterable[str]) -> list[str]:
        """Return which of a version's files, by their names, are not in the registry's store, or empty there.

        Raises:
            VersionLost: if the version is gone from the registry.
        """
        run = self._client.get_model_version(REGISTERED_MODEL_NAME, str(self._require_number(version))).run_id
        stored = {Path(one.path).name for one in self._client.list_artifacts(run, "model") if one.file_size}
        return sorted(set(names) - stored)

    def require_version(self, version: int) -> None:
        """Check that a version can be fetched.

        Raises:
            VersionLost: if the version or its files are gone from the registry.
        """
        if self.find_missing_files(version, ("manifest.json",)):
            raise VersionLost(f"the files of v{version} are gone; `cotrain doctor` says how to register it again")

    def upload_version(self, version: int, folder: Path) -> None:
        """Store a version's files anew; those that are there are replaced."""
        run = self._client.get_model_version(REGISTERED_MODEL_NAME, str(self._require_number(version))).run_id
        self._client.log_artifacts(run, str(folder), "model")

    def _find_number(self, version: int) -> int | None:
        """MLflow's number of a version; None if it is not in the registry."""
        tagged = self._client.search_model_versions(
            f"name = '{REGISTERED_MODEL_NAME}' and tags.`{VERSION_TAG}` = '{version}'"
        )
        if tagged:
            return max(int(one.version) for one in tagged)
        try:
            own = self._client.get_model_version(REGISTERED_MODEL_NAME, str(version))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return version if own.tags.get(VERSION_TAG, str(version)) == str(version) else None

    def _get_version(self, number: int) -> int:
        """The version that MLflow has under a number."""
        if number not in self._versions:
            tags = self._client.get_model_version(REGISTERED_MODEL_NAME, str(number)).tags
            self._versions[number] = int(tags.get(VERSION_TAG, number))
        return self._versions[number]

    def _require_number(self, version: int) -> int:
        number = self._find_number(version)
        if number is None:
            raise VersionLost(f"v{version} is gone from the registry; `cotrain doctor` says how to register it again")
        return number

    def read_aliases(self) -> dict[str, int]:
        """Alias to version, as MLflow has it now."""
        found = self._client.get_registered_model(REGISTERED_MODEL_NAME).aliases
        return {alias: self._get_version(int(number)) for alias, number in found.items()}

    def set_alias(self, alias: str, version: int | None) -> None:
        """Point an alias at a version, or remove it.

        Raises:
            VersionLost: if the version is gone from the registry.
        """
        if version is None:
            self._client.delete_registered_model_alias(REGISTERED_MODEL_NAME, alias)
        else:
            self._client.set_registered_model_alias(REGISTERED_MODEL_NAME, alias, str(self._require_number(version)))

    def download(self, version: int, folder: Path) -> Path:
        """Fetch a version's model folder.

        Raises:
            VersionLost: if the version or its files are gone from the registry.
        """
        self.require_version(version)
        run = self._client.get_model_version(REGISTERED_MODEL_NAME, str(self._require_number(version))).run_id
        folder.mkdir(parents=True, exist_ok=True)
        return Path(self._client.download_artifacts(run, "model", str(folder)))

    def set_up(self, readers: Mapping[str, str]) -> None:
        """Make the experiment, the registered model, and the accounts that read both, with role.

        Args:
            readers: their passwords by their names.
        """
        experiment = self._client.get_experiment_by_name(EXPERIMENT_NAME)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT_NAME)
        # Else the pages take an experiment for one of traces, and open it with charts of nothing.
        self._client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        try:
            self._client.create_registered_model(REGISTERED_MODEL_NAME)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for name, password in readers.items():
            self._ensure_account(name, password)
            self._grant_read(name, "registered_model", REGISTERED_MODEL_NAME)
            self._grant_read(name, "experiment", str(experiment_id))
            self._assign_role(name)

    def _ensure_account(self, name: str, password: str) -> None:
        """Make an account, or give the one that is there the password of the settings, which may have changed."""
        body = {"username": name, "password": password}
        self._post_if_missing("2.0/mlflow/users/create", body)
        users = f"{self._url}/api/2.0/mlflow/users"
        if httpx.get(f"{users}/current", auth=(name, password), timeout=30).status_code == 401:
            httpx.patch(f"{users}/update-password", json=body, auth=self._auth, timeout=30).raise_for_status()

    def _grant_read(self, user: str, kind: str, name: str) -> None:
        body = {"username": user, "resource_type": kind, "resource_id": name, "permission": "READ"}
        self._post_if_missing("3.0/mlflow/users/permissions/grant", body)

    def _assign_role(self, user: str) -> None:
        """Give an account a role without permissions, since MLflow lists only workspaces in which it has a role."""
        self._post_if_missing("3.0/mlflow/roles/create", {"workspace": WORKSPACE_NAME, "name": READERS_ROLE})
        url = f"{self._url}/api/3.0/mlflow/roles/list"
        found = httpx.get(url, params={"workspace": WORKSPACE_NAME}, auth=self._auth, timeout=30).raise_for_status()
        role_id = next(role["id"] for role in found.json()["roles"] if role["name"] == READERS_ROLE)
        self._post_if_missing("3.0/mlflow/roles/assign", {"username": user, "role_id": role_id})

    def _post_if_missing(self, path: str, body: dict[str, Any]) -> None:
        """Make something in MLflow that may be there already."""
        made = httpx.post(f"{self._url}/api/{path}", json=body, auth=self._auth, timeout=30)
        if not (made.status_code == 400 and "ALREADY_EXISTS" in made.text):
            made.raise_for_status()

"""Record runs, metrics, registered versions, aliases and read permissions in MLflow.

A version keeps its first number. MLflow never reuses the number of a deleted version, so a version that is registered
again gets another number in MLflow, and a tag with the platform's number. All functions here take and return the
platform's numbers; only this module converts them to MLflow's.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import httpx
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from infra.artifact_server import ArtifactServer
from infra.artifact_transfer import ArtifactSource, ArtifactTransfer, CountBytes, DamagedArtifact, ignore_bytes
from infra.error_text import SafeMessageError
from infra.files import open_regular
from infra.settings import TrackerAccess

REGISTERED_MODEL_NAME = "yuan"
EXPERIMENT_NAME = "yuan"
WORKSPACE_NAME = "default"  # MLflow's own, which always exists
READERS_ROLE = "readers"
SHORT_REQUEST_TIMEOUT_S = 5
MLFLOW_ADMIN_TIMEOUT_S = 30  # of a request that creates or changes accounts and roles
MAX_METRICS_PER_REQUEST = 1000  # the server's limit
VERSION_TAG = "cotrain.version"  # on a version that was registered again: the platform's number
ROUND_TAG = "cotrain.round"  # on a version: the id of the round that produced it
LOST_VERSION_FIX = "`cotrain doctor` says how to register it again"
ARTIFACT_FOLDER = "model"  # of a version's files, in the artifacts of MLflow's run
ARTIFACT_URI_SCHEME = "mlflow-artifacts:"
UPLOAD_RECORDS_FOLDER = "work/uploads"  # below the home folder: records of uploads that were interrupted
# On a version of weights that no round trained: what the operator named, and the sha256 over the files that were read.
SOURCE_TAG = "cotrain.source"
LICENCE_TAG = "cotrain.licence"
DIGEST_TAG = "cotrain.digest"
RUN_TAG = "cotrain.run"  # on a version and on MLflow's run: the id of the platform's training run


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a training step by name; None for a value that is not known."""

    step: int
    values: Mapping[str, float | None]


class VersionLost(SafeMessageError, ValueError):
    """Report that a version was deleted from the registry, or its files from the registry's store."""


@dataclass(frozen=True)
class VersionFiles:
    """The stored files of a version.

    Attributes:
        sizes: bytes by the file's name.
    """

    version: int
    folder: str
    sizes: Mapping[str, int]
    transfer: ArtifactTransfer

    def fetch(self, name: str, target: Path, sha256: str | None) -> None:
        """Fetch a file; an interrupted fetch is resumed by the next call, and a complete target is kept.

        Raises:
            VersionLost: if there is no such file, or its sha256 differs.
            OSError: if the disk has too little room; the message has the bytes.
            httpx.HTTPError: if the server or the store fails.
        """
        if name not in self.sizes:
            raise VersionLost(f"{name} of v{self.version} is missing in the registry's store; {LOST_VERSION_FIX}")
        try:
            self.transfer.download(f"{self.folder}/{name}", target, self.sizes[name], sha256)
        except DamagedArtifact as error:
            raise VersionLost(f"{name} of v{self.version}: {error}; {LOST_VERSION_FIX}") from None


class Tracker:
    """Call the tracking server; every method can be repeated.

    Attributes:
        client: MLflow's client, for calls that have no method here.
    """

    def __init__(self, settings: TrackerAccess) -> None:
        self._url = settings.mlflow_url
        self._auth = (settings.mlflow_username, settings.mlflow_password.get_secret_value())
        # The client library reads its account from the environment only.
        os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = self._auth
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        # Else the library prints an address on stdout when a run ends, beside a command's JSON.
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        # Retries belong to the calling step; the library would retry for minutes, and block the process meanwhile.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"
        self.client = MlflowClient(settings.mlflow_url)
        self._server = ArtifactServer(settings.mlflow_url, self._auth)
        self.transfer = ArtifactTransfer(
            self._server, settings.registry_transfer, settings.home / UPLOAD_RECORDS_FOLDER
        )
        self._versions: dict[int, int] = {}  # by MLflow's number; neither ever changes

    @contextlib.contextmanager
    def use_short_timeout(self) -> Iterator[None]:
        """Time out after seconds, not minutes, while the block runs; for small requests of a supervisor."""
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(SHORT_REQUEST_TIMEOUT_S)
        try:
            yield
        finally:
            del os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]

    def start_run(self, name: str, tags: Mapping[str, str]) -> str:
        """Find or create MLflow's run with this name, and return its id."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT_NAME)
        assert experiment is not None, "set_up creates the experiment"
        runs = self.client.search_runs(
            [experiment.experiment_id], f"attributes.run_name = '{name}'", max_results=1, order_by=["start_time ASC"]
        )
        if runs:
            return str(runs[0].info.run_id)
        return str(self.client.create_run(experiment.experiment_id, run_name=name, tags=dict(tags)).info.run_id)

    def log(
        self,
        mlflow_run_id: str,
        metrics: Iterable[StepMetrics],
        params: Mapping[str, object] | None = None,
    ) -> None:
        """Send the metrics of steps, up to MAX_METRICS_PER_REQUEST at once; skip values of None."""
        now_ms = int(time.time() * 1000)
        points = [
            Metric(name, float(value), now_ms, step_metrics.step)
            for step_metrics in metrics
            for name, value in step_metrics.values.items()
            if value is not None
        ]
        pairs = [Param(key, str(value)) for key, value in (params or {}).items()]
        self.client.log_batch(mlflow_run_id, metrics=points[:MAX_METRICS_PER_REQUEST], params=pairs)
        for start in range(MAX_METRICS_PER_REQUEST, len(points), MAX_METRICS_PER_REQUEST):
            self.client.log_batch(mlflow_run_id, metrics=points[start : start + MAX_METRICS_PER_REQUEST])

    def log_text(self, mlflow_run_id: str, name: str, text: str) -> None:
        """Store a text as an artifact of MLflow's run; the name may be a path with folders."""
        self.client.log_text(mlflow_run_id, text, name)

    def end_run(self, mlflow_run_id: str, status: str = "FINISHED") -> None:
        self.client.set_terminated(mlflow_run_id, status)

    def register_version(
        self,
        mlflow_run_id: str,
        folder: Path,
        tags: Mapping[str, str],
        version: int | None = None,
        on_bytes: CountBytes = ignore_bytes,
    ) -> int:
        """Upload the files of a folder and register them; see `register_files`, and `ArtifactSource` for `on_bytes`."""
        return self.register_files(mlflow_run_id, list_sources(folder, on_bytes), tags, version)

    def register_files(
        self,
        mlflow_run_id: str,
        sources: Sequence[ArtifactSource],
        tags: Mapping[str, str],
        version: int | None = None,
    ) -> int:
        """Upload files to MLflow's run and register them; a repeated call for the run returns the same version.

        After an interruption, a repeated call sends only the missing parts of the files.

        Args:
            version: the number of a lost version that is registered again; it keeps this number.

        Returns:
            `version` if it is given, else the number that MLflow assigns.

        Raises:
            DamagedArtifact: if a file does not have its source's sha256; nothing is registered.
        """
        registered = self.client.search_model_versions(
            f"name = '{REGISTERED_MODEL_NAME}' and run_id = '{mlflow_run_id}'"
        )
        if registered:
            return self._get_version(int(registered[0].version))
        if self.client.get_run(mlflow_run_id).info.lifecycle_stage == "deleted":
            self.client.restore_run(mlflow_run_id)
        artifact_folder = self._find_artifact_folder(mlflow_run_id)
        for source in sources:
            self.transfer.upload(artifact_folder, source)
        # The run's artifact URI and not `runs:/...`: the server cannot show artifacts of a version with the latter.
        artifact_uri = f"{self.client.get_run(mlflow_run_id).info.artifact_uri}/{ARTIFACT_FOLDER}"
        version_tag = {} if version is None else {VERSION_TAG: str(version)}
        created = self.client.create_model_version(
            REGISTERED_MODEL_NAME, artifact_uri, mlflow_run_id, tags={**tags, **version_tag}
        )
        self.transfer.forget_uploads([f"{artifact_folder}/{source.name}" for source in sources])
        return int(created.version) if version is None else version

    def has_version(self, version: int) -> bool:
        """Return True if a version is in the registry; its files may still be missing, see `find_missing_files`."""
        return self._find_number(version) is not None

    def find_missing_files(self, version: int, names: Iterable[str]) -> list[str]:
        """Return the names of a version's files that are missing or empty in the registry's store.

        Raises:
            VersionLost: if the version is not in the registry.
        """
        stored = {name for name, size in self.read_file_sizes(version).items() if size}
        return sorted(set(names) - stored)

    def require_files(self, version: int, names: Iterable[str]) -> None:
        """Check that a version has these files and so can be downloaded.

        Raises:
            VersionLost: if the version or one of the files is not in the registry.
        """
        if self.find_missing_files(version, names):
            raise VersionLost(f"the files of v{version} are missing; {LOST_VERSION_FIX}")

    def upload_version(self, version: int, folder: Path, on_bytes: CountBytes = ignore_bytes) -> None:
        """Upload the files of a folder as a version's files again; replace existing ones."""
        self.upload_files(version, list_sources(folder, on_bytes))

    def upload_files(self, version: int, sources: Sequence[ArtifactSource]) -> None:
        """Upload a version's files again; replace existing ones."""
        artifact_folder = self._find_artifact_folder(self._find_mlflow_run_id(version))
        for source in sources:
            self.transfer.upload(artifact_folder, source)
        self.transfer.forget_uploads([f"{artifact_folder}/{source.name}" for source in sources])

    def read_file_sizes(self, version: int) -> dict[str, int]:
        """Return the bytes of each stored file of a version, by name.

        Raises:
            VersionLost: if the version is not in the registry.
        """
        entries = self.client.list_artifacts(self._find_mlflow_run_id(version), ARTIFACT_FOLDER)
        return {Path(entry.path).name: int(entry.file_size or 0) for entry in entries if not entry.is_dir}

    def delete_files(self, version: int, names: Iterable[str]) -> None:
        """Delete files of a version from the registry's store; the version stays registered.

        Raises:
            VersionLost: if the version is not in the registry.
        """
        folder = self._find_artifact_folder(self._find_mlflow_run_id(version))
        for name in names:
            self._server.delete(f"{folder}/{name}")

    def _find_artifact_folder(self, mlflow_run_id: str) -> str:
        """Return the path of a run's model folder in the artifact store.

        Raises:
            ValueError: if the run's artifacts do not pass through the tracking server.
        """
        uri = str(self.client.get_run(mlflow_run_id).info.artifact_uri)
        if not uri.startswith(ARTIFACT_URI_SCHEME):
            raise ValueError(
                f"the artifacts of MLflow's run {mlflow_run_id} must be at {ARTIFACT_URI_SCHEME}/..., got {uri}; start "
                "MLflow with --serve-artifacts and --artifacts-destination"
            )
        return f"{urlsplit(uri).path.strip('/')}/{ARTIFACT_FOLDER}"

    def _find_mlflow_run_id(self, version: int) -> str:
        """Return the id of MLflow's run that has a version's files.

        Raises:
            VersionLost: if the version is not in the registry.
        """
        return str(self.client.get_model_version(REGISTERED_MODEL_NAME, str(self.require_number(version))).run_id)

    def _find_number(self, version: int) -> int | None:
        """Return MLflow's number of a version; None if the version is not in the registry."""
        tagged = self.client.search_model_versions(
            f"name = '{REGISTERED_MODEL_NAME}' and tags.`{VERSION_TAG}` = '{version}'"
        )
        if tagged:
            return max(int(entry.version) for entry in tagged)
        try:
            entry = self.client.get_model_version(REGISTERED_MODEL_NAME, str(version))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return version if entry.tags.get(VERSION_TAG, str(version)) == str(version) else None

    def _get_version(self, number: int) -> int:
        """Return the platform's number of the version that MLflow has under `number`."""
        if number not in self._versions:
            tags = self.client.get_model_version(REGISTERED_MODEL_NAME, str(number)).tags
            self._versions[number] = int(tags.get(VERSION_TAG, number))
        return self._versions[number]

    def require_number(self, version: int) -> int:
        """Return MLflow's number of a version.

        Raises:
            VersionLost: if the version is not in the registry.
        """
        number = self._find_number(version)
        if number is None:
            raise VersionLost(f"v{version} is missing from the registry; {LOST_VERSION_FIX}")
        return number

    def read_aliases(self) -> dict[str, int]:
        """Read the current version of each alias from MLflow."""
        number_by_alias = self.client.get_registered_model(REGISTERED_MODEL_NAME).aliases
        return {alias: self._get_version(int(number)) for alias, number in number_by_alias.items()}

    def set_alias(self, alias: str, version: int | None) -> None:
        """Point an alias at a version, or remove the alias if the version is None.

        Raises:
            VersionLost: if the version is not in the registry.
        """
        if version is None:
            self.client.delete_registered_model_alias(REGISTERED_MODEL_NAME, alias)
        else:
            self.client.set_registered_model_alias(REGISTERED_MODEL_NAME, alias, str(self.require_number(version)))

    def open_files(self, version: int, required: Iterable[str]) -> VersionFiles:
        """Return the stored files of a version, which can then be fetched one by one.

        Args:
            required: names of files without which the version counts as lost.

        Raises:
            VersionLost: if the version or a required file is not in the registry.
        """
        self.require_files(version, required)
        folder = self._find_artifact_folder(self._find_mlflow_run_id(version))
        return VersionFiles(version, folder, self.read_file_sizes(version), self.transfer)

    def set_up(self, readers: Mapping[str, str]) -> None:
        """Create the experiment, the registered model, and the accounts that may read both, each with the role.

        Args:
            readers: password by account name.
        """
        experiment = self.client.get_experiment_by_name(EXPERIMENT_NAME)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(EXPERIMENT_NAME)
        # Without this tag, MLflow's pages treat the experiment as one of traces, and show empty charts.
        self.client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        try:
            self.client.create_registered_model(REGISTERED_MODEL_NAME)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for name, password in readers.items():
            self._ensure_account(name, password)
            self._grant_read(name, "registered_model", REGISTERED_MODEL_NAME)
            self._grant_read(name, "experiment", str(experiment_id))
            self._assign_role(name)

    def _ensure_account(self, name: str, password: str) -> None:
        """Create an account, or update an existing one's password to that of the settings, which may have changed."""
        body = {"username": name, "password": password}
        self._post_if_missing("2.0/mlflow/users/create", body)
        users = f"{self._url}/api/2.0/mlflow/users"
        login = httpx.get(f"{users}/current", auth=(name, password), timeout=MLFLOW_ADMIN_TIMEOUT_S)
        if login.status_code == 401:
            url = f"{users}/update-password"
            httpx.patch(url, json=body, auth=self._auth, timeout=MLFLOW_ADMIN_TIMEOUT_S).raise_for_status()

    def _grant_read(self, user: str, kind: str, name: str) -> None:
        body = {"username": user, "resource_type": kind, "resource_id": name, "permission": "READ"}
        self._post_if_missing("3.0/mlflow/users/permissions/grant", body)

    def _assign_role(self, user: str) -> None:
        """Assign a role without permissions, since MLflow lists a workspace only to accounts with a role in it."""
        self._post_if_missing("3.0/mlflow/roles/create", {"workspace": WORKSPACE_NAME, "name": READERS_ROLE})
        url = f"{self._url}/api/3.0/mlflow/roles/list"
        workspace = {"workspace": WORKSPACE_NAME}
        response = httpx.get(url, params=workspace, auth=self._auth, timeout=MLFLOW_ADMIN_TIMEOUT_S).raise_for_status()
        role_id = next(role["id"] for role in response.json()["roles"] if role["name"] == READERS_ROLE)
        self._post_if_missing("3.0/mlflow/roles/assign", {"username": user, "role_id": role_id})

    def _post_if_missing(self, path: str, body: dict[str, Any]) -> None:
        """Create an object in MLflow; do nothing if it exists."""
        response = httpx.post(f"{self._url}/api/{path}", json=body, auth=self._auth, timeout=MLFLOW_ADMIN_TIMEOUT_S)
        if not (response.status_code == 400 and "ALREADY_EXISTS" in response.text):
            response.raise_for_status()


def list_sources(folder: Path, on_bytes: CountBytes = ignore_bytes) -> list[ArtifactSource]:
    """List the regular files of a folder as sources, in the order of their names."""

    def make_source(file: Path) -> ArtifactSource:
        def open_source() -> BinaryIO:
            return os.fdopen(open_regular(file), "rb")

        return ArtifactSource(file.name, open_source, on_bytes=on_bytes)

    return [make_source(file) for file in sorted(folder.iterdir()) if file.is_file()]

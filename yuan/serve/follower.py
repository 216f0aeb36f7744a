"""Serve the version of a registry alias, from a local cache if the registry is down or has lost the version."""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from yuan.model.weights import load, load_tokenizer, verify_folder
from yuan.safe_files import replace_file_below, replace_folder
from yuan.serve.request import ServedModel
from yuan.serve.service import SHORT_RETRY_AFTER_S, AbsenceReason, ModelService

log = logging.getLogger(__name__)

ALIAS_POLL_INTERVAL_S = 1.0
# Backoff for a version that cannot be fetched or loaded, so that a large one is not downloaded every second.
LOAD_RETRY_S = 5.0
MAX_LOAD_RETRY_S = 60.0
LOAD_FAILURE_RETRY_AFTER_S = 60  # for callers, while the registry or the version cannot be read
MAX_CACHED_VERSIONS = 3
NO_VERSION_MESSAGE = "no model is in service yet: no version has been promoted; the first training round produces one"
LAST_VERSION_FILE = "last.json"


class VersionCache:
    """Cache downloaded model folders, verified before each use, and record the version that was served last."""

    def __init__(self, folder: Path, download: Callable[[int, Path], object]) -> None:
        self._folder, self._download = folder, download
        folder.mkdir(parents=True, exist_ok=True)
        for partial_download in folder.glob(".v*"):
            shutil.rmtree(partial_download, ignore_errors=True)

    def load(self, version: int) -> ServedModel:
        """Load a version; download it first if the cache has no complete copy.

        Raises:
            Exception: any error of the registry, or of a folder that is not a model.
        """
        folder = self._folder / f"v{version}"
        if not self._is_whole(folder):
            self._fetch(version, folder)
        model = folder / "model"
        return ServedModel(load(model), load_tokenizer(model), version)

    def _is_whole(self, folder: Path) -> bool:
        try:
            verify_folder(folder / "model")
        except ValueError as error:
            if folder.exists():
                log.warning("downloading a damaged cache folder again: %s", error)
            return False
        return True

    def _fetch(self, version: int, folder: Path) -> None:
        with replace_folder(folder) as scratch:
            self._download(version, scratch)
            verify_folder(scratch / "model")

    def read_last_version(self) -> int | None:
        """Return the version that was served last; None if there was none, or the record is not readable."""
        try:
            return int(json.loads((self._folder / LAST_VERSION_FILE).read_text())["version"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def record_served(self, version: int) -> None:
        """Record the version that is served, and delete all cached versions except the most recently used three."""
        replace_file_below(self._folder, LAST_VERSION_FILE, json.dumps({"version": version}).encode())
        os.utime(self._folder / f"v{version}")
        folders = sorted(self._folder.glob("v*"), key=lambda path: path.stat().st_mtime)
        for old_folder in folders[:-MAX_CACHED_VERSIONS]:
            shutil.rmtree(old_folder, ignore_errors=True)


class AliasFollower:
    """Keep the version of an alias in service; if it cannot be loaded, the previous version stays in service.

    `ready` is set once a model is in service, or the first check of the alias has found none.
    """

    def __init__(
        self, aliases: Callable[[], dict[str, int]], alias: str, versions: VersionCache, service: ModelService
    ) -> None:
        self._aliases = aliases
        self._alias = alias
        self._versions = versions
        self._service = service
        self.ready = threading.Event()
        self._last_problem: str | None = None
        self._unusable_version = 0
        self._retry_at = 0.0
        self._pause_s = LOAD_RETRY_S

    def follow(self) -> None:
        """Serve the last version, then poll the alias without end."""
        self.resume()
        while True:
            self.check_alias()
            self.ready.set()
            time.sleep(ALIAS_POLL_INTERVAL_S)

    def resume(self) -> None:
        """Serve the last version from the cache, which needs no registry."""
        version = self._versions.read_last_version()
        if version is not None:
            self._serve_version(version, "the version served last")

    def check_alias(self) -> None:
        """Check the alias once, and put its version into service; log a problem once, when it first occurs."""
        try:
            version = self._aliases().get(self._alias)
        except Exception as error:  # many libraries raise here; no error may end this thread
            self._explain_absence(
                "no model is in service yet: the registry does not respond; retry in a minute",
                LOAD_FAILURE_RETRY_AFTER_S,
            )
            return self._log_problem("the registry does not respond", error)
        served = self._service.served
        if version is None:
            self._explain_absence(NO_VERSION_MESSAGE, None)
            return self._log_problem(f"the registry has no alias {self._alias}")
        if served is None or served.version != version:
            return self._serve_version(version, f"alias {self._alias}")
        self._log_problem(None)

    def _serve_version(self, version: int, reason: str) -> None:
        if version == self._unusable_version and time.monotonic() < self._retry_at:
            return
        self._service.absence_reason = AbsenceReason(
            message=f"v{version} is being loaded; retry in a few seconds", retry_after_s=SHORT_RETRY_AFTER_S
        )
        try:
            self._service.swap_in(self._versions.load(version))
        except Exception as error:
            self._service.absence_reason = AbsenceReason(
                message=f"v{version} cannot be loaded; retry in a minute, and tell the operator if the error persists",
                retry_after_s=LOAD_FAILURE_RETRY_AFTER_S,
            )
            is_repeated = version == self._unusable_version
            self._pause_s = min(2 * self._pause_s, MAX_LOAD_RETRY_S) if is_repeated else LOAD_RETRY_S
            self._unusable_version, self._retry_at = version, time.monotonic() + self._pause_s
            return self._log_problem(f"v{version}, {reason}, cannot be served", error)
        self.ready.set()
        log.info("v%d is in service: %s", version, reason)
        self._unusable_version, self._last_problem = 0, None
        try:
            self._versions.record_served(version)
        except OSError as error:
            log.warning("cannot record v%d as the last version, so a restart needs the registry: %s", version, error)

    def _explain_absence(self, message: str, retry_after_s: int | None) -> None:
        """Set the reason that callers get; keep an earlier reason that names a version that cannot be loaded."""
        if not self._unusable_version:
            self._service.absence_reason = AbsenceReason(message=message, retry_after_s=retry_after_s)

    def _log_problem(self, problem: str | None, error: Exception | None = None) -> None:
        """Log a problem once when it starts and once when it ends.

        Problems are compared without the error's text, since that can differ each time, for example in addresses.
        """
        problem_key = problem and f"{problem} ({type(error).__name__})"
        if problem_key == self._last_problem:
            return
        self._last_problem = problem_key
        served = self._service.served
        state = f"v{served.version} stays in service" if served else "no model is in service"
        if problem is None:
            log.info("alias %s can be followed again; %s", self._alias, state)
        else:
            log.warning("%s; %s%s", problem, state, f": {str(error)[:200]}" if error else "")

"""Follow an alias of the registry, and go on with what is here when the registry is away or has lost a version."""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from yuan.model.weights import load, load_tokenizer, verify_folder
from yuan.serve.request import ServedModel
from yuan.serve.service import SHORT_RETRY_AFTER_S, ModelService

log = logging.getLogger(__name__)

ALIAS_POLL_INTERVAL_S = 1.0
LOAD_RETRY_S, MAX_LOAD_RETRY_S = (
    5.0,
    60.0,
)  # a version that cannot be fetched or loaded; a big one is not fetched every second
MAX_CACHED_VERSIONS = 3
NO_VERSION_MESSAGE = (
    "no model is in service yet: no version has been promoted; there are answers once the first round has made one"
)
LAST_VERSION_FILE = "last.json"


class VersionCache:
    """Model folders that were fetched, checked before each use, and the memory of which was served last."""

    def __init__(self, folder: Path, download: Callable[[int, Path], object]) -> None:
        self._folder, self._download = folder, download
        folder.mkdir(parents=True, exist_ok=True)
        for cut_short in folder.glob(".v*"):
            shutil.rmtree(cut_short, ignore_errors=True)

    def load(self, version: int) -> ServedModel:
        """Load a version, fetched first if it is not here whole.

        Raises:
            Exception: whatever the registry or a folder that is no model raises.
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
                log.warning("a folder of the cache is fetched again: %s", error)
            return False
        return True

    def _fetch(self, version: int, folder: Path) -> None:
        scratch = self._folder / f".v{version}"
        shutil.rmtree(scratch, ignore_errors=True)
        self._download(version, scratch)
        verify_folder(scratch / "model")
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)

    def read_last_version(self) -> int | None:
        """The version that was served last; None if none was, or that is not known."""
        try:
            return int(json.loads((self._folder / LAST_VERSION_FILE).read_text())["version"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def record_served(self, version: int) -> None:
        """Note the version that is served, and delete all but the newest used."""
        scratch = self._folder / f".{LAST_VERSION_FILE}"
        scratch.write_text(json.dumps({"version": version}))
        scratch.replace(self._folder / LAST_VERSION_FILE)
        os.utime(self._folder / f"v{version}")
        folders = sorted(self._folder.glob("v*"), key=lambda path: path.stat().st_mtime)
        for old in folders[:-MAX_CACHED_VERSIONS]:
            shutil.rmtree(old, ignore_errors=True)


class AliasFollower:
    """Keeps the model of an alias in service; what cannot be had leaves the one before there.

    `began` is set once a model is in service, or the first look at the alias has brought none.
    """

    def __init__(
        self, aliases: Callable[[], dict[str, int]], alias: str, versions: VersionCache, service: ModelService
    ) -> None:
        self._aliases, self._alias, self._versions, self._service = aliases, alias, versions, service
        self.began = threading.Event()
        self._last_problem: str | None = None
        self._retry_at, self._pause_s, self._unusable_version = 0.0, LOAD_RETRY_S, 0

    def follow(self) -> None:
        """Begin with the version served last, and look for another for ever."""
        self.resume()
        while True:
            self.check_alias()
            self.began.set()
            time.sleep(ALIAS_POLL_INTERVAL_S)

    def resume(self) -> None:
        """Serve the version served last from its folder, whether or not the registry answers or still has it."""
        version = self._versions.read_last_version()
        if version is not None:
            self._serve_version(version, "the version served last")

    def check_alias(self) -> None:
        """Look once at the alias, and put its version into service; what is in the way is logged once."""
        try:
            version = self._aliases().get(self._alias)
        except Exception as error:  # of many libraries; none of them may end this thread
            self._explain_absence("no model is in service yet: the registry does not answer; repeat in a minute", 60)
            return self._log_problem("the registry cannot be asked", error)
        served = self._service.served
        if version is None:
            self._explain_absence(NO_VERSION_MESSAGE, None)
            return self._log_problem(f"the registry has no alias {self._alias}")
        if served is None or served.version != version:
            return self._serve_version(version, f"alias {self._alias}")
        self._log_problem(None)

    def _serve_version(self, version: int, why: str) -> None:
        if version == self._unusable_version and time.monotonic() < self._retry_at:
            return
        self._service.absence_reason = (f"v{version} is being loaded; repeat in a few seconds", SHORT_RETRY_AFTER_S)
        try:
            self._service.swap_in(self._versions.load(version))
        except Exception as error:
            said = (
                f"v{version} cannot be loaded; it is tried again, repeat in a minute and tell the operator if it stays"
            )
            self._service.absence_reason = (said, 60)
            self._pause_s = (
                min(2 * self._pause_s, MAX_LOAD_RETRY_S) if version == self._unusable_version else LOAD_RETRY_S
            )
            self._unusable_version, self._retry_at = version, time.monotonic() + self._pause_s
            return self._log_problem(f"v{version}, {why}, cannot be served", error)
        self.began.set()
        log.info("v%d is in service: %s", version, why)
        self._unusable_version, self._last_problem = 0, None
        try:
            self._versions.record_served(version)
        except OSError as error:
            log.warning("v%d would not be served after a restart without the registry: %s", version, error)

    def _explain_absence(self, message: str, retry_after_s: int | None) -> None:
        """Let callers be told why there is no model; that a version which is known cannot be loaded says more."""
        if not self._unusable_version:
            self._service.absence_reason = (message, retry_after_s)

    def _log_problem(self, problem: str | None, error: Exception | None = None) -> None:
        """Log a problem when it comes up, and that it is over; not again while it stays, with whatever addresses."""
        said = problem and f"{problem} ({type(error).__name__})"
        if said == self._last_problem:
            return
        self._last_problem = said
        served = self._service.served
        now = f"v{served.version} stays in service" if served else "nothing is in service"
        if problem is None:
            log.info("alias %s can be followed again; %s", self._alias, now)
        else:
            log.warning("%s; %s%s", problem, now, f": {str(error)[:200]}" if error else "")

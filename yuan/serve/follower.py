"""Serve the version of a registry alias, from the cache if the registry is down or has lost the version."""

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from yuan.generate.placement import ModelPlacement
from yuan.model.weights import load_tokenizer
from yuan.safe_files import replace_file_below
from yuan.serve.request import ServedModel
from yuan.serve.service import SHORT_RETRY_AFTER_S, ModelService
from yuan.version_names import NO_VERSION_MESSAGE

log = logging.getLogger(__name__)

ALIAS_POLL_INTERVAL_S = 1.0
# Backoff for a version that cannot be fetched or loaded, so that a large one is not downloaded every second.
LOAD_RETRY_S = 5.0
MAX_LOAD_RETRY_S = 60.0
LOAD_FAILURE_RETRY_AFTER_S = 60  # for callers, while the registry or the version cannot be read
MAX_SERVING_PROBLEM_CHARACTERS = 300
SWAP_RETRY_S = 600.0  # for a version for which another one leaves
SWAP_DRAIN_TIMEOUT_S = 120.0  # longer than one request may take


class VersionNotReady(Exception):
    """Report that a version is being fetched by another process; it will be in the cache later."""


class OpenedVersion(Protocol):
    """A model folder with verified files, which stays in the cache until it is closed."""

    @property
    def path(self) -> Path: ...

    def close(self) -> None: ...


class LastVersion:
    """Record the version that was served last, so that a restart needs no registry."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> int | None:
        """Return the version; None if there was none, or the record is not readable."""
        try:
            return int(json.loads(self._file.read_text())["version"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def record(self, version: int) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        replace_file_below(self._file.parent, self._file.name, json.dumps({"version": version}).encode())


class AliasFollower:
    """Keep the version of an alias in service; if it cannot be loaded, the previous version stays in service.

    `ready` is set once a model is in service, or the first check of the alias has found none.

    Args:
        aliases: reads the registry's aliases.
        open_version: opens a version's folder in the cache; raises `VersionNotReady` while it is not there.
        placement: loads models on the devices of this process.
    """

    def __init__(
        self,
        aliases: Callable[[], dict[str, int]],
        alias: str,
        open_version: Callable[[int], OpenedVersion],
        last_version: LastVersion,
        service: ModelService,
        placement: ModelPlacement | None = None,
    ) -> None:
        self._aliases = aliases
        self._alias = alias
        self._open_version = open_version
        self._last_version = last_version
        self._service = service
        self._placement = placement or ModelPlacement()
        self._folder: OpenedVersion | None = None  # of the version in service, which a restart reads again
        self.ready = threading.Event()
        self._last_problem: str | None = None
        self._unusable_version = 0
        self._retry_at = 0.0
        self._pause_s = LOAD_RETRY_S

    def follow(self) -> None:
        """Serve the last version, then poll the alias until service ends."""
        self.resume()
        while not self._service.is_stopped:
            self.check_alias()
            self.ready.set()
            time.sleep(ALIAS_POLL_INTERVAL_S)

    def resume(self) -> None:
        """Serve the last version from the cache, which needs no registry."""
        version = self._last_version.read()
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
            self._service.problem = None  # callers still get the reason
            self._explain_absence(NO_VERSION_MESSAGE, None)
            return self._log_problem(f"the registry has no alias {self._alias}")
        if served is None or served.version != version:
            return self._serve_version(version, f"alias {self._alias}")
        self._forget_unusable_version()  # if the alias has moved back from it
        self._log_problem(None)

    def _forget_unusable_version(self) -> None:
        self._unusable_version, self._service.problem = 0, None

    def _serve_version(self, version: int, reason: str) -> None:
        if version == self._unusable_version and time.monotonic() < self._retry_at:
            return
        self._service.explain_absence(f"v{version} is being loaded; retry in a few seconds", SHORT_RETRY_AFTER_S)
        try:
            folder = self._load_version(version)
        except VersionNotReady as error:
            return self._log_problem(f"v{version}, {reason}, is not in the cache yet", error)
        except Exception as error:
            if self._service.is_stopped:  # its devices were asked for meanwhile
                return log.info("v%d is not put into service, which ends", version)
            self._service.explain_absence(
                f"v{version} cannot be loaded; retry in a minute, and tell the operator if the error persists",
                LOAD_FAILURE_RETRY_AFTER_S,
            )
            self._service.problem = f"v{version} cannot be served: {str(error)[:MAX_SERVING_PROBLEM_CHARACTERS]}"
            is_repeated = version == self._unusable_version
            self._pause_s = min(2 * self._pause_s, MAX_LOAD_RETRY_S) if is_repeated else LOAD_RETRY_S
            self._unusable_version, self._retry_at = version, time.monotonic() + self._pause_s
            if self._serve_former_version(version):  # each retry would take it out of service
                self._retry_at = time.monotonic() + SWAP_RETRY_S
            return self._log_problem(f"v{version}, {reason}, cannot be served", error)
        self.ready.set()
        self._replace_folder(folder)
        log.info("v%d is in service: %s", version, reason)
        self._forget_unusable_version()
        self._last_problem = None
        try:
            self._last_version.record(version)
        except OSError as error:
            log.warning("cannot record v%d as the last version, so a restart needs the registry: %s", version, error)

    def _load_version(self, version: int) -> OpenedVersion:
        """Put a version into service, and return its folder.

        If memory does not hold it beside the present one, that one leaves first: its requests end, and new ones wait.

        Raises:
            Exception: any error of the cache or the registry, or of a folder that is not a model.
        """
        folder = self._open_version(version)
        try:
            self._placement.check_fits(folder.path)
            if self._service.served is not None and not self._placement.has_room(folder.path):
                log.info("v%d does not fit beside the version in service, which leaves first", version)
                self._service.take_out()
                poll_until_idle(self._service)
            model = self._placement.load(folder.path)
            self._service.swap_in(ServedModel(model, load_tokenizer(folder.path), version))
        except BaseException:
            folder.close()
            raise
        return folder

    def _serve_former_version(self, unusable_version: int) -> bool:
        """Serve the former version again if it left for one that cannot be loaded; return if it did so."""
        former, self._service.is_swapping = self._last_version.read(), False
        if self._service.served is not None or former in (None, unusable_version):
            return False
        try:
            self._replace_folder(self._load_version(former))
        except Exception as error:  # reported as the problem of the version that should be in service
            log.warning("v%d cannot be served either: %s", former, str(error)[:200])
            return False
        log.warning("v%d is in service again", former)
        return True

    def _replace_folder(self, folder: OpenedVersion) -> None:
        if self._folder is not None:
            self._folder.close()
        self._folder = folder

    def _explain_absence(self, message: str, retry_after_s: int | None) -> None:
        """Set the reason that callers get; keep an earlier reason that names a version that cannot be loaded."""
        if not self._unusable_version:
            self._service.explain_absence(message, retry_after_s)

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


def poll_until_idle(service: ModelService) -> None:
    """Wait until no request is answered, so that the memory of its model can be used."""
    deadline = time.monotonic() + SWAP_DRAIN_TIMEOUT_S
    while not service.is_idle and time.monotonic() < deadline:
        time.sleep(0.05)

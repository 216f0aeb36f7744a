"""The cache of registered versions, one for each home folder: `cache/versions/vN/model/`.

Training, evaluation, the model server and commands read versions there. The model server and ranks may read it and not
write it: the dispatcher and the flows fill it.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from infra.error_text import describe_error
from infra.folder_cache import CONTENT_FOLDER, CachedFolder, CheckContent, FolderCache, accept_any
from infra.tracker import Tracker, VersionLost

log = logging.getLogger(__name__)

VERSIONS_FOLDER = Path("cache/versions")
ENTRY_NAME_PREFIX = "v"
FORMER_CACHE_FOLDERS = ("serve", "generate")  # of version 0.3, one for each kind of process

ParseDigests = Callable[[bytes], Mapping[str, str]]
Fetch = Callable[[Path], Mapping[str, str]]


def make_entry_name(version: int) -> str:
    """Return the name of a version's entry in the cache."""
    return f"{ENTRY_NAME_PREFIX}{version}"


class VersionNotCached(LookupError):
    """Report that a version is not in the cache, or damaged there, and that this process may not write the cache."""


class VersionCache:
    """Open versions for use, and fetch those that are missing from the registry.

    Args:
        home: the home folder.
        manifest_name: the file that lists a version's files.
        parse_digests: returns the sha256 of each other file from the manifest's content.
    """

    def __init__(
        self, home: Path, max_bytes: int, tracker: Tracker, manifest_name: str, parse_digests: ParseDigests
    ) -> None:
        self.folders = FolderCache(home / VERSIONS_FOLDER, max_bytes, self._is_last_copy)
        self._tracker = tracker
        self._manifest_name = manifest_name
        self._parse_digests = parse_digests

    def find(self, version: int, expected: Mapping[str, str] | None = None) -> CachedFolder | None:
        """Return a version that is in the cache, locked for use; None if it is missing, damaged or not the expected.

        Args:
            expected: sha256 by file, which the manifest must state.
        """
        return self.folders.open(make_entry_name(version), self._make_check(expected))

    def open(self, version: int, expected: Mapping[str, str] | None = None) -> CachedFolder:
        """Return a version, locked for use; fetch it from the registry if the cache lacks it.

        Args:
            expected: as in `find`.

        Raises:
            VersionNotCached: if the cache lacks it and this process may not write there.
            VersionLost: if the registry lacks it or one of its files, or has a damaged one, or another one than the
                expected.
            OSError: if the disk has too little room; the message has the bytes.
        """
        folder = self.find(version, expected)
        if folder is not None:
            return folder
        files = self._tracker.open_files(version, (self._manifest_name,))

        def fetch(target: Path) -> Mapping[str, str]:
            manifest = target / self._manifest_name
            manifest.unlink(missing_ok=True)  # it has no sha256 of its own, so it is fetched anew
            files.fetch(self._manifest_name, manifest, None)
            digests = self._parse_digests(manifest.read_bytes())
            if expected is not None and digests != expected:
                raise VersionLost(f"the registry has other files under v{version} than were registered")
            for name, digest in digests.items():
                files.fetch(name, target / name, digest)
            return {**digests, self._manifest_name: ""}

        return self.fill(version, sum(files.sizes.values()), fetch, expected)

    def fill(
        self, version: int, num_bytes: int, fetch: Fetch, expected: Mapping[str, str] | None = None
    ) -> CachedFolder:
        """Return a version, locked for use; see `FolderCache.fill`. An entry that is not the expected is replaced.

        Raises:
            VersionNotCached: if this process may not write the cache.
        """
        try:
            return self.folders.fill(make_entry_name(version), num_bytes, fetch, self._make_check(expected))
        except PermissionError:
            raise VersionNotCached(
                f"v{version} is not in the cache {self.folders.root}, which this process may not write"
            ) from None

    def remove(self, version: int) -> bool:
        """Remove a version that is needed no longer; return False if it is not there or a process uses it."""
        return self.folders.remove(make_entry_name(version))

    def _make_check(self, expected: Mapping[str, str] | None) -> CheckContent:
        """Return a function that compares the manifest of an entry with the expected digests."""
        if expected is None:
            return accept_any
        return lambda folder: self._read_digests(folder) == expected

    def _is_last_copy(self, name: str) -> bool:
        """Return True unless the registry says that it has every file of an entry."""
        digests = self._read_digests(self.folders.root / name / CONTENT_FOLDER)
        version = name.removeprefix(ENTRY_NAME_PREFIX)
        if digests is None or not version.isdecimal():
            return False  # it is no version
        try:
            missing = self._tracker.find_missing_files(int(version), [*digests, self._manifest_name])
            problem = f"the registry lacks its {', '.join(missing)}" if missing else None
        except VersionLost as error:
            problem = str(error)
        except Exception as error:  # of any kind: without an answer, no copy counts as replaceable
            problem = f"the registry does not answer: {describe_error(error)}"
        if problem is not None:
            log.warning("%s stays in the cache %s beyond its limit: %s", name, self.folders.root, problem)
        return problem is not None

    def _read_digests(self, folder: Path) -> Mapping[str, str] | None:
        try:
            return self._parse_digests((folder / self._manifest_name).read_bytes())
        except (OSError, ValueError):
            return None

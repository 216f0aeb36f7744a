"""The cache of registered versions, one for each home folder: `cache/versions/vN/model/`.

Training, evaluation, the model server and commands read versions there. The model server and ranks may read it and not
write it: the dispatcher and the flows fill it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from infra.folder_cache import ENTRY_FILE, CachedFolder, FolderCache
from infra.tracker import Tracker, VersionLost

VERSIONS_FOLDER = Path("cache/versions")
FORMER_CACHE_FOLDERS = ("serve", "generate")  # of version 0.3, one for each kind of process

ParseDigests = Callable[[bytes], Mapping[str, str]]
Fetch = Callable[[Path], Mapping[str, str]]


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
        self.folders = FolderCache(home / VERSIONS_FOLDER, max_bytes)
        self._tracker = tracker
        self._manifest_name = manifest_name
        self._parse_digests = parse_digests

    def find(self, version: int, expected: Mapping[str, str] | None = None) -> CachedFolder | None:
        """Return a version that is in the cache, locked for use; None if it is missing, damaged or not the expected.

        Args:
            expected: sha256 by file, which the manifest must state.
        """
        folder = self.folders.open(f"v{version}")
        if folder is None or expected is None or self._read_digests(folder.path) == expected:
            return folder
        folder.close()
        return None

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
            if (folder := self.find(version, expected)) is not None:
                return folder
            if expected is not None:
                (self.folders.root / f"v{version}" / ENTRY_FILE).unlink(missing_ok=True)  # so that it counts as damaged
            return self.folders.fill(f"v{version}", num_bytes, fetch)
        except PermissionError:
            raise VersionNotCached(
                f"v{version} is not in the cache {self.folders.root}, which this process may not write"
            ) from None

    def _read_digests(self, folder: Path) -> Mapping[str, str] | None:
        try:
            return self._parse_digests((folder / self._manifest_name).read_bytes())
        except (OSError, ValueError):
            return None

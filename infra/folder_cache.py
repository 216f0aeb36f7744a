"""Cache folders of large files on one file system, shared by processes, and by hosts, that use them in place.

A process that uses an entry holds a shared lock (flock) on the entry's lock file, for which it needs only read access;
the kernel releases it however the process exits. Only an entry whose lock nobody holds is removed. Entries appear
complete, by a rename: what fills one has verified every byte, and after that size, inode and modification time show
that a file is unchanged.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.files import check_free_disk, replace_file

log = logging.getLogger(__name__)

LOCKS_FOLDER = "locks"
EVICTION_LOCK = "eviction"
ENTRY_FILE = "entry.json"
CONTENT_FOLDER = "model"
FILL_SUFFIX = ".fill"
TRASH_PREFIX = ".trash-"

CheckContent = Callable[[Path], bool]  # of an entry's folder of files


def accept_any(folder: Path) -> bool:
    """Return True: an entry that is whole has the right content."""
    return True


@dataclass
class CachedFolder:
    """An entry that this process uses; it is not removed before `close`, or the process's exit.

    Attributes:
        path: the folder with the entry's files, which must not be changed.
        _lock: None for a folder outside of a cache, which is used in the same way.
    """

    path: Path
    _lock: int | None

    @property
    def is_verified(self) -> bool:
        """Return True if the folder is in a cache, whose files are known to be unchanged."""
        return self._lock is not None

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "CachedFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class CacheEntry:
    """The size and the last use of an entry, or of one that is being filled; the time is in seconds since 1970."""

    name: str
    path: Path
    num_bytes: int
    used_at: float


class FolderCache:
    """Hold folders of files by name, up to a number of bytes.

    Args:
        max_bytes: least recently used entries that no process uses are removed beyond it. A larger entry, or entries
            that are all in use or last copies, may exceed it.
        is_last_copy: returns True if an entry cannot be fetched again, so that it is never removed for room; asked only
            about an entry that would be removed.
    """

    def __init__(self, root: Path, max_bytes: int, is_last_copy: Callable[[str], bool] = lambda name: False) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._is_last_copy = is_last_copy

    def open(self, name: str, is_expected: CheckContent = accept_any) -> CachedFolder | None:
        """Lock an entry for use; return None if it is missing, damaged or not expected. Needs no write access.

        Args:
            is_expected: returns True for the folder of an entry that has the right content.

        Raises:
            OSError: if the file system has no locks (ENOLCK).
        """
        try:
            lock = self._open_lock(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        return self._open_locked(name, lock, is_expected)

    def _open_locked(self, name: str, lock: int, is_expected: CheckContent) -> CachedFolder | None:
        """Return the entry if it is whole, with its lock; else close the lock."""
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            problem = find_changed_file(self.root / name)
            if problem is None and not is_expected(self.root / name / CONTENT_FOLDER):
                problem = "its files are other ones than were recorded elsewhere"
        except BaseException:
            os.close(lock)
            raise
        if problem is not None:
            os.close(lock)
            if (self.root / name).exists():
                log.warning("%s of the cache %s is damaged: %s", name, self.root, problem)
            return None
        with contextlib.suppress(OSError):  # a reader without the right; the entry's lock protects it meanwhile
            os.utime(self.root / name)
        return CachedFolder(self.root / name / CONTENT_FOLDER, lock)

    def fill(
        self,
        name: str,
        num_bytes: int,
        fetch: Callable[[Path], Mapping[str, str]],
        is_expected: CheckContent = accept_any,
    ) -> CachedFolder:
        """Return an entry, locked for use; if `open` does not, fetch it. One process fetches, others wait.

        Args:
            num_bytes: of the entry, for which room is made.
            fetch: writes the files into a folder and returns the sha256 of each, which it has verified. The folder may
                hold files of an earlier attempt that was interrupted, or of a damaged entry: each is to be verified
                again, and replaced, never written, if it is not as it should be.
            is_expected: as in `open`.

        Raises:
            OSError: if the disk has too little room (ENOSPC), with the bytes that are needed; PermissionError if this
                process may not write the cache.
            Exception: any error of `fetch`; the next call resumes.
        """
        (self.root / LOCKS_FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._hold_lock(f"{name}{FILL_SUFFIX}", fcntl.LOCK_EX):
            if (folder := self.open(name, is_expected)) is not None:  # another process has filled it
                return folder
            self._remove_trash()
            # Taken before the entry appears, so that it cannot be removed before it is used.
            lock = self._open_lock(name, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
                self._fill_locked(name, num_bytes, fetch)
            except BaseException:
                os.close(lock)
                raise
            folder = self._open_locked(name, lock, is_expected)
        if folder is None:
            raise OSError(f"the entry {name} of the cache {self.root} changed while it was made; see who writes there")
        return folder

    def _fill_locked(self, name: str, num_bytes: int, fetch: Callable[[Path], Mapping[str, str]]) -> None:
        entry, scratch = self.root / name, self.root / f".{name}{FILL_SUFFIX}"
        content = scratch / CONTENT_FOLDER
        content.mkdir(parents=True, exist_ok=True, mode=0o700)
        _link_files(entry / CONTENT_FOLDER, content)
        self._make_room(name, num_bytes - measure_folder(scratch))
        digests = fetch(content)
        for file in content.iterdir():  # of an earlier attempt at other content
            if file.name not in digests:
                file.unlink()
        files = {file: {"sha256": digest, **_describe_file(content / file)} for file, digest in digests.items()}
        replace_file(scratch / ENTRY_FILE, json.dumps({"files": files}, indent=2))
        # After a power cut, size and time of a file whose bytes were not written yet may be as recorded.
        for path in (*content.iterdir(), content, scratch / ENTRY_FILE, scratch):
            _sync(path)
        trash = self.root / f"{TRASH_PREFIX}{uuid.uuid4().hex}"
        if entry.exists():
            entry.rename(trash)  # a process that has its files open keeps them
        scratch.rename(entry)
        shutil.rmtree(trash, ignore_errors=True)

    def list_entries(self) -> list[CacheEntry]:
        """List the entries, those that are being filled, and those whose filling was interrupted."""
        entries = []
        for path in sorted(self.root.glob("*")) + sorted(self.root.glob(f".*{FILL_SUFFIX}")):
            if path.name == LOCKS_FOLDER or path.name.startswith(TRASH_PREFIX):
                continue
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                # A clock of another host that is ahead must not protect an entry.
                used_at = min(path.stat().st_mtime, time.time())
                name = path.name.removeprefix(".").removesuffix(FILL_SUFFIX)
                entries.append(CacheEntry(name, path, measure_folder(path), used_at))
        return entries

    def evict(self, num_bytes: int = 0, *, keep: str = "") -> list[CacheEntry]:
        """Remove entries that no process uses until `num_bytes` more are within the limit and on the disk.

        A last copy stays, whatever it exceeds.
        """
        evicted = []
        with self._hold_lock(EVICTION_LOCK, fcntl.LOCK_EX):
            entries = sorted(self.list_entries(), key=lambda entry: entry.used_at)
            excess = sum(entry.num_bytes for entry in entries) + num_bytes - self.max_bytes
            for entry in entries:
                is_short = num_bytes > shutil.disk_usage(self.root).free
                if entry.name == keep or (excess <= 0 and not is_short):
                    continue
                if self._is_kept(entry) or not self._remove(entry):
                    continue
                evicted.append(entry)
                excess -= entry.num_bytes
        return evicted

    def _make_room(self, name: str, num_bytes: int) -> None:
        """Remove entries for `num_bytes` more.

        Raises:
            OSError: if the disk has too little room then.
        """
        if num_bytes > shutil.disk_usage(self.root).free:
            others = [entry for entry in self.list_entries() if entry.name != name and not self._is_kept(entry)]
            # What cannot fit even without them removes nothing.
            check_free_disk(self.root, f"{name} in the cache", num_bytes - sum(entry.num_bytes for entry in others))
        for entry in self.evict(max(0, num_bytes), keep=name):
            log.info("removed %s (%d bytes) from the cache for %s", entry.name, entry.num_bytes, name)
        total = sum(entry.num_bytes for entry in self.list_entries()) + max(0, num_bytes)
        if total > self.max_bytes:
            log.warning("the cache %s needs %d bytes, beyond its limit of %d", self.root, total, self.max_bytes)
        check_free_disk(self.root, f"{name} in the cache", num_bytes)

    def remove(self, name: str) -> bool:
        """Remove an entry, even a last copy; return False if there is none or a process uses it."""
        with self._hold_lock(EVICTION_LOCK, fcntl.LOCK_EX):
            entries = [entry for entry in self.list_entries() if entry.name == name]
            return all([self._remove(entry) for entry in entries]) and bool(entries)

    def _is_kept(self, entry: CacheEntry) -> bool:
        """Return True for the last copy of something; what is not complete yet is none."""
        return not entry.path.name.endswith(FILL_SUFFIX) and self._is_last_copy(entry.name)

    def _remove(self, entry: CacheEntry) -> bool:
        """Remove an entry; return False if a process uses it, or fills it."""
        is_fill = entry.path.name.endswith(FILL_SUFFIX)
        lock = self._open_lock(f"{entry.name}{FILL_SUFFIX}" if is_fill else entry.name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            trash = self.root / f"{TRASH_PREFIX}{uuid.uuid4().hex}"
            entry.path.rename(trash)
        except (BlockingIOError, FileNotFoundError):
            return False
        finally:
            os.close(lock)
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def _remove_trash(self) -> None:
        """Remove what a process left that was killed while it removed an entry."""
        for trash in self.root.glob(f"{TRASH_PREFIX}*"):
            shutil.rmtree(trash, ignore_errors=True)

    @contextlib.contextmanager
    def _hold_lock(self, name: str, kind: int) -> Iterator[None]:
        (self.root / LOCKS_FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = self._open_lock(name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, kind)
            yield
        finally:
            os.close(lock)

    def _open_lock(self, name: str, flags: int) -> int:
        """Open a lock file. Lock files are never removed, so that all processes lock the same one."""
        return os.open(self.root / LOCKS_FOLDER / f"{name}.lock", flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def find_changed_file(entry: Path) -> str | None:
    """Describe the first file that differs from the entry's record in size, inode or modification time; None: none."""
    try:
        files = json.loads((entry / ENTRY_FILE).read_text())["files"]
        for name, recorded in files.items():
            actual = _describe_file(entry / CONTENT_FOLDER / name)
            for key, value in actual.items():
                if recorded[key] != value:
                    return f"{name} has {key} {value}, recorded is {recorded[key]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def _describe_file(file: Path) -> dict[str, int]:
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.name} is not a regular file")
    return {"bytes": status.st_size, "inode": status.st_ino, "mtime_ns": status.st_mtime_ns}


def _sync(path: Path) -> None:
    """Write a file or folder from memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_files(source: Path, target: Path) -> None:
    """Link the files of a damaged entry to where it is made anew, so that its good files are not fetched again."""
    for file in source.glob("*"):
        with contextlib.suppress(OSError):  # it exists there, or the file system has no links
            if file.is_file() and not file.is_symlink():
                os.link(file, target / file.name)


def measure_folder(folder: Path) -> int:
    """Return the bytes that a folder's files occupy on the disk."""
    return sum(512 * file.lstat().st_blocks for file in folder.rglob("*") if file.is_file() and not file.is_symlink())

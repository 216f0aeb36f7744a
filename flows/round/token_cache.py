"""Cache of token files, `$COTRAIN_HOME/cache/tokens/DIGEST/`, shared by rounds and safe for several processes.

An entry is assembled in a scratch folder, hashed, synced and renamed, so it is complete or does not exist; its files
are read-only. A run gets copies: its ranks may change every file of the run's folder, and a hard link would let them
change the cache. Where the file system can share blocks (XFS, Btrfs), the copy takes no space.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from infra.files import copy_descriptor, remove_path
from yuan.data.shard_tokens import MAX_SHARD_REPORT_BYTES, SHARD_REPORT_FILE, ShardReport
from yuan.data.text import make_printable, parse_json
from yuan.data.tokens import TOKENS_FILE
from yuan.safe_files import is_plain_file_name, open_file, read_file
from yuan.train.file_digest import FileDigest, compute_digest, digest_content, find_difference
from yuan.train.run_folder import write_json

log = logging.getLogger(__name__)

TOKEN_CACHE_FOLDER = "cache/tokens"  # in the home folder
CACHE_ENTRY_FILE = "files.json"
CACHE_ENTRY_SCHEMA = 2
CACHE_LOCK_FILE = ".lock"
SHARE_BLOCKS_REQUEST = 0x40049409  # FICLONE of linux/fs.h
READ_ONLY_MODE = 0o444


@dataclass(frozen=True)
class CachedTokens:
    """The token files of a shard in the cache.

    Attributes:
        shard_sha256: of the shard's rows.
        files: digest by the path below the entry's folder.
    """

    digest: str
    folder: Path
    shard_sha256: str
    files: dict[str, FileDigest]
    report: ShardReport

    @property
    def num_bytes(self) -> int:
        return sum(digest.num_bytes for digest in self.files.values())


class CacheDamageError(ValueError):
    """An entry of the cache differs from its digests; it is removed, so another attempt makes it again."""


class TokenCache:
    """The cache in a folder, which is created if it does not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every entry while the block runs; what killed processes left behind is removed before."""
        with (self.folder / CACHE_LOCK_FILE).open("w") as lock:
            if _try_lock(lock):
                self._remove_scratch()
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def find(self, digest: str, *, verify_tokens: bool = False) -> CachedTokens | None:
        """Return an entry, and count it as used now; None if there is none, or it is damaged, and then removed.

        Args:
            verify_tokens: also read the tokens, by far the largest files; else they are verified by `export`.
        """
        folder = self.folder / digest
        try:
            entry = _read_entry(folder)
            _verify_files(entry, verify_tokens=verify_tokens)
        except FileNotFoundError:
            if folder.is_dir():  # an eviction was killed; an entry takes its place when the folder is gone
                remove_path(folder)
            return None
        except (OSError, ValueError) as error:
            log.warning("token files %s are damaged and made again: %s", digest[:12], make_printable(str(error)))
            remove_path(folder)
            return None
        os.utime(folder / CACHE_ENTRY_FILE)
        return entry

    def add(self, digest: str, shard_sha256: str, write: Callable[[Path], None]) -> CachedTokens:
        """Make an entry; if another process makes the same one first, that one is used.

        Args:
            shard_sha256: of the shard's rows.
            write: writes the token files and their report into an existing folder.
        """
        scratch = Path(
            tempfile.mkdtemp(dir=self.folder, prefix=f".{digest[:12]}.{socket.gethostname()}.{os.getpid()}.")
        )
        try:
            work = scratch / digest
            work.mkdir()
            write(work)
            _seal_entry(work, shard_sha256)
            with contextlib.suppress(OSError):  # ENOTEMPTY: another process was faster
                work.rename(self.folder / digest)
            _sync(self.folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        entry = self.find(digest)
        if entry is None:
            raise OSError(errno.EIO, f"the token files {digest[:12]} vanished from {self.folder} as they were written")
        return entry

    def export(self, entry: CachedTokens, name: str, target: Path) -> dict[str, FileDigest]:
        """Copy a folder of an entry to a new folder, and return the digests of its files by name.

        Raises:
            CacheDamageError: if a file differs from its digest.
            OSError: if the disk is full.
        """
        target.mkdir(parents=True)
        digests = {}
        for path, digest in entry.files.items():
            folder, _, file_name = path.rpartition("/")
            if folder == name:
                try:
                    copy_file(entry.folder / path, target / file_name, digest)
                except ValueError as error:
                    remove_path(entry.folder)
                    raise CacheDamageError(f"token files {entry.digest[:12]}: {error}") from None
                digests[file_name] = digest
        return digests

    def evict(self, max_bytes: int) -> None:
        """Remove the entries that were not used for the longest time until the others fit; none while one is held."""
        with (self.folder / CACHE_LOCK_FILE).open("w") as lock:
            if not _try_lock(lock):
                return
            self._remove_damaged()
            entries = self._list_entries()
            entries.sort(key=lambda entry: (entry.folder / CACHE_ENTRY_FILE).stat().st_mtime_ns)
            num_bytes = sum(entry.num_bytes for entry in entries)
            for entry in entries:
                if num_bytes <= max_bytes:
                    break
                _remove_entry(entry)
                num_bytes -= entry.num_bytes

    def find_unneeded(self, needed_shards: Collection[str]) -> list[CachedTokens]:
        """Return the entries of shards other than these."""
        return [entry for entry in self._list_entries() if entry.shard_sha256 not in needed_shards]

    def remove(self, entries: Iterable[CachedTokens]) -> int:
        """Remove entries, none while one is held; return their bytes."""
        num_bytes = 0
        with (self.folder / CACHE_LOCK_FILE).open("w") as lock:
            if not _try_lock(lock):
                return 0
            for entry in entries:
                _remove_entry(entry)
                num_bytes += entry.num_bytes
        return num_bytes

    def _list_entries(self) -> list[CachedTokens]:
        """Return the entries, without those that are damaged."""
        entries = []
        for path in self.folder.glob("[0-9a-f]*"):
            with contextlib.suppress(OSError, ValueError):
                entries.append(_read_entry(path))
        return entries

    def _remove_damaged(self) -> None:
        for path in self.folder.glob("[0-9a-f]*"):
            try:
                _read_entry(path)
            except (OSError, ValueError):
                remove_path(path)

    def _remove_scratch(self) -> None:
        for path in self.folder.glob(".*"):
            if path.name != CACHE_LOCK_FILE:
                remove_path(path)


def _remove_entry(entry: CachedTokens) -> None:
    (entry.folder / CACHE_ENTRY_FILE).unlink(missing_ok=True)  # first: without it, the folder is no entry
    remove_path(entry.folder)
    log.info("removed token files %s of %d bytes from the cache", entry.digest[:12], entry.num_bytes)


def copy_file(source: Path, target: Path, digest: FileDigest) -> None:
    """Copy a file to a new one, by sharing its blocks if the file system can.

    Raises:
        ValueError: if its bytes are not those of the digest; shared blocks are not read again.
        OSError: if the disk is full.
    """
    descriptor = open_file(source.parent, source.name)
    with target.open("xb") as out:
        try:
            fcntl.ioctl(out, SHARE_BLOCKS_REQUEST, descriptor)
        except OSError:  # of many kinds: another file system, one that cannot, or a kernel without it
            pass
        else:
            os.close(descriptor)
            return
    target.unlink()
    if digest.num_bytes > shutil.disk_usage(target.parent).free:
        os.close(descriptor)
        raise OSError(errno.ENOSPC, f"{target} needs {digest.num_bytes:,} bytes, and the disk has less; free space")
    sha256 = copy_descriptor(descriptor, target)
    if sha256 != digest.sha256:
        target.unlink()
        raise ValueError(f"{source.name} has the sha256 {sha256}, recorded is {digest.sha256}")


def _seal_entry(folder: Path, shard_sha256: str) -> None:
    """Hash and sync the files of an entry, make them read-only, and write their digests last."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[str(file.relative_to(folder))] = compute_digest(file).to_json()
        file.chmod(READ_ONLY_MODE)
        _sync(file)
    entry = {"schema": CACHE_ENTRY_SCHEMA, "made_at": time.time(), "shard": shard_sha256, "files": files}
    write_json(folder / CACHE_ENTRY_FILE, entry)
    for path in (folder / CACHE_ENTRY_FILE, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def _read_entry(folder: Path) -> CachedTokens:
    """Read an entry whose files have the recorded sizes.

    Raises:
        FileNotFoundError: if there is none.
        OSError, ValueError: if it is damaged.
    """
    data: Any = parse_json(read_file(folder, CACHE_ENTRY_FILE))
    if (
        not isinstance(data, dict)
        or data.get("schema") != CACHE_ENTRY_SCHEMA
        or not isinstance(data.get("files"), dict)
        or not isinstance(data.get("shard"), str)
    ):
        raise ValueError(f"{CACHE_ENTRY_FILE} is of another schema")
    files = {}
    for path, value in data["files"].items():
        if not all(map(is_plain_file_name, path.split("/"))) or path.count("/") > 1:
            raise ValueError(f"{CACHE_ENTRY_FILE} names a file outside of the folder")
        files[path] = FileDigest.from_json(value)
        try:
            num_bytes = (folder / path).lstat().st_size
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        if num_bytes != files[path].num_bytes:
            raise ValueError(f"{path} has {num_bytes} bytes, recorded are {files[path].num_bytes}")
    try:
        content = read_file(folder, SHARD_REPORT_FILE, MAX_SHARD_REPORT_BYTES)
    except FileNotFoundError:
        raise ValueError("its report is missing") from None
    if digest_content(content) != files.get(SHARD_REPORT_FILE):
        raise ValueError("its report has another sha256")
    return CachedTokens(folder.name, folder, data["shard"], files, ShardReport.parse(content))


def _verify_files(entry: CachedTokens, *, verify_tokens: bool) -> None:
    """Compare the files of an entry with their digests, which must be done before any of them is parsed.

    Raises:
        ValueError: if one differs.
    """
    for path, digest in entry.files.items():
        is_read = verify_tokens or path.rpartition("/")[2] != TOKENS_FILE
        if is_read and (difference := find_difference(entry.folder, path, digest)):
            raise ValueError(f"{path} {difference}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

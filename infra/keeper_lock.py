"""Lock a folder for one keeper; the lock file holds the keeper's pid, and its mtime is the keeper's heartbeat."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from infra.files import read_regular
from infra.polling import poll_until

KEEPER_LOCK_FILE = "stack.lock"
KEEPER_HEARTBEAT_TIMEOUT_S = 15.0  # the keeper sends a heartbeat every second
KEEPER_LOCK_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class KeeperLockHolder:
    """Describe the keeper that holds a folder.

    Attributes:
        pid: None if it cannot be read from the lock file.
        stack_id: None if it cannot be read from the lock file.
        silent_s: seconds since the keeper's last heartbeat.
    """

    pid: int | None
    stack_id: str | None
    silent_s: float

    @property
    def is_silent(self) -> bool:
        return self.silent_s > KEEPER_HEARTBEAT_TIMEOUT_S


@contextlib.contextmanager
def hold_keeper_lock(folder: Path, stack_id: str) -> Iterator[Callable[[], None]]:
    """Hold the folder's lock while the block runs.

    Yields:
        A function that sends one heartbeat: it renews the lock file's mtime.

    Raises:
        BlockingIOError: if another keeper holds the folder's lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / KEEPER_LOCK_FILE).open("ab", buffering=0) as lock:
        _acquire_lock(lock)
        with contextlib.suppress(OSError):  # a full disk must not stop the stack
            lock.truncate(0)
            lock.write(json.dumps({"pid": os.getpid(), "stack_id": stack_id}).encode())
        yield lambda: os.utime(lock.fileno())


def _acquire_lock(lock: IO[bytes]) -> None:
    """Lock the file exclusively; retry for a second, since `find_keeper` takes a shared lock for an instant.

    Raises:
        BlockingIOError: if another process holds the lock all the time.
    """

    def try_lock() -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    if not poll_until(try_lock, timeout_s=KEEPER_LOCK_TIMEOUT_S, pause_s=0.02):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def find_keeper(folder: Path) -> KeeperLockHolder | None:
    """Return the keeper that holds a folder's lock; None if there is none."""
    file = folder / KEEPER_LOCK_FILE
    try:
        with file.open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        silent_s = max(0.0, time.time() - file.stat().st_mtime)
    try:
        content = json.loads(read_regular(file))
        return KeeperLockHolder(int(content["pid"]), str(content["stack_id"]), silent_s)
    except (OSError, ValueError, KeyError, TypeError):
        return KeeperLockHolder(None, None, silent_s)


def is_keeper_running(folder: Path) -> bool:
    """Return True if a keeper holds this folder's lock, with or without a recent heartbeat."""
    return find_keeper(folder) is not None

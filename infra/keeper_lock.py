"""The lock by which one keeper holds a folder, with who it is and its sign of life."""

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

KEEPER_LOCK_FILE = "stack.lock"
KEEPER_HEARTBEAT_TIMEOUT_S = 15.0  # it renews its sign of life every second
KEEPER_LOCK_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class KeeperLockHolder:
    """The keeper that holds a folder: its process, the id of its stack, and for how long it has given no sign of life.

    `pid` and `stack_id` are None if the file does not tell them.
    """

    pid: int | None
    stack_id: str | None
    silent_s: float

    @property
    def is_silent(self) -> bool:
        return self.silent_s > KEEPER_HEARTBEAT_TIMEOUT_S


@contextlib.contextmanager
def hold_keeper_lock(folder: Path, stack_id: str) -> Iterator[Callable[[], None]]:
    """Hold the folder's lock while the block runs, which is given a function that renews the sign of life.

    Raises:
        BlockingIOError: if another keeper holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / KEEPER_LOCK_FILE).open("ab", buffering=0) as lock:
        _acquire_lock(lock)
        with contextlib.suppress(OSError):  # on a full disk the stack runs all the same
            lock.truncate(0)
            lock.write(json.dumps({"pid": os.getpid(), "stack_id": stack_id}).encode())
        yield lambda: os.utime(lock.fileno())


def _acquire_lock(lock: IO[bytes]) -> None:
    """Lock the file for this process alone; one who looks whether it is locked has it for a moment."""
    end = time.monotonic() + KEEPER_LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.02)


def find_keeper(folder: Path) -> KeeperLockHolder | None:
    """Return the keeper that holds a folder; None if there is none."""
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
        told = json.loads(read_regular(file))
        return KeeperLockHolder(int(told["pid"]), str(told["stack_id"]), silent_s)
    except (OSError, ValueError, KeyError, TypeError):
        return KeeperLockHolder(None, None, silent_s)


def is_keeper_running(folder: Path) -> bool:
    """Whether a keeper holds this folder, be it silent or not."""
    return find_keeper(folder) is not None

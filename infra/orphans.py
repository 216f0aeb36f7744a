"""Processes whose parents have ended come to the keeper, so that none of a stack outlives it.

A service that was taken over can start a process that leaves its session and carries no mark of the stack. It cannot
leave the tree of processes below the nearest ancestor that adopts orphans (prctl(2), PR_SET_CHILD_SUBREAPER).
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection

from infra.processes import find_descendants, list_processes

PR_SET_CHILD_SUBREAPER = 36
ORPHAN_KILL_TIMEOUT_S = 5.0


class OrphanReaper:
    """The orphans of one process, which adopts them from now on."""

    def __init__(self) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._zombies: set[int] = set()

    def reap(self, own: Collection[int]) -> None:
        """Bury orphans that have died; call it now and then.

        A child that this process itself started belongs to who waits for it. Such a one is collected at once, so only
        what is dead at two calls is an orphan.

        Args:
            own: children that may stay dead for longer, since they are waited for later.
        """
        dead = {one.pid for one in list_processes() if one.parent == os.getpid() and one.is_zombie} - set(own)
        for pid in dead & self._zombies:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._zombies = dead

    def kill_all(self) -> list[int]:
        """Kill all processes below this one, orphans or not, and return their pids; for a process that is ending."""
        killed: list[int] = []
        end = time.monotonic() + ORPHAN_KILL_TIMEOUT_S
        while (left := find_descendants(os.getpid())) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            killed += [pid for pid in left if pid not in killed]
            time.sleep(0.02)
        return killed

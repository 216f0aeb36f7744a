"""Adopt and reap orphaned processes, so that no process of a stack outlives its keeper.

A compromised service can start a process that changes its session and drops the stack's id from its environment. It
cannot leave the process tree below the nearest ancestor that adopts orphans (prctl(2), PR_SET_CHILD_SUBREAPER).
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Collection

from infra.polling import poll_until
from infra.processes import find_descendants, list_processes

PR_SET_CHILD_SUBREAPER = 36
ORPHAN_KILL_TIMEOUT_S = 5.0


class OrphanReaper:
    """Make this process adopt orphaned descendants, reap them and kill them."""

    def __init__(self) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._zombies: set[int] = set()

    def reap(self, spare: Collection[int]) -> None:
        """Wait for orphans that have exited; call it periodically.

        A child that this process started itself is waited for by its own code, normally at once. So only a process
        that is a zombie at two calls in a row is an orphan.

        Args:
            spare: pids of children that may stay zombies for longer, since other code waits for them later.
        """
        children = [process for process in list_processes() if process.parent == os.getpid()]
        zombies = {process.pid for process in children if process.is_zombie} - set(spare)
        for pid in zombies & self._zombies:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._zombies = zombies

    def kill_all(self) -> list[int]:
        """Kill all descendants of this process, orphans or not, and return their pids; call it before exiting."""
        killed: dict[int, None] = {}  # in the order of the first signal

        def kill_descendants() -> bool:
            """Kill and reap the descendants; true if there are none."""
            descendants = find_descendants(os.getpid())
            for pid in descendants:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            killed.update(dict.fromkeys(descendants))
            return not descendants

        poll_until(kill_descendants, timeout_s=ORPHAN_KILL_TIMEOUT_S, pause_s=0.02)
        return list(killed)

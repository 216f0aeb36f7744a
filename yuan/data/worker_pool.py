"""Child processes that process one item at a time: `WorkerPool("yuan.data.token_workers", 2).process(exchange)`.

They get none of the caller's environment. A process that dies, as the kernel kills the largest one when memory is out,
costs its item a second try, and never the calling process.
"""

import contextlib
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import IO, Self, TypeVar

MAX_ITEM_TRIES = 2
Reply = TypeVar("Reply")


class WorkersEnded(RuntimeError):
    """The pool was closed: no process is started any more."""


class WorkerDied(Exception):
    """As many processes died of an item as may; `status` is the exit status of the last one."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the last process ended with status {status}")
        self.status = status


class WorkerPool:
    """Child processes, started when they are needed; leaving the context kills them.

    Args:
        module: which `python -m` runs; it reads items from standard input and writes replies to standard output.
        count: processes at most.
    """

    def __init__(self, module: str, count: int) -> None:
        self.count = count
        self._module = module
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)  # a place of a process that is not started
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_closed = True
            processes = list(self._processes)
        for process in processes:
            self._end(process)

    @property
    def pids(self) -> list[int]:
        """Return the ids of the processes that run."""
        with self._lock:
            return sorted(process.pid for process in self._processes)

    def process(
        self, exchange: Callable[[IO[bytes], IO[bytes]], Reply | None], prepare_retry: Callable[[], None] | None = None
    ) -> Reply:
        """Process an item, once there is a free process; one that dies is replaced, and the item tried again.

        Args:
            exchange: writes the item to the first pipe, and reads the reply from the second; None if it ends early.
            prepare_retry: called before the item is tried again.

        Raises:
            WorkerDied: if two processes died of the item.
            WorkersEnded: if the pool was closed.
        """
        process = self._idle.get()
        try:
            for attempt in range(1, MAX_ITEM_TRIES + 1):
                process = process or self._start()
                reply = _exchange(process, exchange)
                if reply is not None:
                    return reply
                status = self._end(process)
                process = None
                if attempt < MAX_ITEM_TRIES and prepare_retry is not None and not self._is_closed:
                    prepare_retry()
            raise WorkerDied(status)
        finally:
            self._idle.put(process)

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._is_closed:
                raise WorkersEnded("the child processes are ended")
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],
                env={"LC_ALL": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._processes.add(process)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        process.kill()
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None, "opened with pipes"
            with contextlib.suppress(BrokenPipeError):  # of an item that was not flushed
                pipe.close()
        with self._lock:
            self._processes.discard(process)
        return status


def _exchange(
    process: subprocess.Popen[bytes], exchange: Callable[[IO[bytes], IO[bytes]], Reply | None]
) -> Reply | None:
    assert process.stdin is not None and process.stdout is not None, "opened with pipes"
    try:
        return exchange(process.stdin, process.stdout)
    except BrokenPipeError:
        return None
    except ValueError:
        if process.stdin.closed:  # since the processes were ended
            return None
        raise

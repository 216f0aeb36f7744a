"""A sign of life between machines: a file that its writer renews, and processes that leave when it no longer does.

On one machine a FIFO says at once that its holder is gone (`infra.process_group`); between machines there is the
folder that all of them see. What counts is that the content changes, measured by the reader's own clock.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from infra.files import replace_file

PARENT_FILE_VARIABLE = "COTRAIN_PARENT_FILE"
PARENT_HEARTBEAT_EVERY_S = 2.0
PARENT_HEARTBEAT_TIMEOUT_S = 30.0  # a shared file system may serve an old content for some seconds
PARENT_EXIT_NOTE = "over"
EXIT_TEMPORARY_FAILURE = 75  # EX_TEMPFAIL: start me again


@contextlib.contextmanager
def send_parent_heartbeats(file: Path) -> Iterator[None]:
    """Renew the file while the block runs, then say that it is over."""
    over = threading.Event()

    def renew() -> None:
        count = 0
        while True:
            with contextlib.suppress(OSError):  # a full disk must not end the run; silence for long will
                replace_file(file, str(count))
            count += 1
            if over.wait(PARENT_HEARTBEAT_EVERY_S):
                return

    thread = threading.Thread(target=renew, daemon=True, name="alive")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            replace_file(file, PARENT_EXIT_NOTE)


def exit_on_lost_heartbeat(file: Path, silent_s: float = PARENT_HEARTBEAT_TIMEOUT_S) -> None:
    """End this process when the file says that it is over, or has not changed for so long."""
    threading.Thread(target=_watch_heartbeat, args=(file, silent_s), daemon=True, name="parent-watch").start()


def _watch_heartbeat(file: Path, silent_s: float) -> None:
    seen, since = None, time.monotonic()
    while time.monotonic() - since < silent_s:
        with contextlib.suppress(OSError):
            content = file.read_text()
            if content == PARENT_EXIT_NOTE:
                break
            if content != seen:
                seen, since = content, time.monotonic()
        time.sleep(0.5)
    os._exit(EXIT_TEMPORARY_FAILURE)  # the main thread may be in a collective and cannot be asked

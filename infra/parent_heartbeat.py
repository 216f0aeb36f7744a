"""Send heartbeats between machines through a file, and exit processes whose supervisor's heartbeat stops.

On one machine a FIFO reports at once that its writer has exited (`infra.process_group`); between machines there is
only the shared folder. A heartbeat is a change of the file's content; the reader measures with its own clock.
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
PARENT_HEARTBEAT_TIMEOUT_S = 30.0  # a shared file system may return stale content for some seconds
PARENT_EXIT_NOTE = "over"
EXIT_TEMPORARY_FAILURE = 75  # EX_TEMPFAIL: the process may be restarted


@contextlib.contextmanager
def send_parent_heartbeats(file: Path) -> Iterator[None]:
    """Write heartbeats to the file while the block runs, then write the exit note."""
    over = threading.Event()

    def renew() -> None:
        count = 0
        while True:
            with contextlib.suppress(OSError):  # a full disk ends the run only after the heartbeat timeout
                replace_file(file, str(count))
            count += 1
            if over.wait(PARENT_HEARTBEAT_EVERY_S):
                return

    thread = threading.Thread(target=renew, daemon=True, name="parent-heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            replace_file(file, PARENT_EXIT_NOTE)


def exit_on_lost_heartbeat(file: Path, silent_s: float = PARENT_HEARTBEAT_TIMEOUT_S) -> None:
    """Exit this process when the file holds the exit note, or has not changed for `silent_s` seconds."""
    threading.Thread(target=_watch_heartbeat, args=(file, silent_s), daemon=True, name="parent-watch").start()


def _watch_heartbeat(file: Path, silent_s: float) -> None:
    last_content, last_change = None, time.monotonic()
    while time.monotonic() - last_change < silent_s:
        with contextlib.suppress(OSError):
            content = file.read_text()
            if content == PARENT_EXIT_NOTE:
                break
            if content != last_content:
                last_content, last_change = content, time.monotonic()
        time.sleep(0.5)
    os._exit(EXIT_TEMPORARY_FAILURE)  # the main thread may be blocked in a collective and cannot exit

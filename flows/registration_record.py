"""The progress of the registration that runs, or was killed, as `cotrain register` writes it and `status` reads it."""

import contextlib
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.files import read_regular, replace_file
from infra.stored_values import read_count, read_text, read_timestamp

REGISTRATIONS_FOLDER = "registrations"  # in the home folder: converted weights that are not uploaded yet
REGISTRATION_LOCK_FILE = ".lock"  # held by the registration that runs
REGISTRATION_RECORD_FILE = "progress.json"
RECORD_EVERY_S = 2.0
MAX_FOLDER_CHARACTERS = 4096


@dataclass(frozen=True)
class RegistrationProgress:
    """The step of a registration, and its bytes; times are in seconds since 1970.

    Attributes:
        folder: of the weights.
        total_bytes: of the step; 0 if they are not known.
        is_running: False if the registration was killed.
    """

    folder: str
    step: str
    done_bytes: int
    total_bytes: int
    begun_at: float
    updated_at: float
    is_running: bool = True

    def describe(self) -> str:
        """Describe the registration in one line."""
        progress = describe_progress(self.step, self.done_bytes, self.total_bytes, self.updated_at - self.begun_at)
        if self.is_running:
            return f"registering {self.folder}: {progress}"
        moment = time.strftime("%F %T", time.localtime(self.updated_at))
        return f"the registration of {self.folder} was interrupted at {moment} ({progress}); run the command again"


def describe_progress(step: str, done_bytes: int, total_bytes: int, seconds: float) -> str:
    """Describe the progress of a step in one line: bytes, percent, rate, and the seconds that remain at this rate.

    >>> describe_progress("convert", 1_000_000_000, 4_000_000_000, 20.0)
    'convert: 1.0 of 4.0 GB (25 %), 50.0 MB/s, 60 s left'
    >>> describe_progress("upload", 0, 0, 0.0)
    'upload'
    """
    if not total_bytes:
        return step
    text = f"{step}: {done_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB ({done_bytes / total_bytes:.0%})"
    text = text.replace("%)", " %)")
    if not done_bytes or seconds <= 0:
        return text
    rate = done_bytes / seconds
    return f"{text}, {rate / 1e6:.1f} MB/s, {max(0, total_bytes - done_bytes) / rate:.0f} s left"


class RegistrationRecorder:
    """Write the progress of the one registration that runs, every RECORD_EVERY_S and at each step.

    Args:
        home: the home folder.
        folder: of the weights.
    """

    def __init__(self, home: Path, folder: Path) -> None:
        self._file = home / REGISTRATIONS_FOLDER / REGISTRATION_RECORD_FILE
        self._folder = str(folder.resolve())
        self._step: str | None = None
        self._begun_at = self._written_at = 0.0

    def record(self, step: str, done_bytes: int, total_bytes: int) -> None:
        now = time.time()
        if step != self._step:
            self._step, self._begun_at = step, now
        elif now - self._written_at < RECORD_EVERY_S:
            return
        self._written_at = now
        progress = RegistrationProgress(self._folder, step, done_bytes, total_bytes, self._begun_at, now)
        with contextlib.suppress(OSError):  # of a full disk, which the step itself reports
            replace_file(self._file, json.dumps(asdict(progress)))

    def end(self) -> None:
        """Remove the record: the registration has ended, with whatever result."""
        self._file.unlink(missing_ok=True)


def read_registration_progress(home: Path) -> RegistrationProgress | None:
    """Return the progress of the registration that runs or was killed; None if there is none."""
    folder = home / REGISTRATIONS_FOLDER
    try:
        content = json.loads(read_regular(folder / REGISTRATION_RECORD_FILE))
        weights = read_text(content["folder"], MAX_FOLDER_CHARACTERS)
        step = read_text(content["step"], 100)
        done_bytes, total_bytes = read_count(content["done_bytes"]), read_count(content["total_bytes"])
        begun_at, updated_at = read_timestamp(content["begun_at"]), read_timestamp(content["updated_at"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if weights is None or step is None or done_bytes is None or total_bytes is None:
        return None
    if begun_at is None or updated_at is None:
        return None
    is_running = _is_locked(folder / REGISTRATION_LOCK_FILE)
    return RegistrationProgress(weights, step, done_bytes, total_bytes, begun_at, updated_at, is_running)


def _is_locked(file: Path) -> bool:
    try:
        lock = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False

"""Read and write files safely in folders that a confined service can write, from processes that are not confined.

A compromised service can put symbolic links to other users' files there, FIFOs that block a reader, and endless files.
So no function here follows a link, blocks, or reads more than a limit.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

MAX_REGULAR_FILE_BYTES = 1 << 20
COPY_CHUNK_BYTES = 1 << 20
LOG_LINE_BYTES = 2000  # bytes read from the end of a log per requested line
MIN_DISK_RESERVE_BYTES = 64 * 2**20  # left free beside files of any size that are written
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
MAX_LOG_TAIL_BYTES = 64 * 2**20  # for any number of lines


def open_regular(file: Path) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises:
        OSError: if it is not a regular file (a link, a FIFO, ...) or cannot be opened.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{file} is not a regular file")
    return descriptor


def read_regular(file: Path, limit: int = MAX_REGULAR_FILE_BYTES) -> str:
    """Read the text of a small regular file.

    Raises:
        OSError: if it is not a regular file, or larger than the limit in bytes.
    """
    with os.fdopen(open_regular(file), "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise OSError(f"{file} has more than {limit} bytes")
    return data.decode(errors="replace")


def read_tail(file: Path, limit: int) -> str:
    """Read the last `limit` bytes of a regular file, such as a log, as text.

    Raises:
        OSError: if it is not a regular file, or cannot be read.
    """
    with os.fdopen(open_regular(file), "rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - limit))
        return stream.read(limit).decode(errors="replace")


def read_last_lines(file: Path, count: int, *, start: int = 0) -> list[str]:
    """Return the last lines of a log, at most `LOG_LINE_BYTES` for each, reading no byte before `start`.

    Raises:
        OSError: if it is not a regular file.
    """
    limit = min(count * LOG_LINE_BYTES, MAX_LOG_TAIL_BYTES)
    with os.fdopen(open_regular(file), "rb") as stream:
        stream.seek(max(start, os.fstat(stream.fileno()).st_size - limit))
        text = stream.read(limit).decode(errors="replace")
    return text.removesuffix("\n").split("\n")[-count:]


def open_log(file: Path) -> int:
    """Open a log for appending and return its descriptor; remove what has its name but is not a regular file.

    A hard link is removed as well, so that nothing is appended to a file outside this folder.

    Raises:
        OSError: if it cannot be opened or created.
    """
    append = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(OSError):  # a link, a FIFO, a folder, or nothing
        descriptor = os.open(file, append)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            return descriptor
        os.close(descriptor)
    remove_path(file)
    return os.open(file, append | os.O_CREAT | os.O_EXCL, 0o666)


def remove_path(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its content; do nothing if the path does not exist."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # POSIX reports PermissionError (EPERM) for a folder
        shutil.rmtree(path)


def copy_descriptor(source: int, target: Path) -> str:
    """Copy an open file to a new one, close the source, and return the sha256 of the copied bytes.

    Raises:
        OSError: if the target exists.
    """
    digest = hashlib.sha256()
    with os.fdopen(source, "rb") as stream, target.open("xb") as out:
        while chunk := stream.read(COPY_CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def name_file(file: Path) -> Iterator[None]:
    """Name a file in the error of a write to a full disk, in which the system names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in DISK_FULL_ERRNOS:
            error.filename = str(file)
        raise


@contextlib.contextmanager
def replace_when_written(file: Path) -> Iterator[Path]:
    """Yield a path beside a file, where nothing exists; the file written there replaces it at the end of the block.

    After an error the old file is unchanged.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    remove_path(scratch)
    with name_file(file):
        yield scratch
    scratch.replace(file)


def replace_file(file: Path, text: str) -> None:
    """Replace a file atomically, with default permissions; no link is followed."""
    # "x" for O_EXCL: fail if another process creates the path meanwhile.
    with replace_when_written(file) as scratch, scratch.open("x") as out:
        out.write(text)


def write_private(file: Path, text: str) -> None:
    """Write a file with mode 0600 atomically; a link at its path is replaced, never followed."""
    descriptor, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # 0600, O_EXCL, O_NOFOLLOW
    with name_file(file), os.fdopen(descriptor, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())  # without it, a power cut may leave the new name with an empty file
    os.replace(scratch, file)


def check_free_disk(folder: Path, subject: str, num_bytes: int) -> None:
    """Check that so many bytes fit on the disk of a folder.

    Raises:
        OSError: if they do not (ENOSPC); the message has the subject and the bytes.
    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if num_bytes > 0 and num_bytes + MIN_DISK_RESERVE_BYTES > free:
        raise OSError(
            errno.ENOSPC,
            f"{subject} needs {num_bytes:,} bytes, and the disk has {free:,} free, of which {MIN_DISK_RESERVE_BYTES:,} "
            "stay free; make room",
            str(folder),
        )

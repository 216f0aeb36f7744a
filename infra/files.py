"""Files in folders that a confined service writes, handled by processes that are not confined.

A service that was taken over can leave there symbolic links to other people's files, FIFOs that never answer, and files
without end. So nothing here follows a link, waits, or reads more than a limit.
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

MAX_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20


def open_regular(file: Path) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises:
        OSError: if it is a link, a FIFO or anything else, or cannot be opened.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{file} is not a regular file")
    return descriptor


def read_regular(file: Path, limit: int = MAX_BYTES) -> str:
    """Read the text of a small regular file.

    Raises:
        OSError: if it is not one, or larger than the limit.
    """
    with os.fdopen(open_regular(file), "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise OSError(f"{file} has more than {limit} bytes")
    return data.decode(errors="replace")


def copy_regular(source: Path, target: Path) -> str:
    """Copy a regular file to a new one and return the sha256 of what was copied.

    Raises:
        OSError: if the source is not a regular file, or the target exists.
    """
    digest = hashlib.sha256()
    with os.fdopen(open_regular(source), "rb") as stream, target.open("xb") as out:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read, in one step; a link at its place is replaced, never followed."""
    descriptor, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # 0600, O_EXCL, O_NOFOLLOW
    with os.fdopen(descriptor, "w") as out:
        out.write(text)
    os.replace(scratch, file)

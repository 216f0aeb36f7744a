"""A large body, kept in an unnamed file while it arrives, so that memory holds a piece of it at a time."""

import errno
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastapi import Request

from feedback.api.access import PortalBusy, begin_digest

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class ReceivedBody:
    """What a body and its request are known by."""

    sha256: str
    request_digest: str
    num_bytes: int


@contextmanager
def open_scratch_file(folder: Path) -> Iterator[BinaryIO]:
    """Open a file without a name in a folder; it is gone when the block ends, or the process.

    Raises:
        Busy: if the disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        raise PortalBusy(
            "the portal's disk has no room for the file now; try again later, or tell the operator"
        ) from None


async def receive_body(request: Request, file: BinaryIO) -> ReceivedBody:
    """Write a body into a file as it arrives; what comes at once is small, so no thread is needed."""
    content, asked, num_bytes = hashlib.sha256(), begin_digest(request), 0
    async for piece in request.stream():
        content.update(piece)
        asked.update(piece)
        file.write(piece)
        num_bytes += len(piece)
    return ReceivedBody(content.hexdigest(), asked.hexdigest(), num_bytes)

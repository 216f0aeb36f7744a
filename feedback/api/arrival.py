"""Receipt of large request bodies into an unnamed file, so that memory holds only one chunk at a time."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastapi import Request

from feedback.api.access import begin_digest
from feedback.api.transactions import PortalBusy
from infra.files import DISK_FULL_ERRNOS


@dataclass(frozen=True)
class ReceivedBody:
    """Record of a received body, whose bytes are in a file.

    Attributes:
        sha256: digest of the body.
        request_digest: digest of method, path, query and body; see `begin_digest`.
        num_bytes: size of the body.
    """

    sha256: str
    request_digest: str
    num_bytes: int


@contextmanager
def open_scratch_file(folder: Path) -> Iterator[BinaryIO]:
    """Open an unnamed temporary file in a folder; it is deleted when the block ends or the process exits.

    Raises:
        PortalBusy: if the disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        raise PortalBusy("the portal's disk has no room for the file now; retry later, or tell the operator") from None


async def receive_body(request: Request, file: BinaryIO) -> ReceivedBody:
    """Write a body to a file as it arrives; chunks are small, so the writes need no thread."""
    content, request_digest, num_bytes = hashlib.sha256(), begin_digest(request), 0
    async for chunk in request.stream():
        content.update(chunk)
        request_digest.update(chunk)
        file.write(chunk)
        num_bytes += len(chunk)
    return ReceivedBody(content.hexdigest(), request_digest.hexdigest(), num_bytes)

"""Records of the rows in the windows of each shard, in the object store under their sha256."""

import hashlib
import logging
from collections.abc import Collection
from datetime import datetime

from botocore.exceptions import ClientError

from infra.faults import OBJECT_STORE_ERRORS
from infra.object_store import READ_BUFFER_BYTES, ObjectStore, StoredObject, is_not_found
from yuan.data.row_shards import SHA256_PATTERN
from yuan.data.text import make_printable
from yuan.data.window_rows import WindowRows

log = logging.getLogger(__name__)

ROWS_KEY_PREFIX = "window-rows"


class RowRecords:
    """Store and fetch the rows of a shard's windows; one shard's are in memory at a time, 16 bytes for each row."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def store(self, rows: WindowRows) -> str:
        """Store a record if it is not there or damaged, and return its name."""
        content = rows.dump()
        name = hashlib.sha256(content).hexdigest()
        if self._compute_stored_sha256(name) != name:
            self._objects.put(f"{ROWS_KEY_PREFIX}/{name}", content)
        return name

    def _compute_stored_sha256(self, name: str) -> str | None:
        """Return the sha256 of a stored record, read as a stream; None if it is missing or cannot be read."""
        digest = hashlib.sha256()
        try:
            with self._objects.open_stream(f"{ROWS_KEY_PREFIX}/{name}") as stream:
                while chunk := stream.read(READ_BUFFER_BYTES):
                    digest.update(chunk)
        except OBJECT_STORE_ERRORS:
            return None
        return digest.hexdigest()

    def fetch(self, name: str) -> WindowRows | None:
        """Return a record; None if it is missing or damaged, so that its rows count as unread."""
        if not SHA256_PATTERN.fullmatch(name):
            return None
        try:
            content = self._objects.get(f"{ROWS_KEY_PREFIX}/{name}")
            if hashlib.sha256(content).hexdigest() != name:
                raise ValueError("its bytes have another sha256")
            return WindowRows.parse(content)
        except ClientError as error:
            if not is_not_found(error):
                raise
            log.warning("the record %s of the rows of a shard is missing; they count as unread", name[:12])
        except ValueError as error:
            reason = make_printable(str(error))
            log.warning("the record %s of the rows of a shard is damaged, they count as unread: %s", name[:12], reason)
        return None

    def list_unneeded(self, needed: Collection[str], stored_until: datetime) -> list[StoredObject]:
        """List the records whose names are not among the needed ones, but those stored later."""
        return [
            stored
            for stored in self._objects.list_objects(f"{ROWS_KEY_PREFIX}/")
            if stored.key.rpartition("/")[2] not in needed and stored.modified_at <= stored_until
        ]

"""Rows as a round stages them, stored by the check of a file sent in parts, so that no round parses the file again.

They are a shard of lines in the object store, from the check until the dataset is accepted. They are no more than a
copy of what the file says: where they are missing, damaged, or made by other rules, the file itself is parsed.
"""

import hashlib
import hmac
import json
import logging
from collections.abc import Generator
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.row_blocks import STAGED_COLUMNS, BlockResult, StagingRules
from feedback.states import DatasetState
from feedback.tables import Dataset
from infra.error_text import describe_error
from infra.faults import OBJECT_STORE_ERRORS
from infra.files import check_free_disk
from infra.object_store import ObjectStore, StoredObject
from yuan.data.row_shards import RowShard, ShardWriter, read_shard_chunks
from yuan.data.rows import KEY_RULE

log = logging.getLogger(__name__)

STAGED_ROWS_FOLDER = "staged-rows"


def make_staged_key(dataset_id: str) -> str:
    """Return the key of the object that has a dataset's staged rows."""
    return f"{STAGED_ROWS_FOLDER}/{dataset_id}"


class StagedRowsWriter(AbstractContextManager["StagedRowsWriter"]):
    """Collect the staged rows of one file on disk, and store them.

    No error of the disk or the store is raised: the rows are staged again when the dataset is accepted.

    Args:
        folder: for the file; the default is the system's for temporary files.
    """

    def __init__(self, rules: StagingRules, folder: Path | None = None) -> None:
        self.rules = rules
        self._folder = folder
        self._writer: ShardWriter | None = None

    def __enter__(self) -> Self:
        try:
            self._writer = ShardWriter(self._folder).__enter__()
        except OSError as error:
            self._give_up(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, traceback)

    def add(self, lines: bytes) -> None:
        """Add the rows of a block, as its result has them."""
        if self._writer is not None:
            try:
                check_free_disk(self._writer.path.parent, "the staged rows", len(lines))
                self._writer.add_lines(lines)
            except OSError as error:
                self._give_up(error)

    def store(self, objects: ObjectStore, dataset_id: str, sha256: str) -> dict[str, Any] | None:
        """Store the rows; return the record of them for the dataset's upload, or None if they are not stored.

        Args:
            sha256: of the file.
        """
        if self._writer is None:
            return None
        try:
            shard, path = self._writer.finish()
            with path.open("rb") as stream:
                stored_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                stream.seek(0)
                objects.put_file(make_staged_key(dataset_id), stream, shard.num_stored_bytes, stored_sha256)
        except (OSError, *OBJECT_STORE_ERRORS) as error:
            self._give_up(error)
            return None
        return {"rules": digest_rules(self.rules, sha256), "shard": shard.to_json()}

    def _give_up(self, error: Exception) -> None:
        log.warning("rows are not staged while the file is checked, but in a round: %s", describe_error(error))
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            self._writer = None


def digest_rules(rules: StagingRules, sha256: str) -> str:
    """Return a digest of all that the staged rows of a file depend on, from which the salt cannot be found."""
    fields = [sha256, KEY_RULE, metadata.version("cotrain"), STAGED_COLUMNS, rules.held_out_share]
    return hmac.digest(rules.salt.encode(), json.dumps(fields).encode(), "sha256").hex()


def find_staged_shard(record: dict[str, Any] | None, rules: StagingRules, sha256: str) -> RowShard | None:
    """Return the shard of a file's staged rows by their record; None if none are stored, or by other rules."""
    if record is None or record.get("rules") != digest_rules(rules, sha256):
        return None
    return RowShard.from_json(record["shard"])


def list_unneeded_staged_rows(session: Session, objects: ObjectStore) -> list[StoredObject]:
    """List the staged rows of datasets that no longer wait for their acceptance."""
    stored = {entry.key: entry for entry in objects.list_objects(f"{STAGED_ROWS_FOLDER}/")}
    waiting = select(Dataset.id).where(Dataset.state.in_((DatasetState.CHECKING, DatasetState.CHECKED)))
    needed = set(map(make_staged_key, session.scalars(waiting)))
    return [entry for key, entry in stored.items() if key not in needed]


def read_staged_rows(stored: BinaryIO, shard: RowShard) -> Generator[BlockResult]:
    """Yield the staged rows in chunks, which need not end with a row; keep none of them if an error comes later.

    Raises:
        ShardDamageError: if the stored bytes are not those of the shard.
    """
    for chunk in read_shard_chunks(stored, shard):
        yield BlockResult(chunk.count(b"\n"), 0, [], chunk)

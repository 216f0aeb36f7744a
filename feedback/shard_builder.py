"""Build the shards of a mixture from their inputs, one by one, and use those again whose inputs are the same."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import delete
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session, sessionmaker

from feedback.datasets import UPLOADS_FOLDER
from feedback.items import MAX_NAMED_ROWS, describe_item_error
from feedback.mixture_plan import (
    CorrectionGroup,
    MixturePlan,
    ShardInput,
    ShardPlan,
    digest_numbers,
    read_selected_numbers,
    stream_corrections,
)
from feedback.tables import REPORTS_SUITE, Case, StoredShard
from feedback.upload_segments import read_segment_rows
from infra.faults import is_item_error
from infra.object_store import ObjectStore
from yuan.data.row_shards import RowShard, ShardWriter
from yuan.data.rows import BadRow, Row, dump_rows

log = logging.getLogger(__name__)

SHARDS_FOLDER = "shards"


class SelectionChangedError(Exception):
    """The records have changed since the plan was made, so that a shard would have other rows than the plan says."""


class InputFaultError(Exception):
    """A dataset cannot be read, so that a shard cannot be built with it."""

    def __init__(self, dataset_id: str, error: Exception) -> None:
        super().__init__(f"dataset {dataset_id} cannot be read ({type(error).__name__})")
        self.dataset_id = dataset_id
        self.error = error


@dataclass(frozen=True)
class ShardFault:
    """Selected rows that a shard lacks, since they are no valid rows.

    Attributes:
        subject: the number of the input among the shard's, or the id of the correction's case.
        count: number of these rows.
        reasons: of the first 20 of them.
    """

    subject: str
    count: int
    reasons: tuple[str, ...]

    @classmethod
    def from_json(cls, data: Any) -> "ShardFault":
        return cls(str(data["subject"]), int(data["count"]), tuple(map(str, data["reasons"])))


@dataclass(frozen=True)
class BuiltShard:
    """The result of building a shard; `shard` is None if none of the selected rows is valid."""

    shard: RowShard | None
    faults: tuple[ShardFault, ...]
    is_reused: bool = False


def make_shard_key(sha256: str) -> str:
    """Return the key of a shard in the object store."""
    return f"{SHARDS_FOLDER}/{sha256}"


def find_built_shard(session: Session, objects: ObjectStore, input_digest: str) -> BuiltShard | None:
    """Return the shard that was built from these inputs; None if there is none, or its object is lost or changed."""
    stored = session.get(StoredShard, input_digest)
    if stored is None:
        return None
    faults = tuple(map(ShardFault.from_json, stored.faults))
    if stored.num_rows == 0:
        return BuiltShard(None, faults, is_reused=True)
    if objects.find_size(make_shard_key(stored.sha256)) != stored.num_stored_bytes:
        log.warning("shard %s is lost or has another size in the object store; building it again", stored.sha256[:12])
        return None
    shard = RowShard(stored.sha256, stored.num_rows, stored.num_bytes, stored.num_stored_bytes)
    return BuiltShard(shard, faults, is_reused=True)


def forget_shard(session: Session, sha256: str) -> None:
    """Delete the entries of a damaged shard, so that the next freeze builds it again and stores it over its object.

    The object stays: a failed read may be the damage of this machine.
    """
    session.execute(delete(StoredShard).where(StoredShard.sha256 == sha256))


def build_shard(
    sessions: sessionmaker[Session], objects: ObjectStore, scratch: Path, plan: MixturePlan, shard_plan: ShardPlan
) -> BuiltShard:
    """Read the inputs as streams, write the shard, store its object, and record it under the digest of its inputs.

    The memory it takes does not depend on the sizes of uploads and shards, but for the numbers of the selected rows, of
    four bytes each. A process that is killed leaves no record of the shard.

    Args:
        scratch: folder of the compressed file until it is stored.

    Raises:
        InputFaultError: if a dataset cannot be read.
        SelectionChangedError: if the records select other rows than the plan.
    """
    with ShardWriter(scratch) as writer:
        if shard_plan.corrections is not None:
            with sessions() as session:
                faults = list(_write_corrections(session, plan, shard_plan.corrections, writer))
        else:
            faults = []
            for number, item in enumerate(shard_plan.inputs):
                fault = _write_input(sessions, objects, plan, shard_plan, item, writer)
                if fault is not None:
                    faults.append(ShardFault(str(number), fault.count, fault.reasons))
        shard, path = writer.finish()
        if shard.num_rows:  # also over an object of this name: one that was damaged may have the same size
            with path.open("rb") as stream:
                objects.put_stream(make_shard_key(shard.sha256), stream)
    values = {
        "sha256": shard.sha256,
        "num_rows": shard.num_rows,
        "num_bytes": shard.num_bytes,
        "num_stored_bytes": shard.num_stored_bytes,
        "faults": [asdict(fault) for fault in faults],
    }
    with sessions.begin() as session:
        insertion = upsert(StoredShard).values(input_digest=shard_plan.digest, **values)
        session.execute(insertion.on_conflict_do_update(index_elements=["input_digest"], set_=values))
    return BuiltShard(shard if shard.num_rows else None, tuple(faults))


def _write_input(
    sessions: sessionmaker[Session],
    objects: ObjectStore,
    plan: MixturePlan,
    shard_plan: ShardPlan,
    item: ShardInput,
    writer: ShardWriter,
) -> ShardFault | None:
    """Write the selected rows of a segment, and return those that are no valid rows."""
    with sessions() as session:
        numbers = read_selected_numbers(session, plan, shard_plan, item)
    if digest_numbers(numbers) != item.selection:
        raise SelectionChangedError(f"dataset {item.dataset_id}")
    try:
        with objects.open_stream(
            f"{UPLOADS_FOLDER}/{item.upload_sha256}", item.segment.start_byte, item.segment.end_byte
        ) as stream:
            return _write_selected_rows(read_segment_rows(stream, item.segment), iter(numbers), writer)
    except Exception as error:
        if not is_item_error(error):
            raise
        raise InputFaultError(item.dataset_id, error) from error


def _write_selected_rows(
    rows: Iterator[tuple[int, Row | BadRow]], numbers: Iterator[int], writer: ShardWriter
) -> ShardFault | None:
    num_faults, reasons = 0, list[str]()
    next_number = next(numbers, None)
    for number, row in rows:
        if number != next_number:
            continue
        next_number = next(numbers, None)
        if isinstance(row, Row):
            writer.add(dump_rows([row]))
            continue
        num_faults += 1
        if len(reasons) < MAX_NAMED_ROWS:
            reasons.append(f"row {row.row}: {row.reason}")
    if next_number is not None:
        raise ValueError(f"the file has no row {next_number + 1}, which its records name; push the file again")
    return ShardFault("", num_faults, tuple(reasons)) if num_faults else None


def _write_corrections(
    session: Session, plan: MixturePlan, group: CorrectionGroup, writer: ShardWriter
) -> Iterator[ShardFault]:
    """Write the row of each correction, and yield the faults of those that are no valid rows."""
    digest = hashlib.sha256()
    for case, case_digest in stream_corrections(session, plan.scope, group.number):
        digest.update(case_digest)
        try:
            line = dump_rows([make_correction_row(case)])
        except Exception as error:
            if not is_item_error(error):
                raise
            yield ShardFault(case.id, 1, (describe_item_error(error),))
        else:
            writer.add(line)
    if digest.hexdigest() != group.selection:
        raise SelectionChangedError(f"group {group.number} of the corrections")


def make_correction_row(case: Case) -> Row:
    """Return the row that teaches the expected answer of a train case.

    Raises:
        ValueError: if it is no valid row by today's rules.
    """
    fields = {"prompt": case.prompt, "answer": case.expected, "source": REPORTS_SUITE, "checker": case.checker}
    return Row.model_validate(fields)

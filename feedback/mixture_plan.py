"""The plan of a mixture: which rows of which records each shard takes, selected in SQL; no row's text is read.

A shard's rows depend on its own inputs only. So its boundaries are stable: an upload from the target size is cut into
segments by itself. Smaller datasets of a purpose, and the cases of reports, are grouped by their generation, that is by
the snapshots frozen before they were accepted, and then by the bytes of those before them in it, withdrawn ones
included. So what is new since the last snapshot is in shards, and windows, of its own: that the model has not read it
changes nothing in how often the rest was read.
"""

import hashlib
import json
import sys
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ARRAY,
    TIMESTAMP,
    ColumnElement,
    Integer,
    LargeBinary,
    Select,
    Subquery,
    Text,
    cast,
    func,
    literal,
    literal_column,
    or_,
    select,
    union,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.orm import Session

from feedback.states import CaseRole, DatasetPurpose, DatasetState, ReportState, RowRole
from feedback.tables import REPORTS_SUITE, Case, ConversationPrompt, Dataset, DatasetRow, Feedback, Snapshot
from feedback.upload_segments import SegmentRange, count_segments, find_segments, make_whole_segment
from yuan.data.row_shards import SHARD_TARGET_BYTES
from yuan.data.rows import KEY_RULE, make_prompt_key

SHARD_RULE = 1  # version of how rows are read, validated and written into shards; a new one rewrites every shard
PART_PURPOSES = {"datasets": DatasetPurpose.MIXTURE, "base": DatasetPurpose.BASE}
BLANK_PROMPT_KEY = make_prompt_key("")
GENERATION_GROUPS = 2**20  # numbers of groups that a generation of corrections has to itself
STREAMED_ROWS = 10_000  # per round trip of a cursor
NO_BYTES: ColumnElement[bytes] = literal_column("''::bytea", LargeBinary)


@dataclass(frozen=True)
class MixtureScope:
    """The records from which a round's mixture is made.

    Attributes:
        cut_off: corrections of later reports are left out.
        seed: of the sample of the base.
        max_replay_rows: rows of the base at most; None: all.
        excluded_ids: datasets that could not be read.
        target_bytes: of an upload for a shard of its own.
    """

    cut_off: datetime
    seed: int
    max_replay_rows: int | None = None
    excluded_ids: frozenset[str] = frozenset()
    target_bytes: int = SHARD_TARGET_BYTES


@dataclass(frozen=True)
class ShardInput:
    """The rows of a segment of an upload that a shard takes.

    Attributes:
        num_rows: number of these rows.
        selection: sha256 of their numbers, each as four bytes, in order.
    """

    dataset_id: str
    upload_sha256: str
    segment: SegmentRange
    num_rows: int
    selection: str


@dataclass(frozen=True)
class CorrectionGroup:
    """The corrections that a shard takes.

    Attributes:
        number: the number of the group of cases.
        num_rows: number of cases.
        selection: sha256 of the sha256 of each case's prompt, answer and checker, in order.
    """

    number: int
    num_rows: int
    selection: str


@dataclass(frozen=True)
class ShardPlan:
    """The inputs of one shard: segments of uploads, or a group of corrections."""

    part: str
    inputs: tuple[ShardInput, ...] = ()
    corrections: CorrectionGroup | None = None

    @property
    def num_rows(self) -> int:
        group = self.corrections.num_rows if self.corrections else 0
        return group + sum(segment_input.num_rows for segment_input in self.inputs)

    @property
    def digest(self) -> str:
        """Return the digest of the inputs; equal inputs give equal shards."""
        if self.corrections is not None:
            sources: list[list[str | int]] = [["corrections", self.corrections.selection]]
        else:
            sources = [
                [item.upload_sha256, item.segment.first_row, item.segment.sha256, item.selection]
                for item in self.inputs
            ]
        return hashlib.sha256(json.dumps([SHARD_RULE, KEY_RULE, sources]).encode()).hexdigest()


@dataclass(frozen=True)
class DatasetSelection:
    """Numbers of a dataset's train rows.

    Attributes:
        num_train: train rows, with those that are left out.
        num_decontaminated: train rows that have the prompt of a held-out case.
    """

    dataset_id: str
    part: str
    num_train: int
    num_decontaminated: int


@dataclass(frozen=True)
class UncutUpload:
    """A large upload whose segments are not recorded yet."""

    dataset_id: str
    upload_sha256: str
    num_bytes: int
    num_segments: int


@dataclass(frozen=True)
class MixturePlan:
    """The shards of a round's mixture, and the numbers of rows it leaves out.

    Attributes:
        shards: in the order of the snapshot.
        datasets: those that have train rows.
        num_decontaminated_corrections: number of train cases that have the prompt of a held-out case.
        replay_limit: the greatest salted hash of a base row in the sample; None: all rows are.
        uncut_uploads: if there are any, the plan lacks their rows; cut them and plan again.
    """

    scope: MixtureScope
    shards: tuple[ShardPlan, ...]
    datasets: tuple[DatasetSelection, ...]
    num_decontaminated_corrections: int
    replay_limit: bytes | None
    uncut_uploads: tuple[UncutUpload, ...]


@dataclass(frozen=True)
class _SegmentCount:
    """The train rows of a dataset in one of its segments; `num_kept` is without those that are left out."""

    dataset_id: str
    segment: int
    num_train: int
    num_decontaminated: int
    num_kept: int
    selection: str


@dataclass(frozen=True)
class _PartPlan:
    shards: list[ShardPlan]
    datasets: list[DatasetSelection]
    uncut_uploads: list[UncutUpload]


def plan_mixture(session: Session, scope: MixtureScope) -> MixturePlan:
    """Select the rows of a mixture and group them into shards; takes seconds for millions of rows."""
    groups, num_decontaminated = _plan_corrections(session, scope)
    replay_limit = _find_replay_limit(session, scope)
    parts = [_plan_part(session, scope, part, replay_limit) for part in PART_PURPOSES]
    corrections = [ShardPlan("corrections", corrections=group) for group in groups]
    return MixturePlan(
        scope=scope,
        shards=(*corrections, *(shard for part in parts for shard in part.shards)),
        datasets=tuple(selection for part in parts for selection in part.datasets),
        num_decontaminated_corrections=num_decontaminated,
        replay_limit=replay_limit,
        uncut_uploads=tuple(upload for part in parts for upload in part.uncut_uploads),
    )


def read_selected_numbers(session: Session, plan: MixturePlan, shard: ShardPlan, item: ShardInput) -> "array[int]":
    """Return the numbers of the rows that an input selects; four bytes each, which a segment bounds."""
    contaminated = _select_contaminated_rows()
    segment = item.segment
    query = (
        _select_train_rows(contaminated, DatasetRow.number)
        .where(DatasetRow.dataset_id == item.dataset_id, DatasetRow.number >= segment.first_row)
        .where(_is_kept(contaminated, plan.scope, plan.replay_limit if shard.part == "base" else None))
        .order_by(DatasetRow.number)
    )
    if segment.end_row is not None:
        query = query.where(DatasetRow.number < segment.end_row)
    return array("i", session.scalars(query.execution_options(yield_per=STREAMED_ROWS)))


def digest_numbers(numbers: "array[int]") -> str:
    """Return the sha256 by which an input names its selected rows; see `ShardInput.selection`."""
    big_endian = array("i", numbers)
    if sys.byteorder == "little":
        big_endian.byteswap()
    return hashlib.sha256(big_endian.tobytes()).hexdigest()


def stream_corrections(session: Session, scope: MixtureScope, group: int) -> Iterator[tuple[Case, bytes]]:
    """Yield the train cases of a group in order, each with the sha256 of its content, from a cursor."""
    held_out, cases = _select_held_out_prompts(), _group_cases(session, scope)
    query = _select_corrections(scope, held_out, cases, Case, _hash_case())
    query = query.where(cases.c.group == group, held_out.c.prompt_key.is_(None))
    rows = session.execute(query.order_by(Case.created_at, Case.key).execution_options(yield_per=STREAMED_ROWS // 10))
    for case, digest in rows:
        yield case, digest
        session.expunge(case)  # else the session keeps every case that it has read


def select_decontaminated_reports() -> Select[tuple[str]]:
    """Select the ids of accepted reports whose correction is left out, since its prompt is that of a held-out case."""
    held_out = _select_held_out_prompts()
    query = select(Feedback.id).join(Case, Case.id == Feedback.case_id)
    query = query.join(held_out, held_out.c.prompt_key == Case.prompt_key)
    return query.where(
        Feedback.state == ReportState.ACCEPTED, Case.suite == REPORTS_SUITE, Case.role == CaseRole.TRAIN
    ).order_by(Feedback.id)


def _select_held_out_prompts() -> Subquery:
    """Select the keys of the prompts that only test; that of the empty prompt is none, as documents have it."""
    query = select(Case.prompt_key).where(Case.role == CaseRole.HELD_OUT, Case.withdrawn_at.is_(None))
    return query.where(Case.prompt_key != BLANK_PROMPT_KEY).distinct().subquery("held_out")


def _select_contaminated_rows() -> Subquery:
    """Select the places of the rows of datasets that train an answer to a held-out prompt."""
    held_out = _select_held_out_prompts()
    rows = select(DatasetRow.dataset_id, DatasetRow.number)
    rows = rows.join(held_out, held_out.c.prompt_key == DatasetRow.prompt_key)
    conversations = select(ConversationPrompt.dataset_id, ConversationPrompt.number)
    conversations = conversations.join(held_out, held_out.c.prompt_key == ConversationPrompt.prompt_key)
    return union(rows, conversations).subquery("contaminated")


def _read_freezing_times(session: Session) -> Sequence[datetime]:
    """Return when each snapshot was frozen, in order; what was accepted between two of them is a generation."""
    return session.scalars(select(Snapshot.created_at).order_by(Snapshot.created_at)).all()


def _group_cases(session: Session, scope: MixtureScope) -> Subquery:
    """Select every train case of a report, withdrawn ones too, with the number of its group."""
    frozen_at = literal(list(_read_freezing_times(session)), ARRAY(TIMESTAMP(timezone=True)))
    generation = func.width_bucket(Case.created_at - timedelta(microseconds=1), frozen_at)  # snapshots before it
    num_bytes = func.octet_length(Case.prompt) + func.octet_length(Case.expected)
    sized = (
        select(Case.id, Case.created_at, Case.key, num_bytes.label("num_bytes"), generation.label("generation"))
        .where(Case.suite == REPORTS_SUITE, Case.role == CaseRole.TRAIN)
        .subquery("sized")
    )
    num_bytes_until = func.sum(sized.c.num_bytes).over(
        partition_by=sized.c.generation, order_by=(sized.c.created_at, sized.c.key)
    )
    num_bytes_before = num_bytes_until - sized.c.num_bytes
    group = (sized.c.generation * GENERATION_GROUPS + num_bytes_before // scope.target_bytes).label("group")
    return select(sized.c.id, group).subquery("cases")


def _select_corrections(scope: MixtureScope, held_out: Subquery, cases: Subquery, *columns: Any) -> Select[Any]:
    """Select columns of the cases of accepted reports."""
    accepted = select(Feedback.case_id).where(
        Feedback.state == ReportState.ACCEPTED, Feedback.created_at <= scope.cut_off
    )
    query = select(*columns).select_from(Case).join(cases, cases.c.id == Case.id)
    query = query.outerjoin(held_out, held_out.c.prompt_key == Case.prompt_key)
    return query.where(Case.id.in_(accepted))


def _hash_case() -> ColumnElement[bytes]:
    """Hash what a case's row is made of."""
    content = cast(func.jsonb_build_array(Case.prompt, Case.expected, Case.checker), Text)
    return func.sha256(func.convert_to(content, "UTF8"))


def _plan_corrections(session: Session, scope: MixtureScope) -> tuple[list[CorrectionGroup], int]:
    """Return the groups of corrections that have rows, and the number of decontaminated corrections."""
    held_out, cases = _select_held_out_prompts(), _group_cases(session, scope)
    is_kept = held_out.c.prompt_key.is_(None)
    hashes = func.string_agg(_hash_case(), aggregate_order_by(NO_BYTES, Case.created_at, Case.key))
    columns = (cases.c.group, func.count(), func.count().filter(is_kept), _hash_in_hex(hashes.filter(is_kept)))
    rows = session.execute(_select_corrections(scope, held_out, cases, *columns).group_by(cases.c.group)).all()
    groups = [CorrectionGroup(int(group), kept, selection) for group, _, kept, selection in sorted(rows) if kept]
    return groups, sum(count - kept for _, count, kept, _ in rows)


def _select_train_rows(contaminated: Subquery, *columns: Any) -> Select[Any]:
    place = contaminated.c.dataset_id, contaminated.c.number
    query = select(*columns).select_from(DatasetRow)
    query = query.outerjoin(contaminated, (place[0] == DatasetRow.dataset_id) & (place[1] == DatasetRow.number))
    return query.where(DatasetRow.role == RowRole.TRAIN)


def _is_kept(contaminated: Subquery, scope: MixtureScope, replay_limit: bytes | None) -> ColumnElement[bool]:
    """Return the condition that a train row is in the mixture."""
    is_clean = contaminated.c.number.is_(None)
    return is_clean if replay_limit is None else is_clean & (_hash_for_replay(scope) <= replay_limit)


def _hash_for_replay(scope: MixtureScope) -> ColumnElement[bytes]:
    """Hash a row's key with the round's seed: the rows with the lowest hashes are replayed."""
    return func.sha256(func.convert_to(literal(f"replay {scope.seed} ") + DatasetRow.key, "UTF8"))


def _find_replay_limit(session: Session, scope: MixtureScope) -> bytes | None:
    """Return the greatest hash of a base row in the sample; None if all rows are in it."""
    if scope.max_replay_rows is None:
        return None
    if scope.max_replay_rows == 0:
        return b""  # below every hash
    contaminated, row_hash = _select_contaminated_rows(), _hash_for_replay(scope)
    query = _select_train_rows(contaminated, row_hash).where(contaminated.c.number.is_(None))
    query = query.where(DatasetRow.dataset_id.in_(_select_usable(scope, DatasetPurpose.BASE)))
    limit: bytes | None = session.scalar(query.order_by(row_hash).offset(scope.max_replay_rows - 1).limit(1))
    return limit


def _select_usable(scope: MixtureScope, purpose: DatasetPurpose) -> Select[tuple[str]]:
    query = select(Dataset.id).where(Dataset.state == DatasetState.ACCEPTED, Dataset.purpose == purpose)
    return query.where(Dataset.id.not_in(scope.excluded_ids)) if scope.excluded_ids else query


def _select_decided(purpose: DatasetPurpose) -> Select[tuple[str, str, int, str, datetime]]:
    """Select every dataset that was ever accepted, or rejected later than on arrival, in the order of decision.

    A dataset never leaves this list, so it never moves the others from one group to another.
    """
    decided_at = func.coalesce(Dataset.decided_at, Dataset.created_at)  # early releases did not store it
    query = select(Dataset.id, Dataset.sha256, Dataset.num_bytes, Dataset.state, decided_at)
    query = query.where(Dataset.purpose == purpose)
    query = query.where(or_(Dataset.state == DatasetState.ACCEPTED, Dataset.decided_at.is_not(None)))
    return query.order_by(decided_at, Dataset.created_at, Dataset.id)


def _plan_part(session: Session, scope: MixtureScope, part: str, replay_limit: bytes | None) -> _PartPlan:
    """Plan the shards of the datasets of a purpose: those of large uploads, then those of groups of small ones."""
    purpose = PART_PURPOSES[part]
    limit = replay_limit if part == "base" else None
    small_ids = _select_usable(scope, purpose).where(Dataset.num_bytes < scope.target_bytes)
    small_counts = _count_rows(session, scope, DatasetRow.dataset_id.in_(small_ids), limit)
    counts_by_dataset = {count.dataset_id: [count] for count in small_counts}

    inputs: defaultdict[tuple[int, int, int, int], list[ShardInput]] = defaultdict(list)  # by the shard's place
    selections: list[DatasetSelection] = []
    uncut_uploads: list[UncutUpload] = []
    frozen_at = _read_freezing_times(session)
    num_small_bytes: defaultdict[int, int] = defaultdict(int)  # of each generation
    for position, (dataset_id, sha256, num_bytes, state, decided_at) in enumerate(
        session.execute(_select_decided(purpose)).all()
    ):
        is_small = num_bytes < scope.target_bytes
        place = (0, 0, position)
        if is_small:
            generation = bisect_left(frozen_at, decided_at)
            place = (1, generation, num_small_bytes[generation] // scope.target_bytes)
            num_small_bytes[generation] += num_bytes
        if state != DatasetState.ACCEPTED or dataset_id in scope.excluded_ids:
            continue

        num_segments = count_segments(num_bytes, scope.target_bytes)
        segments: tuple[SegmentRange, ...] = (make_whole_segment(sha256),)
        if num_segments > 1:
            segments = find_segments(session, sha256, num_segments)
        if not segments:
            uncut_uploads.append(UncutUpload(dataset_id, sha256, num_bytes, num_segments))
            continue
        if is_small:
            counts = counts_by_dataset.get(dataset_id, [])
        else:
            counts = _count_rows(session, scope, DatasetRow.dataset_id == dataset_id, limit, segments)

        if counts:
            num_train = sum(count.num_train for count in counts)
            num_decontaminated = sum(count.num_decontaminated for count in counts)
            selections.append(DatasetSelection(dataset_id, part, num_train, num_decontaminated))
        for count in counts:
            if count.num_kept:
                segment = segments[count.segment]
                item = ShardInput(dataset_id, sha256, segment, count.num_kept, count.selection)
                inputs[*place, count.segment].append(item)
    shards = [ShardPlan(part, inputs=tuple(inputs[place])) for place in sorted(inputs)]
    return _PartPlan(shards, selections, uncut_uploads)


def _count_rows(
    session: Session,
    scope: MixtureScope,
    condition: ColumnElement[bool],
    replay_limit: bytes | None,
    segments: Sequence[SegmentRange] = (),
) -> list[_SegmentCount]:
    """Count the train rows of the datasets that a condition selects, by dataset and segment, in order.

    Args:
        segments: of the one dataset; without any, each dataset is one segment.
    """
    contaminated = _select_contaminated_rows()
    segment: ColumnElement[int] = literal(0)
    if segments:
        first_rows = literal([segment.first_row for segment in segments], ARRAY(Integer))
        segment = func.width_bucket(DatasetRow.number, first_rows) - 1
    is_clean, is_kept = contaminated.c.number.is_(None), _is_kept(contaminated, scope, replay_limit)
    columns = (segment.label("segment"), is_clean.label("is_clean"), is_kept.label("is_kept"))
    rows = (
        _select_train_rows(contaminated, DatasetRow.dataset_id, DatasetRow.number, *columns).where(condition).subquery()
    )

    numbers = func.string_agg(func.int4send(rows.c.number), aggregate_order_by(NO_BYTES, rows.c.number))
    query = select(
        rows.c.dataset_id,
        rows.c.segment,
        func.count(),
        func.count().filter(~rows.c.is_clean),
        func.count().filter(rows.c.is_kept),
        _hash_in_hex(numbers.filter(rows.c.is_kept)),
    )
    grouped = query.group_by(rows.c.dataset_id, rows.c.segment).order_by(rows.c.dataset_id, rows.c.segment)
    return [_SegmentCount(*row) for row in session.execute(grouped)]


def _hash_in_hex(value: ColumnElement[bytes]) -> ColumnElement[str]:
    return func.encode(func.sha256(value), "hex")

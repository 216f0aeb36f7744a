"""The platform's database tables, as SQLAlchemy classes.

Only states that cannot be derived are stored; a report's history (failing in v5, fixed in v6) is derived from case
results. A verdict is stored with its notice, which was delivered as it stands.
"""

import uuid
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, ForeignKey, ForeignKeyConstraint, Index, UniqueConstraint, false, func, select, text
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from feedback.round_steps import RoundStep
from feedback.states import (
    AccountRole,
    CaseRole,
    DatasetPurpose,
    DatasetState,
    ReportState,
    RoundState,
    RowRole,
    list_values,
)
from feedback.verdicts import Verdict
from yuan.data.rows import KEY_RULE

JsonbObject = dict[str, Any]
# The platform's suites of cases: made from reports, from rows of the base, and from rows of the other datasets.
REPORTS_SUITE = "reports"
BASE_SUITE = "base"
DATASETS_SUITE = "datasets"


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {JsonbObject: JSONB, list[Any]: JSONB, datetime: TIMESTAMP(timezone=True)}


def new_id() -> str:
    """Return a random id; it cannot be guessed, so an id in a URL reveals nothing about other records."""
    return uuid.uuid4().hex


def read_transaction_time(session: Session) -> datetime:
    """Return the start time of the session's transaction, by the clock of the database."""
    return session.scalars(select(func.now())).one()


def transaction_time() -> Any:
    """Return an SQL expression for the start time of the transaction, by the clock of the database.

    Every stored time is by this clock, so that a timeline is in order whichever host wrote its events.
    """
    return func.now()


class Created:
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Contributor(Created, Base):
    __tablename__ = "contributor"
    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str] = mapped_column(default=AccountRole.CONTRIBUTOR, comment=list_values(AccountRole))


class ApiToken(Created, Base):
    """An API token, stored as its sha256; it has 256 random bits, so a slow password hash is not needed."""

    __tablename__ = "api_token"
    digest: Mapped[str] = mapped_column(primary_key=True)
    contributor_id: Mapped[str] = mapped_column(ForeignKey("contributor.id"))
    name: Mapped[str]
    revoked_at: Mapped[datetime | None]
    contributor: Mapped[Contributor] = relationship(lazy="joined")  # every request needs both


class IdempotencyKey(Created, Base):
    """The record that the first request with a key created; a repeated request returns the same record."""

    __tablename__ = "idempotency_key"
    contributor_id: Mapped[str] = mapped_column(ForeignKey("contributor.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_digest: Mapped[str]
    record_id: Mapped[str]


class Response(Created, Base):
    """A response that the champion returned through /v1."""

    __tablename__ = "response"
    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    contributor_id: Mapped[str] = mapped_column(ForeignKey("contributor.id"), index=True)
    model_version: Mapped[int]
    prompt: Mapped[str]
    response: Mapped[str]


class Feedback(Created, Base):
    """One report; `body` is its `FeedbackIn` JSON."""

    __tablename__ = "feedback"
    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    contributor_id: Mapped[str] = mapped_column(ForeignKey("contributor.id"))
    kind: Mapped[str]
    body: Mapped[JsonbObject]
    state: Mapped[str] = mapped_column(default=ReportState.RECEIVED, index=True)
    reason: Mapped[str | None]
    screening: Mapped[str | None]
    reproduction: Mapped[str | None]
    reproduced_version: Mapped[int | None]
    reproduced_response: Mapped[str | None]
    reproduced_at: Mapped[datetime | None]
    decided_at: Mapped[datetime | None] = mapped_column(comment="accepted, rejected or disputed, the last time")
    case_id: Mapped[str | None] = mapped_column(ForeignKey("case.id"), index=True)
    case: Mapped["Case | None"] = relationship()
    disputed_key: Mapped[str | None] = mapped_column(comment="while disputed: the prompt key of the other's case")

    @property
    def fields(self) -> JsonbObject:
        """Return the body; empty if a damaged record holds no object, which must not fail the others."""
        return self.body if isinstance(self.body, dict) else {}

    __table_args__ = (
        Index("feedback_in_order", "contributor_id", "created_at", "id"),
        Index("disputed_feedback", "disputed_key", postgresql_where=text(f"state = '{ReportState.DISPUTED}'")),
    )


class Dataset(Created, Base):
    """An uploaded file of rows; once checked its bytes, unless refused, are in the store under `uploads/SHA256`."""

    __tablename__ = "dataset"
    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    contributor_id: Mapped[str] = mapped_column(ForeignKey("contributor.id"))
    name: Mapped[str]
    purpose: Mapped[str] = mapped_column(comment=list_values(DatasetPurpose))
    state: Mapped[str] = mapped_column(comment=list_values(DatasetState))
    reason: Mapped[str | None]
    sha256: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    num_stored_bytes: Mapped[int] = mapped_column(BigInteger, comment="none of a file that was refused when it came")
    num_rows: Mapped[int] = mapped_column(default=0)
    num_duplicates: Mapped[int] = mapped_column(default=0)
    num_closed_out: Mapped[int] = mapped_column(default=0, comment="of the newest mixture, by held-out cases")
    bad_rows: Mapped[list[Any]] = mapped_column(default=list)
    decided_at: Mapped[datetime | None] = mapped_column(comment="accepted or rejected")
    key_rule: Mapped[int] = mapped_column(default=KEY_RULE, comment="version of the rule of its rows' keys")
    __table_args__ = (Index("datasets_in_order", "contributor_id", "created_at", "id"),)


class DatasetUpload(Base):
    """The upload of a dataset that is sent in parts; until its check they are in the store under `uploading/ID`."""

    __tablename__ = "dataset_upload"
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), primary_key=True)
    part_bytes: Mapped[int] = mapped_column(BigInteger, comment="of every part but the last")
    store_upload: Mapped[str | None] = mapped_column(comment="id of the store's multipart upload")
    active_at: Mapped[datetime] = mapped_column(server_default=func.now(), comment="when its owner last sent a request")
    num_received_bytes: Mapped[int] = mapped_column(BigInteger, default=0, comment="as the store last listed them")
    received_at: Mapped[datetime | None] = mapped_column(comment="complete")
    num_checks: Mapped[int] = mapped_column(default=0, comment="how often its check began")
    num_checked_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    copy_began_at: Mapped[datetime | None] = mapped_column(comment="since then its file may be under uploads/SHA256")
    checked_at: Mapped[datetime | None]
    staged_rows: Mapped[JsonbObject | None] = mapped_column(comment="shard of its rows as a round stages them")
    released_at: Mapped[datetime | None] = mapped_column(comment="when its parts or its unchecked file were deleted")
    __table_args__ = (Index("open_uploads", "dataset_id", postgresql_where=text("released_at is null")),)


class DatasetRow(Base):
    """Position and keys of one row of an accepted dataset; its text stays in the object store."""

    __tablename__ = "dataset_row"
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    key: Mapped[str]
    prompt_key: Mapped[str]
    role: Mapped[str] = mapped_column(comment=list_values(RowRole))
    # Keys are hashes that are only compared; of 64 characters each, a hash index has a quarter of a B-tree's bytes.
    __table_args__ = (
        Index("ix_dataset_row_key", "key", postgresql_using="hash"),
        Index("ix_dataset_row_prompt_key", "prompt_key", postgresql_using="hash"),
        Index("held_out_rows", "dataset_id", postgresql_where=text(f"role = '{RowRole.HELD_OUT}'")),
    )


class ConversationPrompt(Base):
    """The key of a prompt that a conversation trains an answer to, besides the one of its row: an earlier question."""

    __tablename__ = "conversation_prompt"
    dataset_id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    prompt_key: Mapped[str] = mapped_column(primary_key=True)
    __table_args__ = (
        ForeignKeyConstraint(["dataset_id", "number"], ["dataset_row.dataset_id", "dataset_row.number"]),
        Index("ix_conversation_prompt_prompt_key", "prompt_key", postgresql_using="hash"),
    )


class Case(Created, Base):
    """A prompt with a checker, on which every later version is tested until all its owners withdraw it.

    Its role never changes.
    """

    __tablename__ = "case"
    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    suite: Mapped[str] = mapped_column(index=True, comment="reports, or the name of a dataset")
    key: Mapped[str]
    prompt_key: Mapped[str] = mapped_column(index=True)
    prompt: Mapped[str]
    expected: Mapped[str]
    checker: Mapped[JsonbObject]
    role: Mapped[str] = mapped_column(comment=list_values(CaseRole))
    capability: Mapped[str | None]
    withdrawn_at: Mapped[datetime | None] = mapped_column(comment="since then no report or dataset has it")
    key_rule: Mapped[int] = mapped_column(default=KEY_RULE, comment="version of the rule of its keys")
    __table_args__ = (UniqueConstraint("suite", "key"),)


class ModelVersion(Created, Base):
    """A registered version, of a round or of weights from elsewhere, whose files are complete in the registry.

    Its number is the one that MLflow assigned at the first registration.
    """

    __tablename__ = "model_version"
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    round_id: Mapped[str | None] = mapped_column(ForeignKey("round.id"), comment="null: weights from elsewhere")
    run_id: Mapped[str | None] = mapped_column(ForeignKey("training_run.id"), comment="null: weights from elsewhere")
    manifest: Mapped[JsonbObject]
    registration_key: Mapped[str | None] = mapped_column(
        unique=True, comment="of weights from elsewhere: digest of the files, and the dtype"
    )
    provenance: Mapped[JsonbObject | None] = mapped_column(comment="source, licence and digest of those weights")
    smoke_test: Mapped[JsonbObject | None] = mapped_column(comment="their first answer, or why there is none")


class CaseResult(Created, Base):
    """The result of one version on one case."""

    __tablename__ = "case_result"
    case_id: Mapped[str] = mapped_column(ForeignKey("case.id"), primary_key=True)
    version: Mapped[int] = mapped_column(ForeignKey("model_version.version"), primary_key=True, index=True)
    passed: Mapped[bool]
    answer: Mapped[str]
    reason: Mapped[str | None] = mapped_column(comment="why it could not be judged; it failed")
    conditions: Mapped[str] = mapped_column(comment="what its answer depends on; only results of the same are compared")


class UploadSegment(Base):
    """A range of whole lines of a large upload, for a shard of its own; see `feedback.upload_segments`."""

    __tablename__ = "upload_segment"
    upload_sha256: Mapped[str] = mapped_column(primary_key=True)
    num_segments: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, comment="of the upload")
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    start_byte: Mapped[int] = mapped_column(BigInteger)
    end_byte: Mapped[int] = mapped_column(BigInteger)
    first_line: Mapped[int] = mapped_column(comment="lines before it")
    first_row: Mapped[int] = mapped_column(comment="rows before it, that is lines that are not blank")
    end_row: Mapped[int] = mapped_column(comment="rows before its end")
    sha256: Mapped[str]


class StoredShard(Created, Base):
    """A shard of rows in the object store, under the digest of what it was made from; see `feedback.shard_builder`."""

    __tablename__ = "row_shard"
    input_digest: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(comment="of its uncompressed lines; its key is shards/SHA256")
    num_rows: Mapped[int]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    num_stored_bytes: Mapped[int] = mapped_column(BigInteger)
    faults: Mapped[list[Any]] = mapped_column(comment="selected rows that could not be read")


class Snapshot(Created, Base):
    """A frozen mixture; the id is the root of its manifest, or of an older release the sha256 of its rows."""

    __tablename__ = "snapshot"
    id: Mapped[str] = mapped_column(primary_key=True)
    num_rows: Mapped[int] = mapped_column(BigInteger)
    counts: Mapped[JsonbObject]


class Round(Created, Base):
    """One training round, from the collection of reports to the decision; at most one is running."""

    __tablename__ = "round"
    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    number: Mapped[int] = mapped_column(unique=True)
    state: Mapped[str] = mapped_column(default=RoundState.RUNNING)
    step: Mapped[str] = mapped_column(default=RoundStep.COLLECT)
    cut_off: Mapped[datetime] = mapped_column(server_default=func.now())
    requested_by: Mapped[str]
    parameters: Mapped[JsonbObject]
    recipe: Mapped[JsonbObject | None] = mapped_column(comment="name and values of the recipe, with replaced values")
    attempt: Mapped[int] = mapped_column(default=0)
    reason: Mapped[str | None]
    parent_version: Mapped[int | None]
    snapshot_id: Mapped[str | None] = mapped_column(ForeignKey("snapshot.id"))
    activity: Mapped[str | None] = mapped_column(comment="progress of the present step, in one line")
    token_counts: Mapped[JsonbObject | None] = mapped_column(comment="of the windows trained on, by part")
    candidate_version: Mapped[int | None]
    decision: Mapped[JsonbObject | None]
    repeated_verdicts: Mapped[JsonbObject | None] = mapped_column(
        comment="of the champion: how many were repeated, and how many of them differed"
    )
    failed_items: Mapped[JsonbObject] = mapped_column(server_default="{}", comment="items that failed alone, by step")
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        Index(
            "one_running_round", text("(true)"), unique=True, postgresql_where=text(f"state = '{RoundState.RUNNING}'")
        ),
    )


class Plan(Created, Base):
    """The parallelism plan of a round's training run."""

    __tablename__ = "plan"
    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    round_id: Mapped[str] = mapped_column(ForeignKey("round.id"), unique=True)
    body: Mapped[JsonbObject]


class TrainingRun(Created, Base):
    """The training run of a round; its folder is `runs/ID` in the home folder."""

    __tablename__ = "training_run"
    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    round_id: Mapped[str] = mapped_column(ForeignKey("round.id"), unique=True)
    mlflow_run_id: Mapped[str | None]
    status: Mapped[JsonbObject | None]
    started_from: Mapped[str | None] = mapped_column(comment="weights or masters from which training started")


class TrainingState(Created, Base):
    """The checkpoint of an ended run that the object store keeps, since a later round may start from it.

    Its weights are those of the run's version. `feedback.training_states` has the rule for how long it is kept.
    """

    __tablename__ = "training_state"
    run_id: Mapped[str] = mapped_column(ForeignKey("training_run.id"), primary_key=True)
    step: Mapped[int | None] = mapped_column(comment="of the kept checkpoint; none if nothing was kept")
    manifest_sha256: Mapped[str | None]
    num_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    has_moments: Mapped[bool] = mapped_column(default=False)
    end_reason: Mapped[str | None] = mapped_column(comment="why nothing is kept any more")
    ended_at: Mapped[datetime | None]
    cleared_at: Mapped[datetime | None] = mapped_column(comment="since then the store has nothing else of the run")


class DevicePool(Created, Base):
    """A pool of devices for training runs; its row is locked while leases are granted."""

    __tablename__ = "device_pool"
    name: Mapped[str] = mapped_column(primary_key=True)
    launcher: Mapped[str] = mapped_column(comment="local | slurm | kubernetes")


class PoolDevice(Base):
    __tablename__ = "device"
    pool: Mapped[str] = mapped_column(ForeignKey("device_pool.name"), primary_key=True)
    id: Mapped[str] = mapped_column(primary_key=True)
    device_class: Mapped[str]
    node: Mapped[str]
    lost_reason: Mapped[str | None]
    lost_host: Mapped[str | None] = mapped_column(comment="the machine, as a batch system names it")
    is_reserved: Mapped[bool] = mapped_column(
        default=False, server_default=false(), comment="for the model server alone"
    )


class Lease(Base):
    """Devices for one run: waits until granted, held until released; device-hours are summed over all leases."""

    __tablename__ = "lease"
    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    pool: Mapped[str] = mapped_column(ForeignKey("device_pool.name"), index=True)
    device_counts: Mapped[dict[str, int]] = mapped_column(JSONB, comment="devices of each class")
    devices: Mapped[list[Any] | None]
    run_id: Mapped[str] = mapped_column(index=True)
    team: Mapped[str]
    holder: Mapped[str]
    generation: Mapped[int] = mapped_column(default=1)
    priority: Mapped[int] = mapped_column(default=0)
    shares_devices: Mapped[bool] = mapped_column(
        default=False,
        server_default=false(),
        comment="the model server and one other lease may hold the same device if both share",
    )
    ttl_s: Mapped[float]
    requested_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    granted_at: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    fenced_at: Mapped[datetime | None]
    released_at: Mapped[datetime | None]
    end_reason: Mapped[str | None]
    __table_args__ = (Index("open_leases", "pool", postgresql_where=text("released_at is null")),)


class Promotion(Created, Base):
    """Append-only: the newest row names the champion."""

    __tablename__ = "promotion"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(ForeignKey("model_version.version"))
    previous: Mapped[int | None]
    round_id: Mapped[str | None] = mapped_column(ForeignKey("round.id"), unique=True)
    actor: Mapped[str]
    reason: Mapped[str]


class Outbox(Created, Base):
    """A notice to one contributor about one report and one version; the unique key prevents a second one."""

    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(primary_key=True)
    contributor_id: Mapped[str] = mapped_column(ForeignKey("contributor.id"))
    feedback_id: Mapped[str] = mapped_column(ForeignKey("feedback.id"))
    version: Mapped[int]
    verdict: Mapped[str] = mapped_column(comment=list_values(Verdict))
    text: Mapped[str]
    delivered_at: Mapped[datetime | None]
    __table_args__ = (UniqueConstraint("feedback_id", "version"), Index("notices_in_order", "contributor_id", "id"))


class AuditEvent(Created, Base):
    """An action of an actor on a record; append-only."""

    __tablename__ = "audit_event"
    id: Mapped[int] = mapped_column(primary_key=True)
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str] = mapped_column(index=True)
    detail: Mapped[JsonbObject] = mapped_column(default=dict)

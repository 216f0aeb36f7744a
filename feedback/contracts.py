"""Schemas of the portal's HTTP API: requests, responses, errors."""

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from feedback.promotion_decision import PromotionDecision
from feedback.states import DatasetPurpose, DatasetState, ReportState, RoundState, list_values
from feedback.verdicts import Verdict
from yuan.config import MAX_SEED, Precision
from yuan.data.checkers import Checker, Exact
from yuan.data.rows import BadRow
from yuan.data.rule_text import describe_errors
from yuan.data.text import MAX_TEXT_CHARS, PatternRule, TextRule, make_rule_error, normalize_text
from yuan.recipe import PartWeight, Recipe
from yuan.recipe_overrides import RecipeOverrides, override_recipe
from yuan.serve.response_schemas import TextChoice, TextCompletion
from yuan.train.run_status import RunStatus

log = logging.getLogger(__name__)

ReportText = Annotated[str, TextRule(MAX_TEXT_CHARS)]
WithdrawalReason = Annotated[str, TextRule(500)]
ProvenanceText = Annotated[str, TextRule(500, allow="line")]
AccountReference = Annotated[str, TextRule(80, allow="line")]
DatasetName = Annotated[str, TextRule(100, allow="line")]
IdempotencyKeyText = Annotated[str, PatternRule("^[!-~]+$", "visible ASCII characters without spaces", max_length=200)]
Sha256Text = Annotated[str, PatternRule("^[0-9a-f]{64}$", "a sha256 in 64 hexadecimal digits", max_length=64)]
# S3's limits of one object and of its parts.
MAX_DATASET_BYTES = 5 * 2**40
MAX_DATASET_PARTS = 10_000
MAX_PARTS_PER_REQUEST = 100
# Strict: `true` and "3" are not accepted as numbers. A PostgreSQL integer column holds at most 2**31 - 1.
VersionNumber = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
StepCount = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
RECIPE_NAME_RULE = PatternRule(
    r"^[a-z0-9][a-z0-9._-]*$",
    "lower-case letters, digits, and the signs . _ -, and begin with a letter or digit",
    max_length=60,
)
# The smallest share that yuan.data.mixture can represent: 32 positions of a block of 2**20.
MIN_PART_SHARE = 32 / 2**20
# Fields that each kind of report needs, in addition to the fields that every report needs.
REQUIRED_FIELDS_BY_KIND: dict[str, tuple[str, ...]] = {
    "correction": ("expected",),
    "preference": ("chosen", "rejected"),
    "problem": (),
    "rating": ("rating",),
}


class Example(BaseModel):
    """Another prompt on which a reported problem occurs."""

    model_config = ConfigDict(extra="forbid")

    prompt: ReportText
    expected: ReportText | None = None


class FeedbackIn(BaseModel):
    """A report about one response of one model version."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"kind": "correction", "prompt": "2 + 2 = ?", "response": "5", "model_version": 1, "expected": "4"},
                {"kind": "rating", "prompt": "2 + 2 = ?", "response": "4", "model_version": 1, "rating": 5},
            ],
            "anyOf": [
                {
                    "properties": {"kind": {"const": kind}, **{name: {"not": {"type": "null"}} for name in names}},
                    "required": list(names),
                }
                for kind, names in REQUIRED_FIELDS_BY_KIND.items()
            ],
        },
    )

    kind: Literal["correction", "preference", "problem", "rating"]
    prompt: ReportText = Field(description="the prompt that the model received")
    response: Annotated[str, TextRule(MAX_TEXT_CHARS, allow="blank")] = Field(
        description="the response that the model returned"
    )
    response_id: Annotated[str, TextRule(100, allow="line")] | None = Field(
        default=None, description="response_id from /v1, if the response came from there"
    )
    model_version: VersionNumber = Field(description="version of the model that responded")
    expected: ReportText | None = Field(default=None, description="correction: the right answer")
    checker: Checker | None = Field(default=None, description="rule that judges an answer; default: equal to expected")
    chosen: ReportText | None = Field(default=None, description="preference: the better answer")
    rejected: ReportText | None = Field(default=None, description="preference: the worse answer")
    rating: Annotated[int, Field(strict=True, ge=1, le=5)] | None = Field(default=None, description="rating: 1 to 5")
    examples: list[Example] | None = Field(default=None, max_length=50, description="problem: more prompts")

    @model_validator(mode="after")
    def _check_required_fields(self) -> "FeedbackIn":
        missing = [name for name in REQUIRED_FIELDS_BY_KIND[self.kind] if getattr(self, name) is None]
        if missing:
            raise make_rule_error(missing[0], f"a {self.kind} needs {' and '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _check_answers_contradict(self) -> "FeedbackIn":
        if self.chosen is not None and self.rejected is not None and _is_same_text(self.chosen, self.rejected):
            raise make_rule_error("rejected", "must differ from the chosen answer")
        if self.expected is None:
            return self
        if not self.rule.check(self.expected):
            raise make_rule_error("expected", "the checker rejects the expected answer itself; correct one of the two")
        if self.kind == "correction" and self.rule.check(self.response):
            raise make_rule_error("response", "the checker accepts this response as right; there is nothing to correct")
        return self

    @property
    def rule(self) -> Checker:
        """Return the checker that judges answers: the report's own, else equality with `expected`."""
        return self.checker or Exact(value=self.expected or "x")


def _is_same_text(first: str, second: str) -> bool:
    return normalize_text(first) == normalize_text(second)


def _drop_unknown_verdict(verdict: object) -> object:
    """Return None for a verdict that this release does not know, since the rest of the record counts too."""
    return None if isinstance(verdict, str) and verdict not in frozenset(Verdict) else verdict


# The verdict of a record, whose portal may be newer than the client.
VerdictField = Annotated[Verdict | None, BeforeValidator(_drop_unknown_verdict)]


class Event(BaseModel):
    """One line of a record's timeline."""

    at: datetime
    text: str


class FeedbackOut(BaseModel):
    """A report with its state, newest verdict and timeline."""

    id: str
    kind: str
    state: str = Field(description=list_values(ReportState))
    reason: str | None
    role: str | None = Field(description="train or held_out, once accepted")
    verdict: VerdictField = Field(description="newest verdict, of version `verdict_version`; null: none, or unknown")
    verdict_version: int | None
    summary: str
    timeline: list[Event]


class NoticeOut(BaseModel):
    """A notice to a contributor about a report."""

    number: int = Field(description="number of the notice, increasing with time; use it as `after`")
    feedback_id: str
    version: int
    verdict: VerdictField = Field(description="null: a verdict that this release does not know")
    text: str
    delivered_at: datetime | None


class WithdrawalIn(BaseModel):
    """A request to withdraw a report or a dataset."""

    model_config = ConfigDict(extra="forbid")

    reason: WithdrawalReason = Field(description="reason, shown on its timeline")


class AccountWithdrawalIn(WithdrawalIn):
    """A request to withdraw an account's reports and datasets."""

    account: AccountReference = Field(description="id or name of a contributor's account")
    kind: Literal["reports", "datasets"] | None = Field(default=None, description="only these; empty: both")


class AccountWithdrawalOut(BaseModel):
    """The numbers of an account's reports and datasets withdrawn; repeat the request until both are zero."""

    account: str = Field(description="id of the account")
    name: str
    reports: int = Field(ge=0)
    datasets: int = Field(ge=0)


class DatasetOut(BaseModel):
    """An uploaded dataset with its state and timeline."""

    id: str
    name: str
    purpose: str
    state: str = Field(description=list_values(DatasetState))
    reason: str | None
    sha256: str
    num_bytes: int = Field(default=0, description="size of the file, as it was announced or received")
    num_received_bytes: int = Field(
        default=0, description="bytes that have arrived; while the file is sent in parts, as of the last request"
    )
    num_checked_bytes: int = Field(default=0, description="bytes that have been checked")
    progress: str | None = Field(default=None, description="what has been received or checked; null once that is over")
    num_rows: int
    num_duplicates: int
    # The number of decontaminated rows; the name is kept, since clients read it.
    num_closed_out: int = Field(
        description="train rows that the newest round decontaminated: held-out cases have the same prompts"
    )
    bad_rows: list[BadRow] = Field(
        description="malformed rows, for which the file was refused; in a list, the first 20"
    )
    timeline: list[Event]


class DatasetUploadIn(BaseModel):
    """A request to send a dataset's file in parts."""

    model_config = ConfigDict(extra="forbid")

    name: DatasetName = Field(description="name of the dataset, as for a file that is sent at once")
    purpose: DatasetPurpose = Field(default=DatasetPurpose.MIXTURE, description="others need an operator's token")
    num_bytes: Annotated[int, Field(strict=True, ge=1, le=MAX_DATASET_BYTES)] = Field(description="size of the file")
    sha256: Sha256Text = Field(description="sha256 of the file")


class DatasetUploadOut(BaseModel):
    """An upload in parts: every part but the last has `part_bytes` bytes, and numbers begin at 1."""

    id: str = Field(description="id of the dataset")
    state: str = Field(description=f"{list_values(DatasetState)}; parts are received while it is uploading")
    num_bytes: int
    part_bytes: int = Field(gt=0)
    num_parts: int
    expires_at: datetime = Field(description="when the upload is dropped unless another request for it comes before")


class PartIn(BaseModel):
    """A part that is about to be sent."""

    model_config = ConfigDict(extra="forbid")

    number: Annotated[int, Field(strict=True, ge=1, le=MAX_DATASET_PARTS)]
    sha256: Sha256Text = Field(description="sha256 of the part")


class PartsIn(BaseModel):
    """A request for the addresses of parts."""

    model_config = ConfigDict(extra="forbid")

    parts: list[PartIn] = Field(min_length=1, max_length=MAX_PARTS_PER_REQUEST)


class PartAddressOut(BaseModel):
    """The address to which one part is sent by PUT, with these headers, and no token."""

    number: int
    url: str
    headers: dict[str, str]


class PartAddressesOut(BaseModel):
    """Addresses of parts; each accepts only the bytes that were announced."""

    parts: list[PartAddressOut]
    valid_s: int = Field(description="seconds in which a request to an address must begin")


class ReceivedPartsOut(BaseModel):
    """The parts that have arrived."""

    numbers: list[int]
    num_received_bytes: int
    expires_at: datetime


class ContributorIn(BaseModel):
    """A request to create an account."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, PatternRule(r"^[\w.@-]+$", "letters, digits, and the signs . _ @ -", max_length=80)]


class ContributorOut(BaseModel):
    """A new account's id and its token; the token is shown only once."""

    id: str
    name: str
    token: str


RecipeName = Annotated[str, RECIPE_NAME_RULE]


class RoundParameters(BaseModel):
    """Parameters of a round that an operator may set: a recipe, and values that replace the recipe's."""

    model_config = ConfigDict(extra="forbid")

    recipe: RecipeName | None = Field(default=None, description="name of a recipe; empty: the one of COTRAIN_RECIPE")
    max_steps: StepCount | None = Field(default=None, description="optimizer steps; empty: the recipe's length")
    learning_rate: Annotated[float, Field(strict=True, gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        default=None, description="peak learning rate; empty: the recipe's"
    )
    replay_rows: Annotated[int, Field(strict=True, ge=0, le=100_000_000)] | None = Field(
        default=None, description="rows of the base mixture to train on again, against forgetting; empty: the recipe's"
    )
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] = Field(
        default=0, description="seed of the data order and of newly initialized weights"
    )
    weights: dict[Literal["corrections", "datasets", "base"], PartWeight] | None = Field(
        default=None,
        min_length=1,
        description="relative weight of each part that has rows in training; empty: the recipe's",
    )
    precision: Literal["auto", "bf16", "fp32"] | None = Field(
        default=None,
        description="auto: bf16 if every device class of the pool is fast at it; fp32 runs are bit-reproducible; "
        "empty: the recipe's",
    )
    checkpoint_every: StepCount | None = Field(
        default=None, description="steps between checkpoints; empty: the recipe's"
    )
    overrides: RecipeOverrides = Field(
        default_factory=dict, description="other values of the recipe to replace, by section and key"
    )
    priority: int = Field(
        default=0, strict=True, ge=-100, le=100, description="priority in the device queue; waiting time adds to it"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_policy(cls, fields: Any) -> Any:
        """Drop the field `policy`, which clients before 0.3 send; it was stored but had no effect."""
        return (
            {name: value for name, value in fields.items() if name != "policy"} if isinstance(fields, dict) else fields
        )

    @model_validator(mode="after")
    def _check_min_weight(self) -> "RoundParameters":
        if self.weights and min(self.weights.values()) < MIN_PART_SHARE * sum(self.weights.values()):
            raise make_rule_error(
                "weights", f"the smallest must be at least {MIN_PART_SHARE:.2e} of their sum; raise it or leave it out"
            )
        return self

    def apply_to(self, recipe: Recipe, name: str) -> Recipe:
        """Return the recipe with the values that this round replaces.

        Raises:
            ValueError: if the result contradicts itself.
        """
        named: dict[str, dict[str, Any]] = {
            "length": {"steps": self.max_steps},
            "schedule": {"learning_rate": self.learning_rate},
            "data": {"replay_rows": self.replay_rows},
            "mixture": {str(part): weight for part, weight in (self.weights or {}).items()},
            "model": {"precision": self.precision},
            "checkpoints": {"every_steps": self.checkpoint_every},
        }
        overrides = {section: dict(values) for section, values in self.overrides.items()}
        for section, values in named.items():
            given = {key: value for key, value in values.items() if value is not None}
            if given:
                overrides[section] = {**overrides.get(section, {}), **given}
        return override_recipe(recipe, name, overrides)


def _parse_run_status(status: object) -> RunStatus | None:
    """Return the status; None if this release cannot read it, since the rest of the record counts too."""
    if isinstance(status, RunStatus | None):
        return status
    try:
        return RunStatus.from_json(status) if isinstance(status, Mapping) else None
    except ValueError as error:
        log.warning("the status of a training run cannot be read: %s", error)
        return None


# In JSON it is the content of status.json, in Python the record that the trainer writes there.
RunStatusField = Annotated[
    RunStatus | None,
    PlainValidator(_parse_run_status),
    PlainSerializer(lambda status: status and status.to_json(), return_type=dict[str, Any] | None),
]


def _parse_decision(decision: object, parse: ValidatorFunctionWrapHandler) -> PromotionDecision | None:
    """Return the decision; None if this release cannot read it, since the rest of the record counts too."""
    try:
        return parse(decision)  # type: ignore[no-any-return]
    except ValidationError as error:
        log.warning("the decision of a round cannot be read: %s", describe_errors(error))
        return None


DecisionField = Annotated[PromotionDecision | None, WrapValidator(_parse_decision)]


class RepeatedVerdicts(BaseModel):
    """Verdicts on a version that were computed again in another order: the noise of an evaluation.

    Attributes:
        num_cases: cases that were evaluated twice.
        num_flipped: cases of these that passed once and failed once.
    """

    model_config = ConfigDict(frozen=True)

    version: int = Field(ge=1)
    num_cases: int = Field(ge=1)
    num_flipped: int = Field(ge=0)

    def describe(self) -> str:
        """Describe them in one line.

        >>> RepeatedVerdicts(version=6, num_cases=200, num_flipped=1).describe()
        '1 of 200 verdicts on v6 differed when they were repeated'
        """
        return (
            f"{self.num_flipped:,} of {self.num_cases:,} verdicts on v{self.version} differed when they were repeated"
        )


class RoundOut(BaseModel):
    """A training round with its progress; a newer portal's `state` and `step` are kept as they are."""

    id: str
    number: int
    state: str = Field(description=list_values(RoundState))
    step: str
    reason: str | None
    recipe: str | None = Field(
        default=None, description="name of the recipe that the round began with; its values are in run.json at MLflow"
    )
    parent_version: int | None
    started_from: str | None = Field(
        default=None, description="weights or fp32 masters from which training started; empty until it is prepared"
    )
    candidate_version: int | None
    snapshot_id: str | None
    activity: str | None = Field(default=None, description="progress of the present step, in one line")
    token_counts: dict[str, dict[str, int]] | None = Field(
        default=None,
        description="windows that the run trains on, by part of the mixture, and the predictions in them: `targets` "
        "count in the loss, `masked` ones do not, `padding` has no token, `cut` ones are behind a border within "
        "their sample, `dropped` ones are in no window",
    )
    decision: DecisionField
    repeated_verdicts: RepeatedVerdicts | None = Field(
        default=None, description="verdicts on the champion that were computed again in another order"
    )
    failed_items: dict[str, int] = Field(
        description="number of items that could not be processed, by step; the other items were processed"
    )
    status: RunStatusField = Field(
        description="progress of the training run: `state` (training or finished), `step` of `max_steps`, `loss`, "
        "`grad_norm`, `eta_s` and, while it trains, the throughput of the last steps, by stage in `stages`"
    )
    created_at: datetime
    finished_at: datetime | None
    timeline: list[Event]


class WeightsProvenance(BaseModel):
    """The origin of a version's weights that no round trained.

    Attributes:
        source: what the operator named, such as an address; None if nothing was named.
        digest: sha256 over the names and sha256 of the files that were read.
        folder: path of the folder on the machine that registered them.
        dtype: that of the version.
        stored_dtype: that of the weights, which were rounded if it is another one.
    """

    model_config = ConfigDict(frozen=True)

    source: ProvenanceText | None
    licence: ProvenanceText | None
    digest: str
    folder: str
    dtype: Precision
    stored_dtype: str


class SmokeTest(BaseModel):
    """The first answer of a version.

    Attributes:
        answer: None if there is none.
        reason: why there is none; None if there is one.
    """

    model_config = ConfigDict(frozen=True)

    answer: str | None = None
    reason: str | None = None

    @property
    def passed(self) -> bool:
        return self.answer is not None


class VersionOut(BaseModel):
    """A version and its lineage: the round that trained it, or where its weights come from."""

    version: int
    round: int | None = Field(description="number of the round that trained it; null for weights from elsewhere")
    round_id: str | None
    run_id: str | None
    parent: str | None = Field(description="version from whose weights it was trained")
    snapshot_id: str | None
    dtype: str = Field(description="of its weights: bf16, or fp32")
    files: dict[str, str] = Field(description="sha256 of each file of its model folder")
    provenance: WeightsProvenance | None
    smoke_test: SmokeTest | None = Field(description="of weights from elsewhere; without an answer, no promotion")
    is_champion: bool
    promoted_at: datetime | None
    created_at: datetime


class StoredChoice(TextChoice):
    """An answer that the portal has stored; a report about it names its `response_id`."""

    response_id: str


class StoredCompletion(TextCompletion):
    """A text completion whose answers the portal has stored."""

    choices: tuple[StoredChoice, ...]


class ErrorBody(BaseModel):
    """The error object of every error response."""

    message: str
    type: str
    param: str | None = None
    rows: list[BadRow] | None = None


class ErrorOut(BaseModel):
    """The body of every error response."""

    error: ErrorBody

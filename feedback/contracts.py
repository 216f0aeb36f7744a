"""What travels between the portal and its clients: requests, answers, errors."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from yuan.data.checkers import Checker, Exact
from yuan.data.rows import MAX_TEXT

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Purpose = Literal["mixture", "base", "suite"]


class Example(BaseModel):
    """A further prompt on which a reported problem shows."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    expected: Text | None = None


class FeedbackIn(BaseModel):
    """A report about one answer of one version."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["correction", "preference", "problem", "rating"]
    prompt: Text = Field(description="what the model was asked")
    response: str = Field(max_length=MAX_TEXT, description="what it answered")
    response_id: str | None = Field(default=None, description="id of the answer from /v1, if it came from there")
    model_version: int = Field(ge=1, description="version that answered")
    expected: Text | None = Field(default=None, description="correction: the right answer")
    checker: Checker | None = Field(default=None, description="how an answer is judged; default: equal to expected")
    chosen: Text | None = Field(default=None, description="preference: the better answer")
    rejected: Text | None = Field(default=None, description="preference: the worse answer")
    rating: int | None = Field(default=None, ge=1, le=5, description="rating: 1 to 5")
    examples: list[Example] | None = Field(default=None, max_length=50, description="problem: more prompts")

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> "FeedbackIn":
        needed = {"correction": ("expected",), "preference": ("chosen", "rejected"), "rating": ("rating",)}
        missing = [name for name in needed.get(self.kind, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"a {self.kind} needs {' and '.join(missing)}")
        if self.expected is not None and not self.rule.check(self.expected):
            raise ValueError("the checker refuses the expected answer itself; correct one of the two")
        return self

    @property
    def rule(self) -> Checker:
        """The checker in force."""
        return self.checker or Exact(value=(self.expected or "x")[:2000])


class Event(BaseModel):
    """One line of a record's timeline."""

    at: datetime
    text: str


class FeedbackOut(BaseModel):
    """A report and what became of it."""

    id: str
    kind: str
    state: str
    reason: str | None
    role: str | None = Field(description="taught or held_out, once accepted")
    verdict: str | None = Field(description="newest verdict: fixed, still_failing or regressed")
    verdict_version: int | None
    summary: str
    timeline: list[Event]


class NoticeOut(BaseModel):
    """What a contributor was told about a report."""

    feedback_id: str
    version: int
    verdict: str
    text: str
    delivered_at: datetime | None


class WithdrawalIn(BaseModel):
    """Why a report or a dataset is taken back."""

    model_config = ConfigDict(extra="forbid")

    reason: Text = Field(max_length=500, description="shown on its timeline")


class DatasetOut(BaseModel):
    """An uploaded dataset and what became of it."""

    id: str
    name: str
    purpose: str
    state: str
    reason: str | None
    sha256: str
    num_rows: int
    num_duplicates: int
    bad_rows: list[dict[str, Any]]
    timeline: list[Event]


class ContributorIn(BaseModel):
    """A new account."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=80, pattern=r"^[\w.@-]+$")


class ContributorOut(BaseModel):
    """A new account's id and its token, which is shown this once."""

    id: str
    name: str
    token: str


class RoundParameters(BaseModel):
    """What an operator may choose about a round; the rest follows from the model."""

    model_config = ConfigDict(extra="forbid")

    max_steps: int = Field(default=600, ge=1, le=1_000_000, description="optimizer steps")
    learning_rate: float = Field(default=1.5e-3, gt=0, lt=1, description="peak learning rate")
    replay_rows: int = Field(
        default=3000, ge=0, description="rows of the base mixture trained again, against forgetting"
    )
    seed: int = Field(default=0, ge=0, description="seed of data order and new weights")
    weights: dict[Literal["corrections", "datasets", "base"], PositiveFloat] | None = Field(
        default=None,
        description="how much of the trained windows is of each part that has rows; empty: every window once an epoch",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="auto: bf16 where it is fast; fp32 runs repeat to the bit"
    )
    checkpoint_every: int = Field(default=200, ge=1, description="steps between checkpoints")
    priority: int = Field(default=0, ge=-100, le=100, description="in the queue for devices; waiting adds to it")
    policy: Literal["reproduced", "demo"] = Field(
        default="reproduced",
        description="which reports are accepted: those the champion really fails; demo: same, recorded",
    )


class RoundOut(BaseModel):
    """A round and how far it is."""

    id: str
    number: int
    state: str
    step: str
    reason: str | None
    parent_version: int | None
    candidate_version: int | None
    snapshot_id: str | None
    decision: dict[str, Any] | None
    failed_items: dict[str, int] = Field(description="items that could not be processed, by step; the others went on")
    status: dict[str, Any] | None
    created_at: datetime
    finished_at: datetime | None
    timeline: list[Event]


class ErrorBody(BaseModel):
    """The one shape of every error."""

    message: str
    type: str
    param: str | None = None
    rows: list[dict[str, Any]] | None = None


class ErrorOut(BaseModel):
    error: ErrorBody

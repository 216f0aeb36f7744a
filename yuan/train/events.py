"""The events of a run: the name and the fields of every line of events.jsonl.

Ranks and the supervisor append events, so readers must expect lines that are not valid events; see `parse_event`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, get_args, get_origin

from yuan.train.rank_json import MAX_COUNT

MAX_EVENT_TEXT_CHARACTERS = 20_000


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """Base of all events.

    `name` is stored under the key `event`. `time`, in seconds since the epoch, is stored last, or not at all if None.
    A field is stored under its own name, or under the `key` in its metadata, which keeps the logs' original keys.
    """

    name: ClassVar[str]
    time: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the line's JSON object.

        >>> CheckpointEvent(step=5, time=9.5).to_json()
        {'event': 'checkpoint', 'step': 5, 'time': 9.5}
        """
        stored_fields = [event_field for event_field in fields(self) if event_field.name != "time"]
        stored = {_get_key(event_field): getattr(self, event_field.name) for event_field in stored_fields}
        return {"event": self.name, **stored, **({} if self.time is None else {"time": self.time})}


@dataclass(frozen=True, kw_only=True)
class RepeatEvent(RunEvent):
    """A step was faulty and is repeated with the same data."""

    name = "repeat"
    step: int
    reason: str = field(metadata={"key": "why"})


@dataclass(frozen=True, kw_only=True)
class CleanRepeatEvent(RunEvent):
    """The repeat of a step was clean, so the machine caused the fault; `reason` is the fault of the first pass."""

    name = "repeat was clean"
    step: int
    reason: str = field(metadata={"key": "why"})


@dataclass(frozen=True, kw_only=True)
class SkipEvent(RunEvent):
    """A step was faulty twice and its update is skipped; `positions` is [first, end) of its data."""

    name = "skip"
    step: int
    reason: str = field(metadata={"key": "why"})
    positions: Sequence[int]
    samples: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class RollBackEvent(RunEvent):
    """The run returns from a step to the checkpoint of `checkpoint_step`, without the data in the spans `positions`."""

    name = "roll back"
    step: int
    checkpoint_step: int = field(metadata={"key": "to"})
    reason: str = field(metadata={"key": "why"})
    positions: Sequence[Sequence[int]]
    samples: Sequence[str]
    learning_rate_factor: float = field(metadata={"key": "rate_factor"})  # from `checkpoint_step` on


@dataclass(frozen=True, kw_only=True)
class StopEvent(RunEvent):
    """A step is faulty and the guard has no action left; the run stops."""

    name = "stop"
    step: int
    reason: str = field(metadata={"key": "why"})


@dataclass(frozen=True, kw_only=True)
class EarlyStopEvent(RunEvent):
    """The validation loss has not fallen for as many validations as the recipe allows, so the run ends at a step."""

    name = "early stop"
    step: int
    best_step: int
    best_loss: float


@dataclass(frozen=True, kw_only=True)
class ResumeEvent(RunEvent):
    """The ranks resume from the checkpoint of a step."""

    name = "resume"
    step: int


@dataclass(frozen=True, kw_only=True)
class NotCompiledEvent(RunEvent):
    """GPUs run the operations one by one, which is slower; `reason` says what prevents compiling."""

    name = "not compiled"
    reason: str = field(metadata={"key": "why"})


@dataclass(frozen=True, kw_only=True)
class StragglerEvent(RunEvent):
    """A rank became slower than the others, relative to the plan, by the factor `slowdown_ratio`."""

    name = "straggler"
    rank: int
    stage: int
    slowdown_ratio: float = field(metadata={"key": "slower"})
    step: int


@dataclass(frozen=True, kw_only=True)
class CaughtUpEvent(RunEvent):
    """A straggler is as fast as the others again."""

    name = "straggler caught up"
    rank: int
    slowdown_ratio: float = field(metadata={"key": "slower"})
    step: int


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent(RunEvent):
    """A checkpoint is committed."""

    name = "checkpoint"
    step: int


@dataclass(frozen=True, kw_only=True)
class CheckpointIntervalEvent(RunEvent):
    """The run has chosen another interval between checkpoints, from what the last one and a step took.

    `blocked_seconds` is how long training waited for its copy, `write_seconds` how long its files take.
    """

    name = "checkpoint interval"
    step: int
    every_steps: int
    blocked_seconds: float
    write_seconds: float
    step_seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointDamagedEvent(RunEvent):
    """A checkpoint is damaged and is not used."""

    name = "checkpoint damaged"
    step: int
    reason: str = field(metadata={"key": "what"})


@dataclass(frozen=True, kw_only=True)
class CheckpointFailedEvent(RunEvent):
    """A checkpoint could not be written; the run continues."""

    name = "checkpoint failed"
    step: int
    reason: str = field(metadata={"key": "what"})


@dataclass(frozen=True, kw_only=True)
class CheckpointStoredEvent(RunEvent):
    """The supervisor uploaded a checkpoint to the object store, in so many seconds.

    `pause_seconds` pass at least before the next upload begins; 0 if the recipe gives the interval in steps.
    """

    name = "checkpoint stored"
    step: int
    seconds: float = 0.0
    pause_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReplanEvent(RunEvent):
    """The supervisor replaced the plan of the run; `bounds` and `data_size` are those of the new plan."""

    name = "re-plan"
    reason: str = field(metadata={"key": "why"})
    bounds: Sequence[int]
    data_size: int
    explanation: str


@dataclass(frozen=True, kw_only=True)
class EndedEvent(RunEvent):
    """The processes of the run ended for an `exit_reason` of flows/supervisor/exit_reason.py; `reason` explains it."""

    name = "ended"
    exit_reason: str = field(metadata={"key": "kind"})
    reason: str = field(metadata={"key": "why"})


EVENT_TYPES: tuple[type[RunEvent], ...] = (
    RepeatEvent,
    CleanRepeatEvent,
    SkipEvent,
    RollBackEvent,
    StopEvent,
    EarlyStopEvent,
    ResumeEvent,
    NotCompiledEvent,
    StragglerEvent,
    CaughtUpEvent,
    CheckpointEvent,
    CheckpointIntervalEvent,
    CheckpointDamagedEvent,
    CheckpointFailedEvent,
    CheckpointStoredEvent,
    ReplanEvent,
    EndedEvent,
)


def parse_event(record: Mapping[str, Any]) -> RunEvent | None:
    """Return the event of a line's JSON object; None if it is of no known event, or a field is missing or wrong.

    Unknown fields are ignored: a newer version may have written them.

    >>> parse_event({"event": "resume", "step": 5, "unknown": 1})
    ResumeEvent(time=None, step=5)
    >>> parse_event({"event": "resume", "step": "five"}) is None
    True
    """
    event_type = next((event_type for event_type in EVENT_TYPES if event_type.name == record.get("event")), None)
    if event_type is None:
        return None
    event_fields = fields(event_type)
    stored_fields = [event_field for event_field in event_fields if _get_key(event_field) in record]
    values = {event_field.name: record[_get_key(event_field)] for event_field in stored_fields}
    if any(not _is_valid(values.get(event_field.name), event_field.type) for event_field in event_fields):
        return None
    return event_type(**values)


def _get_key(event_field: Field[Any]) -> str:
    """Return the key under which a field of an event is stored."""
    return str(event_field.metadata.get("key", event_field.name))


def _is_valid(value: object, field_type: Any) -> bool:
    """Return True if a value from JSON has the type of its field; numbers are finite and exact, texts have a limit."""
    if get_origin(field_type) is Sequence:
        (item_type,) = get_args(field_type)
        return isinstance(value, list) and all(_is_valid(item, item_type) for item in value)
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        return isinstance(value, field_type) and len(value) <= MAX_EVENT_TEXT_CHARACTERS
    if isinstance(value, int | float):
        is_whole_number_of_floats = isinstance(value, int) and isinstance(0.0, field_type)
        return abs(value) <= MAX_COUNT and (isinstance(value, field_type) or is_whole_number_of_floats)
    return isinstance(value, field_type)

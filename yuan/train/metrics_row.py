"""The rows of metrics.jsonl: the metrics of one step each."""

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from yuan.train.rank_json import get_count, get_number

# Names of the metrics of a step; docs/training.md explains them. The mean loss of a data source has the loss's name,
# a slash and the source's name. Only steps that are validated have a validation loss.
LOSS_METRIC = "train/loss"
LEARNING_RATE_METRIC = "train/learning_rate"
VALIDATION_LOSS_METRIC = "validation/loss"
GRAD_NORM_METRIC = "train/grad_norm"
TOKENS_PER_S_METRIC = "train/tokens_per_s"
STEP_SECONDS_METRIC = "train/step_seconds"
BUBBLE_METRIC = "train/bubble"
MFU_METRIC = "train/mfu"
PEAK_MEMORY_METRIC = "train/peak_memory_gib"
CHECKPOINT_EVERY_METRIC = "checkpoint/every_steps"
FIRST_POSITION_METRIC = "data/first_position"
END_POSITION_METRIC = "data/end_position"

METRIC_NAME_PATTERN = re.compile(r"[A-Za-z0-9_./ :-]{1,250}")  # the names that MLflow takes
MAX_ROW_METRICS = 256
MAX_METRICS_ROWS = 2_000_000  # that are kept in memory; a run has at most 1,000,000 steps, and repeats some


@dataclass(frozen=True)
class MetricsRow:
    """The metrics of a step by name; None for one that is not known, such as the MFU of a processor."""

    step: int
    metrics: Mapping[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Return the content of a line of metrics.jsonl."""
        return {"step": self.step, **self.metrics}


def parse_metrics_row(record: Mapping[str, Any]) -> MetricsRow | None:
    """Read a line's JSON object; return None if it is no row: a step, and metrics that are finite numbers or None.

    >>> parse_metrics_row({"step": 5, "train/loss": 2.5, "train/mfu": None})
    MetricsRow(step=5, metrics={'train/loss': 2.5, 'train/mfu': None})
    >>> parse_metrics_row({"train/loss": 2.5})
    """
    step = get_count(record, "step")
    is_row = (
        len(record) <= MAX_ROW_METRICS
        and all(METRIC_NAME_PATTERN.fullmatch(name) for name in record)
        and all(value is None or get_number(record, name) is not None for name, value in record.items())
    )
    if step is None or not is_row:
        return None
    return MetricsRow(step, {name: value for name, value in record.items() if name != "step"})


def parse_metrics_rows(records: Iterable[Mapping[str, Any]]) -> list[MetricsRow]:
    """Read lines' JSON objects; those that are no rows are left out, and the last MAX_METRICS_ROWS are kept."""
    rows = (row for record in records if (row := parse_metrics_row(record)) is not None)
    return list(deque(rows, maxlen=MAX_METRICS_ROWS))

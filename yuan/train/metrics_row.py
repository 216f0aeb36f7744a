"""The rows of metrics.jsonl: the metrics of one step each."""

import re
from collections.abc import Mapping
from typing import Any

from yuan.train.rank_json import get_count, get_number

METRIC_NAME_PATTERN = re.compile(r"[A-Za-z0-9_./ :-]{1,250}")  # the names that MLflow takes
MAX_ROW_METRICS = 256


def is_metrics_row(record: Mapping[str, Any]) -> bool:
    """Check that a line's JSON object is a row: a step, and metrics that are finite numbers or None.

    >>> is_metrics_row({"step": 5, "train/loss": 2.5, "train/mfu": None}), is_metrics_row({"train/loss": 2.5})
    (True, False)
    """
    return (
        get_count(record, "step") is not None
        and len(record) <= MAX_ROW_METRICS
        and all(METRIC_NAME_PATTERN.fullmatch(name) for name in record)
        and all(value is None or get_number(record, name) is not None for name, value in record.items())
    )

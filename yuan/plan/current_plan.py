"""Read the plan that a run has now, as `cotrain plan --json` wrote it."""

import json
from pathlib import Path
from typing import Any

from yuan.plan.plan_record import PipelinePlan
from yuan.plan.workload import Workload


def read_current_plan(file: Path, work: Workload) -> PipelinePlan:
    """Read a plan of the given training from a JSON file.

    Raises:
        ValueError: if the file is not JSON, or its plan is one of another training.
        OSError: if it cannot be read.
    """
    try:
        data: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}; write it with `cotrain plan --json`") from None
    data.pop("move", None)
    plan: PipelinePlan = PipelinePlan.from_json(data)
    requested = (work.model.name, work.seq_len, work.global_batch_size, work.precision)
    planned = (plan.model, plan.sequence_length, plan.global_batch_size, plan.precision)
    if requested != planned:
        raise ValueError(f"{file} is a plan for {planned}, got a request for {requested}; request the same training")
    return plan

"""Read the plan that a run has now, as `cotrain plan --json` wrote it."""

from yuan.plan.json_fields import show_value
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.workload import Workload


def parse_current_plan(data: object, work: Workload) -> PipelinePlan:
    """Parse the plan of a run of the given training from JSON.

    Raises:
        ValueError: if it is no plan, contradicts itself, does not fit its pool, or is one of another training.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a plan is a JSON object, got {show_value(data)}; write it with `cotrain plan --json`")
    if "plan" in data and "snapshot" in data:
        raise ValueError("this is the run.json of a run; pass the object in its field plan, in a file of its own")
    plan: PipelinePlan = PipelinePlan.from_json({key: value for key, value in data.items() if key != "move"})
    requested = {
        "model": work.model.name,
        "sequence_length": work.seq_len,
        "global_batch_size": work.global_batch_size,
        "precision": work.precision,
    }
    for name, value in requested.items():
        if getattr(plan, name) != value:
            raise ValueError(
                f"{name} of the plan must be the requested {value}, got {show_value(getattr(plan, name))}; "
                "request the same training"
            )
    if plan.bounds[-1] != work.model.num_layers:
        raise ValueError(
            f"layers of all stages must add up to {work.model.num_layers}, those of {plan.model}, got "
            f"{plan.bounds[-1]}; plan again"
        )
    if not plan.feasible:
        raise ValueError("feasible is false: the plan does not fit its pool, so no run has it; leave --current out")
    return plan

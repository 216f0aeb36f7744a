"""Format a plan as a text table."""

from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan, Stage

BAR_WIDTH_CHARS = 20
MIN_CLASS_WIDTH_CHARS = 12


def format_plan_table(plan: PipelinePlan) -> str:
    """Return the plan's sizes, predicted figures, one line per stage, counted from 1, and the explanation."""
    fullest = max(stage.memory_bytes for stage in plan.stages)
    memory_width = BAR_WIDTH_CHARS + 8
    class_width = max(MIN_CLASS_WIDTH_CHARS, *(len(stage.device_class) for stage in plan.stages))
    head = [
        f"{plan.model} on {plan.pool}: {_format_count(plan.pipeline_size, 'stage')} x "
        f"{_format_count(plan.data_size, 'replica')} = {_format_count(plan.num_ranks, 'device')}, "
        f"micro-batch {plan.micro_batch_size}, "
        f"{_format_count(plan.grad_accum_steps, 'micro-batch', 'es')} a step",
        f"{plan.step_seconds:.4g} s a step, {plan.tokens_per_s:,.0f} tokens/s, idle {plan.bubble_fraction:.1%}, "
        f"fullest device {plan.peak_memory_bytes / GIB:.1f} GiB, {_format_optimality(plan)}",
        "",
        f"{'stage':>5}  {'layers':<12} {'recomputed':>10}  {'device':<{class_width}} {'memory, GiB':<{memory_width}} "
        f"{'s/micro-batch':>13}",
    ]
    lines = [_format_stage_line(n, stage, fullest, class_width) for n, stage in enumerate(plan.stages, 1)]
    terms = _format_largest_terms(plan.stages[max(range(len(plan.stages)), key=lambda n: plan.stages[n].memory_bytes)])
    return "\n".join([*head, *lines, "", f"The fullest device holds {terms}.", plan.explanation])


def _format_count(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{plural if count != 1 else ''}"


def _format_optimality(plan: PipelinePlan) -> str:
    if not plan.feasible:
        return "does not fit"
    if plan.gap is None:
        return "minimum memory" if plan.objective == "memory" else "no bound"
    return "proven optimal" if plan.gap == 0 else f"at most {plan.gap:.2%} above the optimum"


def _format_stage_line(number: int, stage: Stage, fullest: int, class_width: int) -> str:
    last = stage.first_layer + stage.layers - 1
    layers = f"{stage.first_layer}-{last} ({stage.layers})" if stage.layers else "head only"
    bar = "#" * max(1, round(BAR_WIDTH_CHARS * stage.memory_bytes / fullest))
    return (
        f"{number:>5}  {layers:<12} {stage.recompute_layers:>10}  {stage.device_class:<{class_width}} "
        f"{stage.memory_bytes / GIB:7.1f} {bar:<{BAR_WIDTH_CHARS}} {stage.compute_seconds:13.4g}"
    )


def _format_largest_terms(stage: Stage) -> str:
    terms = sorted(stage.memory_terms.items(), key=lambda term: -term[1])[:4]
    return ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f} GiB" for name, size in terms)

"""Format a plan as a text table."""

from yuan.config import format_count
from yuan.plan.json_fields import escape_text
from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan, Stage
from yuan.plan.pool import Pool

BAR_WIDTH_CHARS = 20
MIN_CLASS_WIDTH_CHARS = 12


def format_plan_table(plan: PipelinePlan, pool: Pool | None = None) -> str:
    """Return the plan's sizes, predicted figures, one line per stage, counted from 1, and the explanation.

    Args:
        pool: the pool of the plan; with it, devices of it that the plan does not use are named.
    """
    fullest = max(stage.memory_bytes for stage in plan.stages)
    memory_width = BAR_WIDTH_CHARS + 8
    class_width = max(MIN_CLASS_WIDTH_CHARS, *(len(escape_text(stage.device_class)) for stage in plan.stages))
    head = [
        f"{escape_text(plan.model)} on {escape_text(plan.pool)}: {format_count(plan.pipeline_size, 'stage')} x "
        f"{format_count(plan.data_size, 'replica')} = {format_count(plan.num_ranks, 'device')}, "
        f"micro-batch {plan.micro_batch_size}, "
        f"{format_count(plan.grad_accum_steps, 'micro-batch', 'micro-batches')} a step",
        f"{plan.step_seconds:.4g} s a step, {plan.tokens_per_s:,.0f} tokens/s, idle {plan.bubble_fraction:.1%}, "
        f"fullest device {plan.peak_memory_bytes / GIB:.1f} GiB, {_format_optimality(plan)}",
        "",
        f"{'stage':>5}  {'layers':<12} {'recomputed':>10}  {'device':<{class_width}} {'memory, GiB':<{memory_width}} "
        f"{'s/micro-batch':>13}",
    ]
    lines = [_format_stage_line(n, stage, fullest, class_width) for n, stage in enumerate(plan.stages, 1)]
    terms = _format_largest_terms(plan.stages[max(range(len(plan.stages)), key=lambda n: plan.stages[n].memory_bytes)])
    idle = [_format_idle_devices(plan, pool)] if pool is not None and plan.num_ranks < pool.num_devices else []
    explanation = escape_text(plan.explanation)
    return "\n".join([*head, *lines, "", f"The fullest device holds {terms}.", *idle, explanation])


def _format_idle_devices(plan: PipelinePlan, pool: Pool) -> str:
    counts = {group.device_class: group.count for group in pool.groups}
    unused = {name: count - plan.device_counts.get(name, 0) for name, count in counts.items()}
    names = ", ".join(f"{count:,} {escape_text(name)}" for name, count in unused.items() if count)
    return f"The plan leaves {sum(unused.values()):,} of {format_count(pool.num_devices, 'device')} unused: {names}."


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
        f"{number:>5}  {layers:<12} {stage.recompute_layers:>10}  {escape_text(stage.device_class):<{class_width}} "
        f"{stage.memory_bytes / GIB:7.1f} {bar:<{BAR_WIDTH_CHARS}} {stage.compute_seconds:13.4g}"
    )


def _format_largest_terms(stage: Stage) -> str:
    terms = sorted(stage.memory_terms.items(), key=lambda term: -term[1])[:4]
    return ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f} GiB" for name, size in terms)

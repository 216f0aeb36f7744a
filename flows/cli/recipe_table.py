"""The text of `cotrain recipe check`: what a run needs, and what it does not fit."""

from collections.abc import Iterator, Mapping

from yuan.config import format_count, format_duration
from yuan.plan.json_fields import escape_text
from yuan.plan.memory_model import GIB
from yuan.plan.time_model import GIGA
from yuan.run_estimate import RunEstimate

NAME_WIDTH_CHARS = 14


def format_estimate(estimate: RunEstimate) -> str:
    """Return an estimate as lines: the verdict, time, one line per node, disk, store, transfers, and what to change."""
    verdict = "fits" if estimate.fits else "does not fit"
    lines = [f"{estimate.recipe} on {escape_text(estimate.pool.name)}: {verdict}"]
    if estimate.plan is not None:
        lines += [*_format_run(estimate), "", *_format_nodes(estimate), "", *_format_storage(estimate)]
    lines += [f"note: {escape_text(note)}" for note in estimate.notes]
    lines += [f"problem: {escape_text(problem)}" for problem in estimate.problems]
    return "\n".join(lines)


def _format_run(estimate: RunEstimate) -> Iterator[str]:
    plan, time = estimate.plan, estimate.time
    assert plan is not None and time is not None, "an estimate with a plan has both"
    model = estimate.model
    yield _name("model", f"{escape_text(model.name)}, {model.num_parameters:,} parameters, {plan.precision}")
    sizes = (
        f"{format_count(plan.pipeline_size, 'stage')} x {format_count(plan.data_size, 'replica')}, "
        f"micro-batch {plan.micro_batch_size}"
    )
    yield _name("plan", f"{sizes}; {plan.step_seconds:,.4g} s a step")
    if estimate.data is not None:
        windows = ", ".join(f"{part} {count:,.0f}" for part, count in estimate.data.windows.items())
        yield _name("data", f"windows of {plan.sequence_length:,} tokens: {windows} ({estimate.data.source})")
    num_epochs = "" if time.epochs is None else f"{time.epochs:.3g}"
    epochs = num_epochs and f", {num_epochs} {'epoch' if num_epochs == '1' else 'epochs'}"
    batch = format_count(time.global_batch_size, "window")
    yield _name("length", f"{format_count(time.steps, 'step')} of {batch}, {time.tokens:,} tokens{epochs}")
    yield _name("time", f"{format_duration(time.hours * 3600)} ({time.rates}), {time.device_hours:,.4g} device-hours")


def _format_nodes(estimate: RunEstimate) -> Iterator[str]:
    width = max(8, *(len(escape_text(node.device_class)) for node in estimate.nodes))
    yield f"{'node':>5}  {'device':<{width}}  {'stages':<9} {'fullest device, GiB':>20} {'main memory, GiB':>20}"
    for node in estimate.nodes:
        stages = f"{node.stages[0]}-{node.stages[-1]}" if node.stages[0] != node.stages[-1] else f"{node.stages[0]}"
        device = _format_use(node.device_bytes, node.device_limit_bytes)
        host = _format_use(node.host_bytes, node.host_limit_bytes)
        yield f"{node.number:>5}  {escape_text(node.device_class):<{width}}  {stages:<9} {device:>20} {host:>20}"
    total_host = sum(node.host_bytes for node in estimate.nodes)
    devices = sum(len(node.stages) for node in estimate.nodes)
    yield f"in all: {format_count(devices, 'device')}, main memory {total_host / GIB:,.1f} GiB"
    plan = estimate.plan
    assert plan is not None, "an estimate with nodes has a plan"
    fullest_stage = max(plan.stages, key=lambda stage: stage.memory_bytes)
    yield _name("device memory", _format_terms(fullest_stage.memory_terms))
    fullest_node = max(estimate.nodes, key=lambda node: node.host_bytes)
    yield _name("main memory", _format_terms(fullest_node.host_terms))


def _format_storage(estimate: RunEstimate) -> Iterator[str]:
    limit = None if estimate.pool.disk_gib is None else int(estimate.pool.disk_gib * GIB)
    disk = sum(estimate.disk_terms.values())
    yield _name("disk", f"{_format_use(disk, limit)} GiB: {_format_terms(estimate.disk_terms)}")
    store = sum(estimate.store_terms.values())
    yield _name("object store", f"{store / GIB:,.1f} GiB: {_format_terms(estimate.store_terms)}")
    saving, transfer, restart = estimate.saving, estimate.transfer, estimate.restart
    assert saving is not None and transfer is not None and restart is not None, "an estimate with a plan has them"
    link = f"{transfer.link_gb_s:g} GB/s{' (assumed)' if transfer.is_link_assumed else ''}"
    disk_rate = f"{restart.disk_gb_s:g} GB/s{' (assumed)' if restart.is_disk_assumed else ''}"
    yield _name(
        "checkpoints",
        f"on disk every {format_count(saving.interval_steps, 'step')}, each stops training for "
        f"{saving.blocked_seconds:,.1f} s and is written in {saving.write_seconds:,.0f} s; in the object store every "
        f"{format_count(transfer.interval_steps, 'step')}, each in {format_duration(transfer.seconds)}: "
        f"{transfer.bytes_per_hour / GIGA:,.1f} GB an hour, "
        f"{transfer.link_share:.0%} of a link of {link}",
    )
    yield _name(
        "restart",
        f"{format_duration(restart.seconds)}: start {restart.start_seconds:.0f} s, reading at {disk_rate} "
        f"{restart.read_seconds:,.0f} s, repeated steps {restart.lost_seconds:,.0f} s on average; "
        f"{restart.lost_disk_seconds:,.0f} s if the disk is lost",
    )


def _name(name: str, text: str) -> str:
    return f"{name:<{NAME_WIDTH_CHARS}}{text}"


def _format_use(used: int, limit: int | None) -> str:
    """Return bytes in GiB, and the limit if it is known.

    >>> _format_use(3 * GIB, None), _format_use(3 * GIB, 80 * GIB)
    ('3.0', '3.0 of 80.0')
    """
    return f"{used / GIB:,.1f}" if limit is None else f"{used / GIB:,.1f} of {limit / GIB:,.1f}"


def _format_terms(terms: Mapping[str, int]) -> str:
    """Return the terms in GiB, largest first, without those below 0.05 GiB.

    >>> _format_terms({"export": GIB // 2, "checkpoints": 3 * GIB, "token_files": 1})
    'checkpoints 3.0, export 0.5'
    """
    ordered = sorted(terms.items(), key=lambda term: -term[1])
    shown = [f"{name.replace('_', ' ')} {size / GIB:,.1f}" for name, size in ordered if size >= GIB / 20]
    return ", ".join(shown) or "below 0.05 GiB each"

"""`cotrain plan | calibrate`: plan the parallel layout of a model on a pool, and measure this machine's devices."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.output import EXIT_FAILED, EXIT_USAGE, JsonOption, explain_errors, fail, show, stderr_console

if TYPE_CHECKING:
    from yuan.config import ModelConfig
    from yuan.plan.plan_record import PipelinePlan
    from yuan.plan.pool import DeviceGroup, Pool
    from yuan.plan.workload import Workload

ModelNameOption = Annotated[str, typer.Option(help="tiny, 2b, 51b or 102b")]
PoolFileOption = Annotated[
    str | None, typer.Option(help="FILE[:NAME] of a pool; default: two processes on this machine")
]
SeqLenOption = Annotated[int | None, typer.Option(min=1, help="default: the model's")]
DeviceChangesOption = Annotated[list[str] | None, typer.Option(help="CLASS:N, devices of a class; may be repeated")]


def add_commands(app: typer.Typer) -> None:
    app.command()(plan)
    app.command()(calibrate)


def plan(
    model: ModelNameOption,
    pool: PoolFileOption = None,
    objective: Annotated[
        str, typer.Option(help="minimize step time (time) or the peak memory of the fullest device (memory)")
    ] = "time",
    seq_len: SeqLenOption = None,
    global_batch_size: Annotated[int | None, typer.Option(min=1, help="default: as published; 64 for tiny")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="default: the best")] = None,
    pipeline_size: Annotated[int | None, typer.Option(min=1, help="default: the best")] = None,
    data_size: Annotated[int | None, typer.Option(min=1, help="default: the best")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "bf16",
    full_logits: Annotated[
        bool, typer.Option("--full-logits", help="loss on full logits instead of blocks, for comparison")
    ] = False,
    open_documents: Annotated[
        bool, typer.Option("--open-documents", help="no attention mask between packed documents")
    ] = False,
    current: Annotated[
        Path | None, typer.Option(help="JSON of the current plan: also compute the cost of moving to the new one")
    ] = None,
    lost: DeviceChangesOption = None,
    added: DeviceChangesOption = None,
    slow: Annotated[
        list[str] | None, typer.Option(help="CLASS:N:SHARE, N devices at SHARE of the speed of the others")
    ] = None,
    lost_steps: Annotated[int, typer.Option(min=0, help="steps since the last checkpoint, which a move repeats")] = 0,
    svg: Annotated[
        Path | None, typer.Option(help="also draw memory and the schedule of a step to this SVG file")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan a model on a pool: parallel sizes, and layers, recomputation, memory and time of each pipeline stage."""
    from yuan.plan.planner import draw_plan, make_plan
    from yuan.plan.replan import replan
    from yuan.plan.search import SizeLimits
    from yuan.plan.table import format_plan_table
    from yuan.plan.workload import PUBLISHED_BATCH_SIZES, Workload, compute_default_loss_block

    with explain_errors():
        config = _get_model_config(model)
        work = Workload(
            model=config,
            seq_len=seq_len or config.seq_len,
            global_batch_size=global_batch_size or PUBLISHED_BATCH_SIZES.get(model, 64),
            precision=precision,  # type: ignore[arg-type]
            loss_block=None if full_logits else compute_default_loss_block(config),
            isolate_documents=not open_documents,
        )
        limits = SizeLimits(pipeline_size=pipeline_size, data_size=data_size, micro_batch_size=micro_batch_size)
        changed = _apply_changes(_load_pool(pool), lost or [], added or [], slow or [])
        if current is None:
            new_plan, move = make_plan(work, changed, limits, objective), None  # type: ignore[arg-type]
        else:
            before = _load_current_plan(work, current)
            move = replan(work, before, changed, limits, objective, lost_steps=lost_steps)  # type: ignore[arg-type]
            new_plan = move.plan
        if svg is not None:
            svg.write_text(draw_plan(work, changed, new_plan))
    data, text = new_plan.to_json(), format_plan_table(new_plan)
    if move is not None:
        data["move"] = {key: value for key, value in asdict(move).items() if key != "plan"}
        text = f"{text}\n{move.explanation}"
    show(data, text, as_json)
    if not new_plan.feasible:
        raise typer.Exit(EXIT_FAILED)


def calibrate(
    out: Annotated[Path, typer.Option(help="the pool file to write")],
    model: ModelNameOption = "tiny",
    pool: PoolFileOption = None,
    device_class: Annotated[str | None, typer.Option(help="device class of the pool that this machine has")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="default: one per GPU of this machine, else two")] = None,
    seq_len: SeqLenOption = None,
    micro_batch_size: Annotated[int, typer.Option(min=1)] = 1,
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "bf16",
    as_json: JsonOption = False,
) -> None:
    """Measure a layer, the head, links and complete steps on this machine, and write a pool file with these rates."""
    from flows.calibrate_pool import measure_rates
    from yuan.plan.pool import dump_pool

    with explain_errors():
        parsed = _load_pool(pool)
        group = _find_device_group(parsed, device_class)
        config = _get_model_config(model)
        if out.exists():
            raise ValueError(f"{out} exists already; choose another file")
        measured = measure_rates(
            config,
            group,
            processes,
            seq_len=seq_len or config.seq_len,
            micro_batch_size=micro_batch_size,
            precision=precision,  # type: ignore[arg-type]  # checked by Recipe
            report=lambda what: stderr_console.print(f"{what} ..."),
        )
        groups = tuple(measured if other is group else other for other in parsed.groups)
        out.write_text(dump_pool(replace(parsed, groups=groups)))
    rates = asdict(measured)["measured"]
    lines = [f"{name:>15}  {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in rates.items()]
    text = "\n".join([*lines, f"written: {out}; next: cotrain plan --model {model} --pool {out}"])
    show({"pool": str(out), "device_class": group.device_class, "measured": rates}, text, as_json)


def _get_model_config(name: str) -> "ModelConfig":
    from yuan.config import MODEL_PRESETS

    if name not in MODEL_PRESETS:
        raise fail(f"unknown model {name!r}; choose one of {', '.join(MODEL_PRESETS)}", EXIT_USAGE)
    return MODEL_PRESETS[name]()


def _load_pool(spec: str | None) -> "Pool":
    from yuan.plan.pool import load_pool, make_cpu_pool

    return load_pool(spec) if spec else make_cpu_pool()


def _find_device_group(pool: "Pool", name: str | None) -> "DeviceGroup":
    groups = [group for group in pool.groups if name is None or group.device_class == name]
    if len(groups) != 1:
        classes = ", ".join(group.device_class for group in pool.groups)
        raise ValueError(f"pool {pool.name!r} has {classes}; pass the class of this machine with --device-class")
    return groups[0]


def _apply_changes(pool: "Pool", lost: list[str], added: list[str], slow: list[str]) -> "Pool":
    from yuan.plan.replan import resize_pool, split_slow_devices

    for sign, words in ((-1, lost), (1, added)):
        for word in words:
            name, count = _split_change(word, 2)
            pool = resize_pool(pool, {name: sign * int(count)})
    for word in slow:
        name, count, share = _split_change(word, 3)
        try:
            factor = float(share)
        except ValueError:
            raise ValueError(f"the share of {word!r} must be a number between 0 and 1, got {share!r}") from None
        pool = split_slow_devices(pool, name, int(count), factor)
    return pool


def _split_change(word: str, count: int) -> list[str]:
    parts = word.rsplit(":", count - 1)
    if len(parts) != count or not parts[1].isdigit():
        raise ValueError(f"a change is written {'CLASS:N' if count == 2 else 'CLASS:N:SHARE'}, got {word!r}")
    return parts


def _load_current_plan(work: "Workload", current: Path) -> "PipelinePlan":
    from yuan.plan.plan_record import PipelinePlan

    try:
        data: dict[str, Any] = json.loads(current.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{current} is not JSON: {error}") from None
    data.pop("move", None)
    before: PipelinePlan = PipelinePlan.from_json(data)
    requested = (work.model.name, work.seq_len, work.global_batch_size, work.precision)
    planned = (before.model, before.sequence_length, before.global_batch_size, before.precision)
    if requested != planned:
        raise ValueError(f"{current} is a plan for {planned}, got a request for {requested}; request the same training")
    return before

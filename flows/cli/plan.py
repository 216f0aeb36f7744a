"""`cotrain plan`: plan the parallel layout of a model on a pool."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.output import EXIT_FAILED, EXIT_USAGE, JsonOption, fail, show
from yuan.config import MODEL_PRESETS, ModelConfig, Precision
from yuan.data.text import BadJson, parse_json
from yuan.plan.current_plan import parse_current_plan
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import Objective, draw_plan, make_plan
from yuan.plan.pool import Pool, load_pool, make_cpu_pool
from yuan.plan.pool_changes import apply_pool_change
from yuan.plan.replan import Replan, replan
from yuan.plan.search import SizeLimits
from yuan.plan.table import format_plan_table
from yuan.plan.workload import PUBLISHED_BATCH_SIZES, Workload, compute_default_loss_block

MAX_PLAN_BYTES = 16 * 2**20
MAX_LOST_STEPS = 10**9

ModelNameOption = Annotated[str, typer.Option(help="tiny, 2b, 51b or 102b")]
PoolFileOption = Annotated[
    str | None, typer.Option(help="FILE[:NAME] of a pool; default: two processes on this machine")
]
PrecisionOption = Annotated[Precision, typer.Option(help="number format of the model's computation")]
SeqLenOption = Annotated[int | None, typer.Option(min=1, help="default: the model's")]
DeviceChangesOption = Annotated[list[str] | None, typer.Option(help="CLASS:N, devices of a class; may be repeated")]


def plan(
    model: ModelNameOption,
    pool: PoolFileOption = None,
    objective: Annotated[
        Objective, typer.Option(help="minimize step time (time) or the peak memory of the fullest device (memory)")
    ] = "time",
    seq_len: SeqLenOption = None,
    global_batch_size: Annotated[int | None, typer.Option(min=1, help="default: as published; 64 for tiny")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="default: the best")] = None,
    pipeline_size: Annotated[int | None, typer.Option(min=1, help="default: the best")] = None,
    data_size: Annotated[int | None, typer.Option(min=1, help="default: the best")] = None,
    precision: PrecisionOption = "bf16",
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
    lost_steps: Annotated[
        int, typer.Option(min=0, max=MAX_LOST_STEPS, help="steps since the last checkpoint, which a move repeats")
    ] = 0,
    svg: Annotated[
        Path | None, typer.Option(help="also draw memory and the schedule of a step to this SVG file")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan a model on a pool: parallel sizes, and layers, recomputation, memory and time of each pipeline stage."""
    config = get_model_option(model)
    work = Workload(
        model=config,
        seq_len=seq_len or config.seq_len,
        global_batch_size=global_batch_size or PUBLISHED_BATCH_SIZES.get(model, 64),
        precision=precision,
        loss_block=None if full_logits else compute_default_loss_block(config),
        isolate_documents=not open_documents,
    )
    limits = SizeLimits(pipeline_size=pipeline_size, data_size=data_size, micro_batch_size=micro_batch_size)
    changed_pool = change_pool(load_pool_option(pool), lost=lost or (), added=added or (), slow=slow or ())
    move: Replan | None = None
    if current is None:
        new_plan = make_plan(work, changed_pool, limits, objective)
    else:
        current_plan = read_current_plan_option(current, work)
        move = replan(work, current_plan, changed_pool, limits, objective, lost_steps=lost_steps)
        new_plan = move.plan
    if svg is not None:
        svg.write_text(draw_plan(work, changed_pool, new_plan))

    data = new_plan.to_json()
    text = format_plan_table(new_plan)
    if move is not None:
        data["move"] = {key: value for key, value in asdict(move).items() if key != "plan"}
        text = f"{text}\n{move.explanation}"
    show(data, text, as_json)
    if not new_plan.feasible:
        raise typer.Exit(EXIT_FAILED)


def get_model_option(name: str) -> ModelConfig:
    """Return the model of an option `--model`; an unknown one gives one line and status 2."""
    if name not in MODEL_PRESETS:
        raise fail(f"unknown model {name!r}; choose one of {', '.join(MODEL_PRESETS)}", EXIT_USAGE)
    return MODEL_PRESETS[name]()


def read_current_plan_option(file: Path, work: Workload) -> PipelinePlan:
    """Read the plan of an option `--current`.

    Raises:
        ValueError: if the file cannot be read, or holds no plan of the given training.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_PLAN_BYTES + 1)
        if len(content) > MAX_PLAN_BYTES:
            raise ValueError(f"a plan has at most {MAX_PLAN_BYTES:,} bytes, and this file has more")
        return parse_current_plan(parse_json(content), work)
    except OSError as error:
        raise ValueError(
            f"--current {file} cannot be read: {error.strerror}; write it with `cotrain plan --json`"
        ) from None
    except BadJson as error:
        place = f"{error.place} " if error.place else ""
        raise ValueError(f"--current {file}: {place}{error}; write it with `cotrain plan --json`") from None
    except ValueError as error:
        raise ValueError(f"--current {file}: {error}") from None


def change_pool(pool: Pool, *, lost: Sequence[str], added: Sequence[str], slow: Sequence[str]) -> Pool:
    """Apply the options `--lost`, `--added` and `--slow` to a pool; an invalid one gives one line and status 2."""
    kinds: tuple[tuple[Literal["lost", "added", "slow"], Sequence[str]], ...]
    kinds = (("lost", lost), ("added", added), ("slow", slow))
    for kind, changes in kinds:
        for change in changes:
            try:
                pool = apply_pool_change(pool, kind, change)
            except ValueError as error:
                raise fail(f"--{kind}: {error}", EXIT_USAGE) from None
    return pool


def load_pool_option(spec: str | None) -> Pool:
    """Load the pool of an option `--pool`; without one, two processes on this machine."""
    if spec is None:
        return make_cpu_pool()
    if not spec.strip():
        raise fail("--pool must name a pool file as FILE or FILE:NAME, got an empty text", EXIT_USAGE)
    return load_pool(spec)

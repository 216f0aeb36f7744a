"""`cotrain plan`: plan the parallel layout of a model on a pool."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.output import EXIT_FAILED, JsonOption, name_options, parse_path, show, write_output_file
from flows.cli.plan_options import (
    DeviceChangesOption,
    ModelNameOption,
    PoolFileOption,
    PrecisionOption,
    SeqLenOption,
    change_pool,
    get_model_option,
    load_pool_option,
    read_current_plan_option,
)
from yuan.plan.json_fields import escape_text
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import Objective, draw_plan, make_plan
from yuan.plan.pool import Pool
from yuan.plan.replan import Replan, replan
from yuan.plan.search import SizeLimits
from yuan.plan.table import format_plan_table
from yuan.plan.workload import PUBLISHED_BATCH_SIZES, Workload, compute_default_loss_block

MAX_LOST_STEPS = 10**9


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
        Path | None,
        typer.Option(
            help="JSON of the current plan: also compute the cost of moving to the new one",
            parser=parse_path,
            metavar="PATH",
        ),
    ] = None,
    lost: DeviceChangesOption = None,
    added: DeviceChangesOption = None,
    slow: Annotated[
        list[str] | None, typer.Option(help="CLASS:N:SHARE, N devices at SHARE of the speed of the others")
    ] = None,
    lost_steps: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_LOST_STEPS, help="with --current: steps since the last checkpoint, default 0"),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(
            help="also draw memory and the schedule of a step to this SVG file", parser=parse_path, metavar="PATH"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan a model on a pool: parallel sizes, and layers, recomputation, memory and time of each pipeline stage."""
    if lost_steps is not None and current is None:
        rule = "needs --current, the plan whose steps are repeated; add it or leave the steps out"
        raise typer.BadParameter(rule, param_hint=["--lost-steps"])
    config = get_model_option(model)
    with name_options():
        work = Workload(
            model=config,
            seq_len=seq_len or config.seq_len,
            global_batch_size=global_batch_size or PUBLISHED_BATCH_SIZES.get(model, 64),
            precision=precision,
            loss_block=None if full_logits else compute_default_loss_block(config),
            isolate_documents=not open_documents,
        )
    limits = SizeLimits(pipeline_size=pipeline_size, data_size=data_size, micro_batch_size=micro_batch_size)
    loaded_pool = load_pool_option(pool)
    changed_pool = change_pool(loaded_pool, lost=lost or (), added=added or (), slow=slow or ())
    move: Replan | None = None
    if current is not None:
        current_plan = read_current_plan_option(current, work, (loaded_pool, changed_pool))
        with name_options():
            move = replan(work, current_plan, changed_pool, limits, objective, lost_steps=lost_steps or 0)
            new_plan = move.plan
    else:
        with name_options():
            new_plan = make_plan(work, changed_pool, limits, objective)
    if svg is not None:
        write_output_file("--svg", svg, draw_plan(work, changed_pool, new_plan))
    show_plan(new_plan, changed_pool, move, as_json)


def show_plan(plan: PipelinePlan, pool: Pool, move: Replan | None, as_json: bool) -> None:
    """Print a plan, and the move to it from the current one; the exit status is 1 if it does not fit."""
    data, text = plan.to_json(), format_plan_table(plan, pool)
    if move is not None:
        data["move"] = {key: value for key, value in asdict(move).items() if key != "plan"}
        text = f"{text}\n{escape_text(move.explanation)}"
    show(data, text, as_json)
    if not plan.feasible:
        raise typer.Exit(EXIT_FAILED)

"""`cotrain calibrate`: measure this machine's devices, and write a pool file with their rates."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from flows.calibrate_pool import measure_rates
from flows.cli.output import JsonOption, name_options, parse_path, show, stderr_console, write_output_file
from flows.cli.plan_options import (
    ModelNameOption,
    PoolFileOption,
    PrecisionOption,
    SeqLenOption,
    get_model_option,
    load_pool_option,
)
from yuan.plan.pool import find_device_group
from yuan.plan.pool_file import dump_pool
from yuan.plan.workload import MAX_GLOBAL_BATCH_SIZE

MAX_PROCESSES = 1024  # of one machine, each of which loads torch


def calibrate(
    out: Annotated[Path, typer.Option(help="the pool file to write", parser=parse_path, metavar="PATH")],
    model: ModelNameOption = "tiny",
    pool: PoolFileOption = None,
    device_class: Annotated[str | None, typer.Option(help="device class of the pool that this machine has")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=MAX_PROCESSES, help="default: one per GPU of this machine, else two")
    ] = None,
    seq_len: SeqLenOption = None,
    micro_batch_size: Annotated[int, typer.Option(min=1, max=MAX_GLOBAL_BATCH_SIZE)] = 1,
    precision: PrecisionOption = "bf16",
    as_json: JsonOption = False,
) -> None:
    """Measure a layer, the head, links and complete steps on this machine, and write a pool file with these rates."""
    loaded_pool = load_pool_option(pool)
    group = find_device_group(loaded_pool, device_class)
    config = get_model_option(model)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another file")
    with name_options():
        measured_group = measure_rates(
            config,
            group,
            processes,
            seq_len=seq_len or config.seq_len,
            micro_batch_size=micro_batch_size,
            precision=precision,
            report=lambda activity: stderr_console.print(f"{activity} ..."),
        )
    groups = tuple(measured_group if other is group else other for other in loaded_pool.groups)
    write_output_file("--out", out, dump_pool(replace(loaded_pool, groups=groups)))
    rates = asdict(measured_group)["measured"]
    lines = [f"{name:>15}  {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in rates.items()]
    text = "\n".join([*lines, f"written: {out}; next: cotrain plan --model {model} --pool {out}"])
    show({"pool": str(out), "device_class": group.device_class, "measured": rates}, text, as_json)

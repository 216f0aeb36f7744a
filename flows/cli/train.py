"""`cotrain train`: train a run folder on this machine."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn

from flows.cli.output import JsonOption, fail, show, stderr_console
from flows.supervisor.exit_reason import ExitReason, classify_exit
from flows.supervisor.status_line import describe_status
from infra.confinement import build_confined_environment
from infra.launchers.job import Job
from infra.launchers.local import LocalLauncher
from yuan.train.run_folder import TRAIN_LOG_FILE, RunFolder
from yuan.train.run_status import RunStatus


def train(
    run: Annotated[Path, typer.Argument(help="run.json of a run folder", exists=True)], as_json: JsonOption = False
) -> None:
    """Train a run to completion, from its last checkpoint if there is one. Ctrl-C stops it; rerun to resume."""
    folder = RunFolder((run if run.is_dir() else run.parent).resolve())
    plan, since = folder.check_inputs().plan, time.time()
    job = Job(
        name=f"train-{os.getpid()}",
        module="yuan.train.run",
        folder=folder.path,
        num_processes=plan.num_ranks,
        processes_per_node=plan.num_ranks,
        environment=build_confined_environment(folder.path, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1")),
        log_name=TRAIN_LOG_FILE,
    )
    with LocalLauncher().run(job) as running, show_progress() as advance:
        while (job_exit := running.wait(0.5)) is None:
            advance(folder.read_status(), since)
    run_exit = classify_exit(folder, job_exit, since)
    if run_exit.reason != ExitReason.FINISHED:
        log_file = folder.path / TRAIN_LOG_FILE
        raise fail(f"training ended, {run_exit.reason}: {run_exit.message}; the log is {log_file}")
    status = folder.read_status()
    show(status.to_json() if status else {}, f"trained: {folder.export}", as_json)


@contextmanager
def show_progress() -> Iterator[Callable[[RunStatus | None, float], None]]:
    """Show a progress bar on stderr; yield a function that takes a run's status and the earliest valid status time."""
    columns = (BarColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=stderr_console, transient=not stderr_console.is_terminal) as display:
        task = display.add_task("starting the ranks", total=None)

        def advance(status: RunStatus | None, since: float) -> None:
            if status and status.time >= since:
                line = describe_status(status)
                display.update(task, completed=status.step, total=status.max_steps, description=line)

        yield advance

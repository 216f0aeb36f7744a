"""`cotrain demo`: run the complete loop in a separate home folder."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from feedback.promotion_decision import PassRate
from flows.cli.output import JsonOption, stderr_console
from flows.cli.rounds import follow_round, open_operator_client
from flows.cli.stack import show_services
from flows.demo.scenario import DemoAccess, DemoFigures, run_demo
from flows.stack.stack_control import bring_up, take_down
from flows.stack.stack_status import get_public_urls
from infra.settings import HOME_VARIABLE, Settings, load_settings
from yuan.config import MAX_SEED, format_count

DEMO_HOME = Path(".cotrain/demo")


def demo(
    skills: Annotated[
        Path | None,
        typer.Option(help="file of skills to report instead of the default two", exists=True, dir_okay=False),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="seed of the data, the weights and the data order")
    ] = 0,
    down: Annotated[bool, typer.Option("--down", help="stop the stack at the end")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a base model, report its wrong answers, train a better model, notify the reporter."""
    started_at = time.monotonic()
    home = reset_demo_home()
    with show_services() as show_states:
        up_seconds = bring_up(home, show_states=show_states)
    stderr_console.print(f"the stack is up after {up_seconds:.1f} s")
    try:
        figures = _run_demo(skills, seed)
    finally:
        if down:
            take_down(home)
    figures = replace(figures, parts={"stack up": up_seconds, **figures.parts})
    seconds = round(time.monotonic() - started_at, 1)
    urls = get_public_urls(home)
    if as_json:
        Console(soft_wrap=True).print_json(data={**figures.to_json(), "seconds": seconds, "urls": urls})
        return
    _show_figures(figures, seconds)
    if not down:
        _show_access(home, urls)


def reset_demo_home() -> Path:
    """Stop the stack in the demo's home folder, delete the folder, and return its path."""
    home = DEMO_HOME.resolve()
    take_down(home)
    shutil.rmtree(home, ignore_errors=True)
    os.environ[HOME_VARIABLE] = str(home)
    return home


def _run_demo(skills: Path | None, seed: int) -> DemoFigures:
    with open_operator_client() as client:
        return run_demo(
            DemoAccess(load_settings(Settings).portal_url, client),
            skills_file=skills,
            seed=seed,
            print_line=stderr_console.print,
            follow_round=follow_round,
        )


def _show_figures(figures: DemoFigures, seconds: float) -> None:
    table = Table(title=f"v{figures.champion_before} before, v{figures.champion_after} after")
    for heading in ("suite", "before", "after", "95 % interval after", "cases"):
        table.add_column(heading)
    for suite in figures.suites:
        table.add_row(
            suite.suite,
            "" if suite.before is None else _format_rate_before(suite.before),
            f"{suite.after.rate:.1%}",
            "{:.1%} to {:.1%}".format(*suite.after.interval),
            str(suite.after.total),
        )
    console = _make_console()
    console.print(table)
    verdicts = f"{figures.fixed} fixed, {figures.still_failing} still failing"
    notices = f"{format_count(figures.notices, 'notice')} on the reporter's timeline"
    console.print(f"{format_count(figures.reports, 'report')} accepted: {verdicts}; {notices}")
    for refusal in figures.refused:
        console.print(f"refused as expected: {refusal.request} with {refusal.status}: {refusal.reason}")
    console.print("  ".join(f"{name} {part_seconds:.0f} s" for name, part_seconds in figures.parts.items()))
    console.print(f"{seconds:.0f} s in all")


def _format_rate_before(before: PassRate) -> str:
    low, high = before.interval
    return f"{before.rate:.1%} [{low:.1%}, {high:.1%}]"


def _show_access(home: Path, urls: dict[str, str]) -> None:
    console = _make_console()
    for name, url in urls.items():
        console.print(f"{name:8} {url}")
    console.print(f"accounts and tokens are in {home / 'env'}; next: COTRAIN_HOME={home} .venv/bin/cotrain down")


def _make_console() -> Console:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a log file has no width
        console.width = 120
    return console

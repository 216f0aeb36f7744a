"""`cotrain up | down | status | logs | doctor | rotate`: control the embedded stack."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from flows.cli.output import MAX_LINE_CHARACTERS, JsonOption, fail, show, show_table, stderr_console
from flows.stack.findings import Finding
from flows.stack.stack_control import ServiceStates, ShowStates, are_all_ready, bring_up, rotate_secrets, take_down
from flows.stack.stack_status import diagnose, get_public_urls, read_stack_status
from infra.files import read_last_lines
from infra.settings import get_home_folder
from yuan.data.text import make_printable


def up(as_json: JsonOption = False) -> None:
    """Start the embedded stack and wait until every service is ready. Idempotent."""
    home = _get_home()
    with show_services() as show_states:
        seconds = bring_up(home, show_states=show_states)
    urls = get_public_urls(home)
    lines = [f"{name:13} {url}" for name, url in urls.items()]
    text = "\n".join([f"the stack in {home} is up ({seconds:.1f} s)", *lines, "next: cotrain status, cotrain down"])
    show({"home": str(home), "seconds": seconds, "urls": urls}, text, as_json)


def down(as_json: JsonOption = False) -> None:
    """Stop the embedded stack; its data is kept."""
    home = _get_home()
    was_up = take_down(home)
    text = f"the stack in {home} is {'stopped' if was_up else 'not up'}"
    show({"home": str(home), "stopped": was_up}, text, as_json)


def status(as_json: JsonOption = False) -> None:
    """Show the state of every service, the registration that runs, and the faults found."""
    home = _get_home()
    stack = read_stack_status(home)
    last_lines = [_describe_finding(finding) for finding in stack.faults]
    if stack.registration is not None:
        last_lines.insert(0, make_printable(stack.registration.describe()))
    if as_json:
        faults = [finding.to_json() for finding in stack.faults]
        services = {name: asdict(state) for name, state in stack.services.items()}
        content = {"home": str(home), "up": stack.is_up, "services": services}
        registration = None if stack.registration is None else asdict(stack.registration)
        show({**content, "urls": stack.urls, "registration": registration, "faults": faults}, "", True)
    elif stack.is_up:
        show_table(_build_service_table(stack.services))
        print("\n".join([*(f"{name:13} {url}" for name, url in stack.urls.items()), *last_lines]))
    else:
        print("\n".join([f"the stack in {home} is not up; start it with `cotrain up`", *last_lines]))
    if stack.faults or not are_all_ready(stack.services):
        raise typer.Exit(1)


def logs(
    service: Annotated[str, typer.Argument(help="name of a service, or `flows` or `keeper`")] = "keeper",
    lines: Annotated[int, typer.Option("-n", help="number of lines", min=1, max=1_000_000)] = 50,
) -> None:
    """Print the end of a service's log."""
    folder = _get_home() / "logs"
    file = folder / f"{service}.log"
    if not file.is_file() or file.parent != folder:
        names = sorted(path.stem for path in folder.glob("*.log"))
        fix = f"choose one of {', '.join(names)}" if names else "start the stack with `cotrain up`"
        raise fail(f"there is no log of {service!r} in {folder}; {fix}")
    for line in read_last_lines(file, lines):  # escaped, so that a log cannot send control codes to the terminal
        print("".join(letter if letter.isprintable() or letter == "\t" else repr(letter)[1:-1] for letter in line))


def doctor(as_json: JsonOption = False) -> None:
    """Check this machine and the stack, as users experience it, and print each fault with its fix."""
    findings = diagnose(_get_home())
    faults = [finding for finding in findings if finding.fault]
    text = "\n".join([*map(_describe_finding, findings), *([] if faults else ["no faults found"])])
    # `mend` is a deprecated copy of `fix`.
    faults_json = [{"fault": finding.fault, "fix": finding.fix, "mend": finding.fix} for finding in faults]
    show({"faults": faults_json, "findings": [finding.to_json() for finding in findings]}, text, as_json)
    if faults:
        raise typer.Exit(1)


def rotate(
    secret: Annotated[list[str] | None, typer.Option(help="rotate only this secret; may be repeated")] = None,
    as_json: JsonOption = False,
) -> None:
    """Replace the stack's secrets by new ones; a running stack is restarted, and a running round resumes."""
    home = _get_home()
    with show_services() as show_states:
        names, seconds = rotate_secrets(home, secret or (), show_states=show_states)
    is_up = seconds is not None
    effect = f"the stack is up again ({seconds:.1f} s)" if is_up else "they take effect at the next `cotrain up`"
    text = f"rotated {', '.join(names)}; {effect}; accounts and tokens are in {home / 'env'}"
    show({"rotated": names, "seconds": seconds}, text, as_json)


@contextmanager
def show_services() -> Iterator[ShowStates]:
    """Show a table of the services on stderr while the block runs; yield the function that updates it."""
    with Live(console=stderr_console, refresh_per_second=4, transient=True) as live:
        yield lambda states: live.update(_build_service_table(states))


def _build_service_table(states: ServiceStates) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("service", "state", "pid", "seconds", "restarts", ""):
        table.add_column(heading)
    for name, state in states.items():
        reason = state.error or state.restart_reason
        cells = (state.state, state.pid, state.seconds, state.restarts or None, reason)
        texts = ("" if cell is None else make_printable(str(cell), MAX_LINE_CHARACTERS) for cell in cells)
        table.add_row(name, *texts)
    return table


def _describe_finding(finding: Finding) -> str:
    if finding.fault:
        return f"- {finding.fault}\n  last success: {finding.describe_last_success()}\n  fix: {finding.fix}"
    outcome = "not yet observed" if finding.state == "never yet" else f"ok at {finding.describe_last_success()}"
    return f"  {finding.subject}: {outcome}"


def _get_home() -> Path:
    home = get_home_folder()
    if home.exists() and not home.is_dir():
        raise fail(f"COTRAIN_HOME must be a folder, got the file {home}; choose another path")
    return home

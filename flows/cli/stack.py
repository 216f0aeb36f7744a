"""`cotrain up | down | status | logs | doctor | rotate`: control the embedded stack."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.cli.output import MAX_LINE_CHARACTERS, JsonOption, explain_errors, fail, show, show_table, stderr_console
from yuan.data.text import make_printable

if TYPE_CHECKING:
    from flows.stack.probing import Finding

UP_TIMEOUT_S = 120.0
LOG_LINE_BYTES = 2000  # bytes read from the end of a log per requested line
MAX_STARTUP_RESTARTS = 3  # a service that exited this often at startup will not become ready by waiting
KEEPER_LOG_LINES = 5  # shown from the log of a keeper that has exited
DOWN_TIMEOUT_S, SILENT_KEEPER_GRACE_S = 60.0, 15.0  # for a keeper with a heartbeat, and for one without
KILL_TIMEOUT_S = 5.0


def add_commands(app: typer.Typer) -> None:
    for command in (up, down, status, logs, doctor, rotate):
        app.command()(command)


def up(as_json: JsonOption = False) -> None:
    """Start the embedded stack and wait until every service is ready. Idempotent."""
    with explain_errors():
        home = _get_home()
        seconds = bring_up(home)
        urls = get_public_urls(home)
        lines = [f"{name:13} {url}" for name, url in urls.items()]
        text = "\n".join([f"the stack in {home} is up ({seconds:.1f} s)", *lines, "next: cotrain status, cotrain down"])
        show({"home": str(home), "seconds": seconds, "urls": urls}, text, as_json)


def bring_up(home: Path, *, durable: bool = True) -> float:
    """Start the keeper if none runs, wait for its services with a live display, and return the elapsed seconds.

    Raises:
        RuntimeError: if the machine has a fault or a service does not start; the message has each fault and its fix.
    """
    from flows.stack.doctor import find_keeper_faults, find_machine_faults, find_setting_faults
    from flows.stack.stack_config import drop_retired_secrets
    from infra.keeper_lock import is_keeper_running

    started_at = time.monotonic()
    keeper = None
    _raise_faults(find_setting_faults(home))
    if is_keeper_running(home):
        _raise_faults(find_keeper_faults(home))
    else:
        _raise_faults(find_machine_faults(home))
        keeper = _start_keeper(home, durable=durable)
    try:
        _wait_until_ready(home, keeper)
    except KeyboardInterrupt:
        take_down(home)
        raise
    drop_retired_secrets(home)
    return round(time.monotonic() - started_at, 1)


def _raise_faults(faults: list["Finding"]) -> None:
    if faults:
        raise RuntimeError("; ".join(f"{finding.fault}: {finding.mend}" for finding in faults))


@dataclass(frozen=True)
class _KeeperProcess:
    """A keeper that this command started, its log, and the byte offset where its output begins there."""

    process: "subprocess.Popen[bytes]"
    log: Path
    log_start: int

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def describe_end(self) -> str:
        lines = [line for line in _read_last_lines(self.log, KEEPER_LOG_LINES, self.log_start) if line]
        return "\n".join([f"the keeper ended with status {self.process.returncode}; {self.log} ends with", *lines])


def _start_keeper(home: Path, *, durable: bool) -> _KeeperProcess:
    from flows.stack.stack_config import load_or_make_config
    from infra.settings import HOME_VARIABLE, NO_TELEMETRY_VARIABLES

    load_or_make_config(home, durable=durable)
    (home / "logs").mkdir(exist_ok=True, mode=0o700)
    log = home / "logs" / "keeper.log"
    with log.open("ab") as output:
        log_start = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.stack"],
            env={**os.environ, **NO_TELEMETRY_VARIABLES, HOME_VARIABLE: str(home)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _KeeperProcess(process, log, log_start)


def _wait_until_ready(home: Path, keeper: _KeeperProcess | None) -> None:
    from infra.keeper import read_stack_state
    from infra.keeper_lock import is_keeper_running

    end = time.monotonic() + UP_TIMEOUT_S
    is_gone = False
    with Live(console=stderr_console, refresh_per_second=4, transient=True) as live:
        while True:
            states = read_stack_state(home).get("services", {})
            live.update(_build_service_table(states))
            if states and all(state["state"] == "ready" for state in states.values()):
                return
            # Our keeper may have exited because another `up` started its keeper first; that one counts.
            is_gone = (keeper is None or keeper.has_ended()) and not is_keeper_running(home)
            hopeless = any(state["restarts"] >= MAX_STARTUP_RESTARTS for state in states.values())
            if hopeless or time.monotonic() > end or is_gone:
                break
            time.sleep(0.1)
    if is_gone and keeper is not None:
        raise RuntimeError(f"the stack did not come up: {keeper.describe_end()}")
    not_ready = [f"{name}: {s['error'] or s['state']}" for name, s in states.items() if s["state"] != "ready"]
    detail = "; ".join(not_ready) or ("the keeper has ended" if is_gone else "no service has started")
    raise RuntimeError(f"the stack did not come up: {detail}; logs are in {home / 'logs'}, see `cotrain doctor`")


def _build_service_table(states: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("service", "state", "pid", "seconds", "restarts", ""):
        table.add_column(heading)
    for name, s in states.items():
        cells = (s["state"], s["pid"], s["seconds"], s["restarts"] or None, s["error"] or s["restart_reason"])
        texts = ("" if cell is None else make_printable(str(cell), MAX_LINE_CHARACTERS) for cell in cells)
        table.add_row(name, *map(Text, texts))  # as Text, so that brackets in an error are not parsed as markup
    return table


def down(as_json: JsonOption = False) -> None:
    """Stop the embedded stack; its data is kept."""
    with explain_errors():
        home = _get_home()
        was_up = take_down(home)
        show(
            {"home": str(home), "stopped": was_up},
            f"the stack in {home} is {'stopped' if was_up else 'not up'}",
            as_json,
        )


def take_down(home: Path) -> bool:
    """Stop the keeper and its services, and wait until all processes of the stack have exited; false if none ran."""
    from flows.stack.stack_config import CONFIG_FILE, load_config
    from infra.keeper import find_stack_pids, kill_stack_processes, read_stack_state
    from infra.keeper_lock import KEEPER_LOCK_FILE, find_keeper

    keeper = find_keeper(home)
    if keeper is None and not (home / CONFIG_FILE).exists():
        return False
    if keeper is not None:
        # Keepers of older versions write their pid only to the state file, not to the lock file.
        pid = keeper.pid or read_stack_state(home).get("pid")
        if pid is None:
            raise RuntimeError(f"{home} is locked by a keeper whose pid is in no file; end the lock's holder: "
                               f"fuser -k {home / KEEPER_LOCK_FILE}")  # fmt: skip
        _end_keeper(pid, SILENT_KEEPER_GRACE_S if keeper.is_silent else DOWN_TIMEOUT_S)
    # The keeper's lock has the stack id even if the config can no longer be read.
    stack_id = keeper.stack_id if keeper is not None and keeper.stack_id else load_config(home).stack_id
    killed = kill_stack_processes(stack_id, spare={os.getpid()})
    while any(pid != os.getpid() for pid in find_stack_pids(stack_id)):
        time.sleep(0.05)
    return keeper is not None or bool(killed)


def _end_keeper(pid: int, grace_s: float) -> None:
    """Stop the keeper and wait until its process has exited; kill one that hangs, which also ends its services."""
    from infra.processes import has_exited

    with contextlib.suppress(ProcessLookupError):
        for number, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_TIMEOUT_S)):
            os.kill(pid, number)
            end = time.monotonic() + seconds
            while not has_exited(pid) and time.monotonic() < end:
                time.sleep(0.05)
            if has_exited(pid):
                return


def status(as_json: JsonOption = False) -> None:
    """Show the state of every service, and the faults found."""
    from flows.stack.doctor import (
        KEEPER_SUBJECT,
        find_config_faults,
        find_disk_faults,
        find_keeper_faults,
        find_setting_faults,
    )
    from infra.keeper import read_stack_state
    from infra.keeper_lock import is_keeper_running

    with explain_errors():
        home = _get_home()
        running = is_keeper_running(home)
        states = read_stack_state(home).get("services", {}) if running else {}
        config_faults = find_config_faults(home)
        faults = [*find_disk_faults(home), *find_setting_faults(home), *find_keeper_faults(home), *config_faults]
        urls = get_public_urls(home) if running and not config_faults else {}
        faults += [finding for finding in _examine_running_stack(home) if finding.fault]
        if as_json:
            faults_json = [finding.to_json() for finding in faults]
            show({"home": str(home), "up": running, "services": states, "urls": urls, "faults": faults_json}, "", True)
        elif running:
            show_table(_build_service_table(states))
            print("\n".join([*(f"{name:13} {url}" for name, url in urls.items()), *map(_describe_finding, faults)]))
        else:
            print(
                "\n".join(
                    [f"the stack in {home} is not up; start it with `cotrain up`", *map(_describe_finding, faults)]
                )
            )
    are_ready = bool(states) and all(state["state"] == "ready" for state in states.values())
    if not are_ready or any(finding.what == KEEPER_SUBJECT for finding in faults):
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
        raise fail(f"there is no log of {service!r} in {folder}; there are {names}")
    for line in _read_last_lines(file, lines):  # escaped, so that a log cannot send control codes to the terminal
        print("".join(letter if letter.isprintable() or letter == "\t" else repr(letter)[1:-1] for letter in line))


def _read_last_lines(file: Path, count: int, start: int = 0) -> list[str]:
    """Return the last lines of a log, reading no byte before `start`."""
    with file.open("rb") as stream:
        stream.seek(max(start, file.stat().st_size - count * LOG_LINE_BYTES))
        text = stream.read(count * LOG_LINE_BYTES).decode(errors="replace")
    return text.removesuffix("\n").split("\n")[-count:]


def doctor(as_json: JsonOption = False) -> None:
    """Check this machine and the stack, as users experience it, and print each fault with its fix."""
    from flows.stack.doctor import find_machine_faults, find_setting_faults, find_stack_faults

    with explain_errors():
        home = _get_home()
        findings = (
            find_setting_faults(home)
            + find_machine_faults(home)
            + find_stack_faults(home)
            + _examine_running_stack(home)
        )
    faults = [finding for finding in findings if finding.fault]
    text = "\n".join([*map(_describe_finding, findings), *([] if faults else ["no faults found"])])
    faults_json = [{"fault": finding.fault, "mend": finding.mend} for finding in faults]
    show({"faults": faults_json, "findings": [finding.to_json() for finding in findings]}, text, as_json)
    if faults:
        raise typer.Exit(1)


def rotate(
    secret: Annotated[list[str] | None, typer.Option(help="rotate only this secret; may be repeated")] = None,
    as_json: JsonOption = False,
) -> None:
    """Replace the stack's secrets by new ones; a running stack is restarted, and a running round resumes."""
    from flows.stack.doctor import find_setting_faults
    from flows.stack.stack_config import retire_secrets
    from infra.keeper_lock import is_keeper_running

    with explain_errors():
        home = _get_home()
        if not (home / "stack-config.json").exists():
            raise fail(f"there is no stack in {home}; make one with `cotrain up`")
        was_up = is_keeper_running(home)
        _raise_faults(find_setting_faults(home))  # checked first: with a fault the stopped stack would not restart
        names = retire_secrets(home, secret or ())
        if was_up:
            take_down(home)
        seconds = bring_up(home) if was_up else None
        effect = f"the stack is up again ({seconds:.1f} s)" if was_up else "they take effect at the next `cotrain up`"
        text = f"rotated {', '.join(names)}; {effect}; accounts and tokens are in {home / 'env'}"
        show({"rotated": names, "seconds": seconds}, text, as_json)


def _examine_running_stack(home: Path) -> list["Finding"]:
    """Return the probes' findings about a running stack; none if no stack runs or its settings cannot be read."""
    from flows.stack.doctor import find_config_faults, find_setting_faults
    from infra.keeper_lock import is_keeper_running

    if not is_keeper_running(home) or find_config_faults(home) or find_setting_faults(home):
        return []
    from flows.cli.model import open_installation
    from flows.stack.probes import examine_stack

    return examine_stack(open_installation())


def _describe_finding(finding: "Finding") -> str:
    if finding.fault:
        return f"- {finding.fault}\n  last success: {finding.when}\n  fix: {finding.mend}"
    outcome = "not yet observed" if finding.state == "never yet" else f"ok at {finding.when}"
    return f"  {finding.what}: {outcome}"


def get_public_urls(home: Path) -> dict[str, str]:
    """Return the URLs of the web interfaces by service."""
    from flows.stack.stack_config import load_config

    ports = load_config(home).ports
    return {name: f"http://127.0.0.1:{ports[name]}" for name in ("portal", "prefect", "mlflow")}


def _get_home() -> Path:
    try:
        from infra.settings import get_home_folder
    except ModuleNotFoundError:
        raise fail("the embedded stack needs the extra [platform]: pip install 'cotrain[platform]'") from None
    home = get_home_folder()
    if home.exists() and not home.is_dir():
        raise fail(f"COTRAIN_HOME must be a folder, got the file {home}; choose another path")
    return home

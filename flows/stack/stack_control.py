"""Start and stop the embedded stack, and replace its secrets."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.stack.doctor import find_keeper_faults, find_machine_faults, find_setting_faults
from flows.stack.findings import Finding
from flows.stack.stack_config import (
    CONFIG_FILE,
    drop_retired_secrets,
    load_config,
    load_or_make_config,
    retire_secrets,
)
from infra.files import read_last_lines
from infra.keeper import find_stack_pids, kill_stack_processes
from infra.keeper_lock import KEEPER_LOCK_FILE, find_keeper, is_keeper_running
from infra.keeper_state import ServiceState, read_keeper_state, read_service_states
from infra.polling import poll_until
from infra.processes import has_exited
from infra.settings import HOME_VARIABLE
from infra.telemetry import NO_TELEMETRY_VARIABLES

UP_TIMEOUT_S = 120.0
MAX_STARTUP_RESTARTS = 3  # a service that exited this often at startup will not become ready by waiting
KEEPER_LOG_LINES = 5  # shown from the log of a keeper that has exited
DOWN_TIMEOUT_S = 60.0  # for a keeper with a heartbeat
SILENT_KEEPER_GRACE_S = 15.0  # for a keeper without one
KEEPER_KILL_TIMEOUT_S = 5.0
EXIT_TIMEOUT_S = 60.0  # for killed processes

ServiceStates = Mapping[str, ServiceState]  # by the service's name
ShowStates = Callable[[ServiceStates], None]


def ignore_states(states: ServiceStates) -> None:
    """Show nothing."""


def bring_up(home: Path, *, durable: bool = True, show_states: ShowStates = ignore_states) -> float:
    """Start the keeper if none runs, wait for its services, and return the elapsed seconds.

    Args:
        durable: make the database write to disk at every commit; only a new stack can choose.
        show_states: called with the states of the services several times a second.

    Raises:
        RuntimeError: if the machine has a fault or a service does not start; the message has each fault and its fix.
    """
    started_at = time.monotonic()
    keeper = None
    _raise_faults(find_setting_faults(home))
    if is_keeper_running(home):
        _raise_faults(find_keeper_faults(home))
    else:
        _raise_faults(find_machine_faults(home))
        keeper = _start_keeper(home, durable=durable)
    try:
        _wait_until_ready(home, keeper, show_states)
    except KeyboardInterrupt:
        take_down(home)
        raise
    drop_retired_secrets(home)
    return round(time.monotonic() - started_at, 1)


def _raise_faults(faults: Sequence[Finding]) -> None:
    if faults:
        raise RuntimeError("; ".join(f"{finding.fault}: {finding.fix}" for finding in faults))


@dataclass(frozen=True)
class _KeeperProcess:
    """Hold a keeper that this process started, its log, and the byte offset where its output begins there."""

    process: subprocess.Popen[bytes]
    log: Path
    log_start: int

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def describe_end(self) -> str:
        lines = [line for line in read_last_lines(self.log, KEEPER_LOG_LINES, start=self.log_start) if line]
        return "\n".join([f"the keeper ended with status {self.process.returncode}; {self.log} ends with", *lines])


def _start_keeper(home: Path, *, durable: bool) -> _KeeperProcess:
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


def _wait_until_ready(home: Path, keeper: _KeeperProcess | None, show_states: ShowStates) -> None:
    """Wait until every service is ready.

    Raises:
        RuntimeError: at the timeout, if the keeper exits, or if a service fails again and again.
    """
    states: ServiceStates = {}
    has_keeper_exited = False

    def is_over() -> bool:
        """Return True if waiting longer would change nothing."""
        nonlocal states, has_keeper_exited
        states = read_service_states(home)
        show_states(states)
        if are_all_ready(states):
            return True
        # Our keeper may have exited because another `up` started its keeper first; that one counts.
        has_keeper_exited = (keeper is None or keeper.has_ended()) and not is_keeper_running(home)
        return has_keeper_exited or any(state.restarts >= MAX_STARTUP_RESTARTS for state in states.values())

    poll_until(is_over, timeout_s=UP_TIMEOUT_S, pause_s=0.1)
    if are_all_ready(states):
        return
    if has_keeper_exited and keeper is not None:
        raise RuntimeError(f"the stack did not come up, see `cotrain doctor`: {keeper.describe_end()}")
    not_ready = [f"{name}: {state.error or state.state}" for name, state in states.items() if state.state != "ready"]
    detail = "; ".join(not_ready) or ("the keeper has ended" if has_keeper_exited else "no service has started")
    raise RuntimeError(f"the stack did not come up: {detail}; logs are in {home / 'logs'}, see `cotrain doctor`")


def are_all_ready(states: ServiceStates) -> bool:
    """Return True if there are services and all of them are ready."""
    return bool(states) and all(state.state == "ready" for state in states.values())


def take_down(home: Path) -> bool:
    """Stop the keeper and its services, and wait until all processes of the stack have exited; false if none ran."""
    keeper = find_keeper(home)
    if keeper is None and not (home / CONFIG_FILE).exists():
        return False
    if keeper is not None:
        # Keepers of older versions write their pid only to the state file, not to the lock file.
        state = read_keeper_state(home)
        pid = keeper.pid or (state.pid if state else None)
        if pid is None:
            raise RuntimeError(
                f"{home} is locked by a keeper whose pid is in no file; end the lock's holder: "
                f"fuser -k {home / KEEPER_LOCK_FILE}"
            )
        _end_keeper(pid, SILENT_KEEPER_GRACE_S if keeper.is_silent else DOWN_TIMEOUT_S)
    # The keeper's lock has the stack id even if the config can no longer be read.
    stack_id = keeper.stack_id if keeper is not None and keeper.stack_id else load_config(home).stack_id
    killed = kill_stack_processes(stack_id, spare={os.getpid()})
    _wait_for_exits(stack_id)
    return keeper is not None or bool(killed)


def _wait_for_exits(stack_id: str) -> None:
    """Wait until no other process of the stack exists.

    Raises:
        RuntimeError: at the timeout, with their pids; a process in the kernel, for example on a lost disk, cannot exit.
    """
    remaining: list[int] = []

    def have_exited() -> bool:
        remaining[:] = [pid for pid in find_stack_pids(stack_id) if pid != os.getpid()]
        return not remaining

    if not poll_until(have_exited, timeout_s=EXIT_TIMEOUT_S, pause_s=0.05):
        pids = ", ".join(map(str, remaining))
        raise RuntimeError(
            f"processes of the stack were killed and do not exit: {pids}; see what they wait for in "
            f"/proc/{remaining[0]}/stack, and repeat `cotrain down`"
        )


def _end_keeper(pid: int, grace_s: float) -> None:
    """Stop the keeper and wait until its process has exited; kill one that hangs, which also ends its services."""
    with contextlib.suppress(ProcessLookupError):
        for number, timeout_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KEEPER_KILL_TIMEOUT_S)):
            os.kill(pid, number)
            if poll_until(lambda: has_exited(pid), timeout_s=timeout_s, pause_s=0.05):
                return


def rotate_secrets(
    home: Path, names: Sequence[str] = (), *, show_states: ShowStates = ignore_states
) -> tuple[list[str], float | None]:
    """Replace the named secrets, or all that can be rotated, and restart a running stack.

    Returns:
        The names of the replaced secrets, and the seconds of the restart; None if no stack ran.

    Raises:
        ValueError: as `retire_secrets`, or if there is no stack in the folder.
        RuntimeError: as `bring_up`.
    """
    if not (home / CONFIG_FILE).exists():
        raise ValueError(f"there is no stack in {home}; make one with `cotrain up`")
    was_up = is_keeper_running(home)
    _raise_faults(find_setting_faults(home))  # checked first: with a fault the stopped stack would not restart
    replaced = retire_secrets(home, names)
    if not was_up:
        return replaced, None
    take_down(home)
    return replaced, bring_up(home, show_states=show_states)

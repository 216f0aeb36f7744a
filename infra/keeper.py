"""Keep a list of services running: start in order, restart what dies, stop without leftovers.

The keeper is one process; every service is its child, dies with it, and carries the stack's id
in its environment, so that even the grandchildren of a killed stack are found.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infra.health import LivenessMonitor, LivenessPolicy, get_first_line
from infra.keeper_lock import hold_keeper_lock
from infra.listeners import open_listener, refuse_foreign_listener, require_own_listener
from infra.orphans import OrphanReaper
from infra.processes import find_pids, has_exited, kill_processes, measure_cpu_demand_s

log = logging.getLogger(__name__)

STACK_ID_VARIABLE = "COTRAIN_KEPT_FOR"  # never in a file that people source, since what carries it is killed
SERVICE_STOP_GRACE_S = 12.0
SERVICE_RESTART_PAUSE_S = 0.5
KEEPER_HEARTBEAT_EVERY_S = 1.0
ORPHAN_REAP_EVERY_S = 10.0  # a look at every process of the machine


def do_nothing() -> None:
    """The step of a service that needs none."""


@dataclass(frozen=True, kw_only=True)
class ManagedService:
    """One server process and what it takes to call it ready.

    `before` runs ahead of every start, `check` raises until the service answers, `after` runs once it does. From
    then on `liveness` decides whether a process that runs is alive; without it, one that runs is.

    Another local user can take a server's port while it is down, and would get the passwords that its callers send. So
    a server that can use a socket which it inherits has `listen`, the URL where the keeper listens from the server's
    first start to its own end; the server finds the socket as its standard input, and its successor another one, with
    none of the options that a server which was taken over may have set. Those that cannot have `addresses`,
    where they listen themselves: `check`, `after` and `liveness` run only while the listener there belongs to `uids`,
    by default to this user.
    """

    name: str
    command: Callable[[], list[str]]
    env: Mapping[str, str]
    cwd: Path
    check: Callable[[], None]
    before: Callable[[], None] = do_nothing
    after: Callable[[], None] = do_nothing
    liveness: LivenessPolicy | None = None
    needs: tuple[str, ...] = ()
    listen: str | None = None
    addresses: tuple[str, ...] = ()
    uids: tuple[int, ...] = field(default_factory=lambda: (os.geteuid(),))
    stop_signal: signal.Signals = signal.SIGTERM
    start_timeout_s: float = 90.0

    def run_guarded_check(self, check: Callable[[], None]) -> None:
        """Run a check of this service, unless somebody else would receive what it sends.

        Raises:
            OSError: if nobody listens on an address, or somebody else does; and whatever the check raises.
        """
        for url in self.addresses:
            require_own_listener(url, self.uids)
        check()


@dataclass
class ServiceState:
    """What the keeper knows of a service; written to the state file for `up`, `status` and `doctor`."""

    state: str = "waiting"
    pid: int | None = None
    seconds: float | None = None
    ready_at: float | None = None  # the last time that it became ready; in seconds since 1970, also while it is down
    restarts: int = 0
    restart_reason: str | None = None
    error: str | None = None


@dataclass
class Keeper:
    """Runs the services until told to stop. `run` blocks; signals end it."""

    services: Sequence[ManagedService]
    folder: Path
    stack_id: str
    states: dict[str, ServiceState] = field(default_factory=dict)
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _listeners: dict[str, socket.socket] = field(default_factory=dict)
    _ready: dict[str, threading.Event] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def run(self) -> None:
        """Hold the folder's lock, keep every service alive, and stop all of them on SIGTERM or SIGINT.

        Raises:
            BlockingIOError: if another keeper holds the folder.
        """
        with hold_keeper_lock(self.folder, self.stack_id) as give_sign:
            orphans = OrphanReaper()
            kill_stack_processes(self.stack_id, spare={os.getpid()})
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, lambda *_: self._stopping.set())
            self._run_services(give_sign, orphans)

    def _run_services(self, give_sign: Callable[[], None], orphans: OrphanReaper) -> None:
        self.states = {service.name: ServiceState() for service in self.services}
        self._ready = {service.name: threading.Event() for service in self.services}
        self._write_state_file()
        threads = [
            threading.Thread(target=self._keep_service_running, args=(s,), name=s.name, daemon=True)
            for s in self.services
        ]
        for thread in threads:
            thread.start()
        bury_at = 0.0
        while not self._stopping.wait(KEEPER_HEARTBEAT_EVERY_S):
            give_sign()
            if time.monotonic() >= bury_at:
                orphans.reap({process.pid for process in self._processes.copy().values()})
                bury_at = time.monotonic() + ORPHAN_REAP_EVERY_S
        for service in reversed(self.services):
            self._stop_process(service)
        kill_stack_processes(self.stack_id, spare={os.getpid()})
        if left := orphans.kill_all():
            log.warning("killed %s, which no service had ended", left)
        (self.folder / "stack.json").unlink(missing_ok=True)

    def _keep_service_running(self, service: ManagedService) -> None:
        """Life of one service. The thread stays, since a child's death signal hangs on the thread that started it."""
        for needed in service.needs:
            while not self._ready[needed].wait(0.1):
                if self._stopping.is_set():
                    return
        while not self._stopping.is_set():
            try:
                self._start_service(service)
                reason = self._wait_for_failure(service)
            except Exception as error:  # whatever a service's own steps raise is its state, not the keeper's end
                log.exception("starting %s failed", service.name)
                reason = get_first_line(error)
                self._update_state(service, state="failed", error=reason)
            if not self._stopping.is_set():
                self._stop_for_restart(service, reason)
            self._stopping.wait(SERVICE_RESTART_PAUSE_S)

    def _start_service(self, service: ManagedService) -> None:
        began = time.monotonic()
        self._update_state(service, state="starting", error=None)
        for url in service.addresses:
            refuse_foreign_listener(url, service.uids)  # the server would end with "address in use", naming nobody
        listener = self._get_listener(service)
        service.before()
        with self._lock:
            if self._stopping.is_set():
                return
            with (self.folder / "logs" / f"{service.name}.log").open("ab") as output:
                process = subprocess.Popen(
                    service.command(),
                    env={**service.env, STACK_ID_VARIABLE: self.stack_id},
                    cwd=service.cwd,
                    stdin=listener.fileno() if listener else subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._processes[service.name] = process
        self._update_state(service, pid=process.pid)
        self._wait_until_ready(service, process, began + service.start_timeout_s)
        service.run_guarded_check(service.after)
        self._update_state(
            service, state="ready", seconds=round(time.monotonic() - began, 1), ready_at=time.time(), error=None
        )
        self._ready[service.name].set()

    def _get_listener(self, service: ManagedService) -> socket.socket | None:
        """Return the socket on which a server will listen."""
        if service.listen and service.name not in self._listeners:
            self._listeners[service.name] = open_listener(service.listen)
        return self._listeners.get(service.name)

    def _replace_listener(self, service: ManagedService) -> None:
        """Replace a server's socket, without a moment in which another user could take the port.

        Callers that wait for the old one to accept them lose their connection, as those whom the dead server answered.
        """
        old = self._listeners.pop(service.name, None)
        if old is not None and service.listen:
            try:
                self._listeners[service.name] = open_listener(service.listen, replaces=old)
            except OSError as error:  # the next start tries again, and says so
                log.warning("%s: %s", service.name, error)
            old.close()

    def _wait_until_ready(self, service: ManagedService, process: subprocess.Popen[bytes], deadline: float) -> None:
        """Poll the check until it passes; the process ending or the deadline is an error with the last reason."""
        reason = "no answer yet"
        while not self._stopping.is_set():
            if process.poll() is not None:
                raise RuntimeError(
                    f"{service.name} ended with status {process.returncode}; see logs/{service.name}.log"
                )
            try:
                return service.run_guarded_check(service.check)
            except Exception as error:  # any refusal means not ready
                reason = f"{type(error).__name__}: {get_first_line(error)}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"{service.name} did not become ready: {reason}; see logs/{service.name}.log")
            time.sleep(0.1)

    def _wait_for_failure(self, service: ManagedService) -> str:
        """Wait until the process has ended, or is to be ended since it is not alive, and return the reason."""
        process, liveness = self._processes.get(service.name), service.liveness
        if process is None or liveness is None:
            return f"it ended with status {process.wait() if process else None}"
        guarded = replace(liveness, check=lambda: service.run_guarded_check(liveness.check))
        failures = LivenessMonitor(guarded, lambda: measure_cpu_demand_s(process.pid))
        while True:
            try:
                status = process.wait(None if self._stopping.is_set() else liveness.every_s)
                return f"it ended with status {status}"
            except subprocess.TimeoutExpired:
                reason = None if self._stopping.is_set() else failures.check()
            if reason is not None:
                return reason

    def _stop_for_restart(self, service: ManagedService, reason: str) -> None:
        """Leave nothing of a service's process before the next start."""
        self._stop_process(service)
        self._replace_listener(service)
        self._update_state(
            service,
            state="restarting",
            pid=None,
            restarts=self.states[service.name].restarts + 1,
            restart_reason=reason,
        )
        log.warning("starting %s again: %s", service.name, reason)

    def _stop_process(self, service: ManagedService) -> None:
        process = self._processes.get(service.name)
        if process is None:
            return
        signal_group(process.pid, service.stop_signal)
        end = time.monotonic() + SERVICE_STOP_GRACE_S
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        signal_group(process.pid, signal.SIGKILL)
        process.wait()
        if self._stopping.is_set():
            self._update_state(service, state="stopped", pid=None)

    def _update_state(self, service: ManagedService, **changes: Any) -> None:
        with self._lock:
            for name, value in changes.items():
                setattr(self.states[service.name], name, value)
            self._write_state_file()

    def _write_state_file(self) -> None:
        scratch = self.folder / ".stack.json"
        states = {name: vars(state) for name, state in self.states.items()}
        try:
            scratch.write_text(json.dumps({"pid": os.getpid(), "services": states}, indent=2))
            scratch.replace(self.folder / "stack.json")
        except OSError as error:  # a full disk must not end this thread, with which its service would die
            log.warning("the state file cannot be written: %s", error)


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signal a process group of ours; one that is gone is fine."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def read_stack_state(folder: Path) -> dict[str, Any]:
    """Read the keeper's state file; empty when there is none, it cannot be read, or a killed keeper left it behind."""
    try:
        state = json.loads((folder / "stack.json").read_text())
        is_of_living = not has_exited(int(state["pid"])) and isinstance(state["services"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(state) if is_of_living else {}


def find_stack_pids(stack_id: str) -> Iterator[int]:
    """Pids of all processes that carry the stack's id."""
    return find_pids(STACK_ID_VARIABLE, stack_id)


def kill_stack_processes(stack_id: str, spare: set[int]) -> list[int]:
    """Kill what a stack left behind, and return the pids."""
    return kill_processes(STACK_ID_VARIABLE, stack_id, spare)

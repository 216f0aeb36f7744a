"""Keep a list of services running: start them in order, restart those that exit, and stop all of their processes.

The keeper is one process. Every service is its child and is killed when the keeper exits. Each has the stack's id
in its environment, so the grandchildren of a killed stack are found too.
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

from infra.files import replace_file
from infra.health import LivenessMonitor, LivenessPolicy, get_first_line
from infra.keeper_lock import hold_keeper_lock
from infra.keeper_state import KEEPER_STATE_FILE, KeeperState, ServiceState
from infra.listeners import open_listener, refuse_foreign_listener, require_own_listener
from infra.orphans import OrphanReaper
from infra.polling import poll_until
from infra.processes import find_pids, kill_processes, measure_cpu_demand_s

log = logging.getLogger(__name__)

STACK_ID_VARIABLE = "COTRAIN_KEPT_FOR"  # never in a file that people source: every process that has it is killed
SERVICE_STOP_GRACE_S = 12.0
SERVICE_RESTART_PAUSE_S = 0.5
KEEPER_HEARTBEAT_EVERY_S = 1.0
ORPHAN_REAP_EVERY_S = 10.0  # reaping reads every process of the machine


def do_nothing() -> None:
    """Do nothing: the default `before` and `after` step of a service."""


@dataclass(frozen=True, kw_only=True)
class ManagedService:
    """Define one server process: its command, its readiness check and its liveness policy.

    Another local user can bind a server's port while the server is down, and would receive the passwords that clients
    send. `listen` and `addresses` are the two protections; a server that can inherit a socket uses the first one.

    Attributes:
        command: returns the command line; called at every start.
        check: raises until the service responds.
        before: called before every start.
        after: called once the service responds.
        liveness: decides from then on whether the running process is alive; without a policy it always counts as alive.
        needs: names of the services that must be ready before the first start.
        listen: a URL where the keeper listens from the server's first start until the keeper exits. The server gets the
            socket as its standard input. After a restart the new process gets a new socket, without any option that a
            compromised server may have set on the old one.
        addresses: URLs where a server that cannot inherit a socket listens itself. `check`, `after` and `liveness` run
            only while the listener there belongs to one of `uids`.
        uids: the users that the server may run as; by default this user.
        stop_signal: asks the process to exit.
        start_timeout_s: time within which the service must be ready.
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
        """Run a check of this service, but only if the service itself receives the requests of the check.

        Raises:
            OSError: if there is no listener on an address, or it belongs to another user.
            Exception: any error that the check raises.
        """
        for url in self.addresses:
            require_own_listener(url, self.uids)
        check()


@dataclass
class Keeper:
    """Run the services until a stop signal arrives.

    Attributes:
        services: in start order.
        folder: the home folder, with the lock, the state file and the logs.
        stack_id: in the environment of every process of the stack.
        states: states of the services by name.
    """

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
        """Hold the folder's lock, keep every service running, and stop all of them on SIGTERM, SIGINT or SIGHUP.

        Raises:
            BlockingIOError: if another keeper holds the folder's lock.
        """
        with hold_keeper_lock(self.folder, self.stack_id) as send_heartbeat:
            orphans = OrphanReaper()
            kill_stack_processes(self.stack_id, spare={os.getpid()})
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, lambda *_: self._stopping.set())
            self._run_services(send_heartbeat, orphans)

    def _run_services(self, send_heartbeat: Callable[[], None], orphans: OrphanReaper) -> None:
        self.states = {service.name: ServiceState() for service in self.services}
        self._ready = {service.name: threading.Event() for service in self.services}
        self._write_state_file()

        threads = [
            threading.Thread(target=self._keep_service_running, args=(s,), name=s.name, daemon=True)
            for s in self.services
        ]
        for thread in threads:
            thread.start()

        next_reap_at = 0.0
        while not self._stopping.wait(KEEPER_HEARTBEAT_EVERY_S):
            send_heartbeat()
            if time.monotonic() >= next_reap_at:
                orphans.reap({process.pid for process in self._processes.copy().values()})
                next_reap_at = time.monotonic() + ORPHAN_REAP_EVERY_S

        for service in reversed(self.services):
            self._stop_process(service)
        kill_stack_processes(self.stack_id, spare={os.getpid()})
        if killed_pids := orphans.kill_all():
            log.warning("killed %s: these processes still ran after all services had stopped", killed_pids)
        (self.folder / KEEPER_STATE_FILE).unlink(missing_ok=True)

    def _keep_service_running(self, service: ManagedService) -> None:
        """Start one service after its dependencies, and restart it after every failure until the keeper stops.

        Each service has one thread that never returns earlier: the kernel sends the parent death signal to a child
        when the thread that started it exits, see prctl(2).
        """
        for needed in service.needs:
            while not self._ready[needed].wait(0.1):
                if self._stopping.is_set():
                    return
        while not self._stopping.is_set():
            try:
                self._start_service(service)
                reason = self._wait_for_failure(service)
            except Exception as error:  # an error in a service's own steps must not end the keeper
                log.exception("starting %s failed", service.name)
                reason = get_first_line(error)
                self._update_state(service, state="failed", error=reason)
            if not self._stopping.is_set():
                self._stop_for_restart(service, reason)
            self._stopping.wait(SERVICE_RESTART_PAUSE_S)

    def _start_service(self, service: ManagedService) -> None:
        started_at = time.monotonic()
        self._update_state(service, state="starting", error=None)
        for url in service.addresses:
            # The server's own error, "address in use", would not name the user that holds the port.
            refuse_foreign_listener(url, service.uids)
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

        self._wait_until_ready(service, process, started_at + service.start_timeout_s)
        service.run_guarded_check(service.after)
        self._update_state(
            service, state="ready", seconds=round(time.monotonic() - started_at, 1), ready_at=time.time(), error=None
        )
        self._ready[service.name].set()

    def _get_listener(self, service: ManagedService) -> socket.socket | None:
        """Return the socket that the server will inherit, opened if needed; None if it listens itself."""
        if service.listen and service.name not in self._listeners:
            self._listeners[service.name] = open_listener(service.listen)
        return self._listeners.get(service.name)

    def _replace_listener(self, service: ManagedService) -> None:
        """Replace a server's socket so that no other user can bind the port in between.

        Clients in the old socket's accept queue are disconnected, as are the clients of the exited server.
        """
        old = self._listeners.pop(service.name, None)
        if old is not None and service.listen:
            try:
                self._listeners[service.name] = open_listener(service.listen, replaces=old)
            except OSError as error:  # the next start retries, and reports the error in the service's state
                log.warning("%s: %s", service.name, error)
            old.close()

    def _wait_until_ready(self, service: ManagedService, process: subprocess.Popen[bytes], deadline: float) -> None:
        """Poll the check until it passes, or the keeper stops.

        Raises:
            RuntimeError: if the process exits.
            TimeoutError: at the deadline, with the last error of the check.
        """
        reason = ""

        def is_over() -> bool:
            nonlocal reason
            if self._stopping.is_set():
                return True
            if process.poll() is not None:
                raise RuntimeError(
                    f"{service.name} exited with status {process.returncode}; see logs/{service.name}.log"
                )
            try:
                service.run_guarded_check(service.check)
            except Exception as error:  # any error means not ready
                reason = f"{type(error).__name__}: {get_first_line(error)}"
                return False
            return True

        if not poll_until(is_over, timeout_s=deadline - time.monotonic(), pause_s=0.1):
            raise TimeoutError(f"{service.name} did not become ready: {reason}; see logs/{service.name}.log")

    def _wait_for_failure(self, service: ManagedService) -> str:
        """Wait until the process exits or its liveness checks fail, and return the reason for the restart."""
        process, liveness = self._processes.get(service.name), service.liveness
        if process is None or liveness is None:
            return f"it exited with status {process.wait() if process else None}"
        guarded = replace(liveness, check=lambda: service.run_guarded_check(liveness.check))
        monitor = LivenessMonitor(guarded, lambda: measure_cpu_demand_s(process.pid))
        while True:
            try:
                status = process.wait(None if self._stopping.is_set() else liveness.every_s)
                return f"it exited with status {status}"
            except subprocess.TimeoutExpired:
                reason = None if self._stopping.is_set() else monitor.check()
            if reason is not None:
                return reason

    def _stop_for_restart(self, service: ManagedService, reason: str) -> None:
        """End a service's process group, replace its socket and record the restart."""
        self._stop_process(service)
        self._replace_listener(service)
        self._update_state(
            service,
            state="restarting",
            pid=None,
            restarts=self.states[service.name].restarts + 1,
            restart_reason=reason,
        )
        log.warning("restarting %s: %s", service.name, reason)

    def _stop_process(self, service: ManagedService) -> None:
        process = self._processes.get(service.name)
        if process is None:
            return
        signal_group(process.pid, service.stop_signal)
        poll_until(lambda: process.poll() is not None, timeout_s=SERVICE_STOP_GRACE_S, pause_s=0.02)
        signal_group(process.pid, signal.SIGKILL)
        process.wait()
        if self._stopping.is_set():
            self._update_state(service, state="stopped", pid=None)

    def _update_state(self, service: ManagedService, **changes: Any) -> None:
        with self._lock:
            self.states[service.name] = replace(self.states[service.name], **changes)
            self._write_state_file()

    def _write_state_file(self) -> None:
        state = KeeperState(os.getpid(), self.states)
        try:
            replace_file(self.folder / KEEPER_STATE_FILE, json.dumps(state.to_json(), indent=2))
        except OSError as error:  # a full disk must not end this thread: its service would be killed with it
            log.warning("cannot write the state file: %s", error)


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process group of this keeper; do nothing if the group has exited."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def find_stack_pids(stack_id: str) -> Iterator[int]:
    """Find all processes that have the stack's id in their environment or arguments, and their children."""
    return find_pids(STACK_ID_VARIABLE, stack_id)


def kill_stack_processes(stack_id: str, spare: set[int]) -> list[int]:
    """Kill all processes of a stack except those in `spare`, and return the pids of the killed ones."""
    return kill_processes(STACK_ID_VARIABLE, stack_id, spare)

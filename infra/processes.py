"""Find processes of this machine by pid, environment variable or parent, measure their CPU time, and kill them.

Processes are read from /proc and not by psutil. One read of `/proc/PID/stat` shows parent, state and start of the same
process, while psutil reads it once for each, and the pid may be reused in between. The start tick, which is part of
stored identities, does not depend on the wall clock; psutil's `create_time` does. And psutil's `environ` ends at the
first empty entry, so a process that overwrites the memory of its arguments for a title could not be found.
"""

import contextlib
import os
import signal
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """Hold one reading of `/proc/PID/stat`; `is_zombie`: it has exited, and its parent has not waited."""

    pid: int
    parent: int
    session: int
    is_zombie: bool
    started: str  # clock ticks from the machine's boot to the start of the process
    ticks: int  # CPU time in clock ticks, including waited-for children

    @property
    def folder(self) -> Path:
        return Path("/proc") / str(self.pid)


def read_process(pid: int) -> ProcessInfo | None:
    """Read the state of a process; None if no process has this pid.

    Raises:
        OSError: if it cannot be read, for example without a free file descriptor; its state is then unknown.
    """
    try:
        # proc_pid_stat(5), fields after the name in parentheses: state, ppid, pgrp, session, ..., utime, ..., starttime
        # As bytes: a process chooses its name, which need not be text.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    ticks = sum(map(int, fields[11:15]))
    return ProcessInfo(
        pid=pid,
        parent=int(fields[1]),
        session=int(fields[3]),
        is_zombie=fields[0] in "ZX",
        started=fields[19],
        ticks=ticks,
    )


def list_processes() -> Iterator[ProcessInfo]:
    """Yield every readable process of this machine."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # skip a process that cannot be read; a later call may read it
            if (process := read_process(int(entry.name))) is not None:
                yield process


def find_pids(variable: str, value: str) -> Iterator[int]:
    """Find the processes that have `variable=value` in their environment or as an argument, and all descendants.

    The environment of a process in another confinement cannot be read, but its arguments can.
    """
    mark = f"{variable}={value}".encode()
    parents: dict[int, int] = {}
    marked: set[int] = set()
    for process in list_processes():
        parents[process.pid] = 0 if process.is_zombie else process.parent
        environment = _read_null_separated(process.folder / "environ")
        if mark in environment or mark in _read_null_separated(process.folder / "cmdline"):
            marked.add(process.pid)

    def has_marked_parent(pid: int) -> bool:
        while pid in parents and pid not in marked:
            pid = parents[pid]
        return pid in marked

    return (pid for pid in sorted(parents) if has_marked_parent(pid))


def find_descendants(ancestor: int) -> list[int]:
    """Return the pids of all descendants of a process, parents before their children."""
    children: dict[int, list[int]] = {}
    for process in list_processes():
        children.setdefault(process.parent, []).append(process.pid)

    descendants = children.get(ancestor, [])
    for pid in descendants:  # the list grows during the loop: breadth-first search
        descendants += children.get(pid, [])
    return descendants


def measure_cpu_demand_s(session: int) -> float:
    """Sum the CPU time that all processes of a session have used or waited for, in seconds.

    The session id is the pid of its first process. The CPU time of an exited child counts with its parent once the
    parent has waited for it; the child's waiting time is lost. On an overloaded machine the waiting time is the larger
    part.
    """
    members = [process for process in list_processes() if process.session == session]
    schedstat_files = [file for process in members for file in process.folder.glob("task/*/schedstat")]
    waited_ns = sum(_read_cpu_wait_ns(file) for file in schedstat_files)
    return sum(process.ticks for process in members) / os.sysconf("SC_CLK_TCK") + waited_ns / 1e9


def _read_cpu_wait_ns(file: Path) -> int:
    """Return the nanoseconds that a thread was runnable without a CPU; 0 if it exited or the kernel has no count."""
    try:
        return int(file.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _read_null_separated(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().split(b"\0")
    except OSError:
        return []


def kill_processes(variable: str, value: str, spare: Collection[int] = ()) -> list[int]:
    """Kill the processes that `find_pids` finds, except those in `spare`, and return the pids of the killed ones."""
    killed = []
    for pid in find_pids(variable, value):
        if pid not in spare:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            except ProcessLookupError:
                pass
    return killed


def get_own_identity() -> str:
    """Return a unique identity of this process, `HOST:PID:START_TICK`; a reused pid has another start tick."""
    return f"{socket.gethostname()}:{os.getpid()}:{_read_start_tick(os.getpid())}"


def is_known_exited(name: str) -> bool:
    """Return True if an identity's process has certainly exited; False for another host, whose state is unknown."""
    host, pid, started = name.rsplit(":", 2)
    return host == socket.gethostname() and _read_start_tick(int(pid)) != started


def is_known_alive(name: str) -> bool:
    """Return True if an identity's process certainly runs; False for another host, whose state is unknown."""
    return name.rsplit(":", 2)[0] == socket.gethostname() and not is_known_exited(name)


def kill_by_identity(name: str) -> bool:
    """Kill the process of an identity if it runs on this host.

    Returns:
        True if the process has certainly exited; always False for another host.
    """
    host, pid, _ = name.rsplit(":", 2)
    if host == socket.gethostname() and not is_known_exited(name):
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            return True
    return is_known_exited(name)


def has_exited(pid: int) -> bool:
    """Return True if no process has this pid, or only a zombie has it."""
    return _read_start_tick(pid) is None


def _read_start_tick(pid: int) -> str | None:
    """Return the clock tick at which a process started; None if there is no such process or it is a zombie."""
    process = read_process(pid)
    return None if process is None or process.is_zombie else process.started

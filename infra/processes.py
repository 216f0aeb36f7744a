"""Processes of this machine: who they are, what they carry, and how to end them."""

import contextlib
import os
import signal
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessInfo:
    """One process at one look; of one that is dead and not yet buried `is_dead` says so."""

    pid: int
    parent: int
    session: int
    is_zombie: bool
    started: str  # clock ticks after the machine's start
    ticks: int  # of processor time, with that of collected children

    @property
    def folder(self) -> Path:
        return Path("/proc") / str(self.pid)


def read_process(pid: int) -> ProcessInfo | None:
    """Look at a process; None if there is none of this pid.

    Raises:
        OSError: if it cannot be looked at, say for want of file descriptors; nothing is known of it then.
    """
    try:
        # proc_pid_stat(5), after the name in brackets: state, ppid, pgrp, session, ..., utime to cstime, ..., starttime
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    ticks = sum(map(int, fields[11:15]))
    return ProcessInfo(pid, int(fields[1]), int(fields[3]), fields[0] in "ZX", fields[19], ticks)


def list_processes() -> Iterator[ProcessInfo]:
    """Yield every process of this machine."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # one that cannot be looked at is left out; the next look may see it
            if (found := read_process(int(entry.name))) is not None:
                yield found


def find_pids(variable: str, value: str) -> Iterator[int]:
    """Find the processes that have `variable=value` in their environment or as an argument, and all their children.

    The environment of a process that is confined apart from this one cannot be read; its arguments can.
    """
    mark = f"{variable}={value}".encode()
    parents: dict[int, int] = {}
    marked: set[int] = set()
    for one in list_processes():
        parents[one.pid] = 0 if one.is_zombie else one.parent
        if mark in _read_null_separated(one.folder / "environ") or mark in _read_null_separated(one.folder / "cmdline"):
            marked.add(one.pid)

    def has_marked_parent(pid: int) -> bool:
        while pid in parents and pid not in marked:
            pid = parents[pid]
        return pid in marked

    return (pid for pid in sorted(parents) if has_marked_parent(pid))


def find_descendants(ancestor: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    for one in list_processes():
        children.setdefault(one.parent, []).append(one.pid)
    found = children.get(ancestor, [])
    for pid in found:  # which grows
        found += children.get(pid, [])
    return found


def measure_cpu_demand_s(session: int) -> float:
    """Add up, in seconds, the processor time that all processes of a session used and that they waited for.

    A session has its first process's pid. What a process used that has ended and was collected counts with its parent;
    what it waited for does not. On a machine with more work than processors the wait is the larger part.
    """
    members = [one for one in list_processes() if one.session == session]
    waited_ns = sum(_read_cpu_wait_ns(file) for one in members for file in one.folder.glob("task/*/schedstat"))
    return sum(one.ticks for one in members) / os.sysconf("SC_CLK_TCK") + waited_ns / 1e9


def _read_cpu_wait_ns(file: Path) -> int:
    """Return how long a thread was ready and had no processor; 0 if it has ended or the kernel does not count."""
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
    """Kill them, and return the pids."""
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
    """This process, as no other was or will be: host, pid, and the clock tick at which it started."""
    return f"{socket.gethostname()}:{os.getpid()}:{_read_start_tick(os.getpid())}"


def is_known_exited(name: str) -> bool:
    """Whether the process of an identity is known to be gone; nothing is known of another host's."""
    host, pid, started = name.rsplit(":", 2)
    return host == socket.gethostname() and _read_start_tick(int(pid)) != started


def is_known_alive(name: str) -> bool:
    """Whether the process of an identity is known to live; nothing is known of another host's."""
    return name.rsplit(":", 2)[0] == socket.gethostname() and not is_known_exited(name)


def kill_by_identity(name: str) -> bool:
    """Kill the process of an identity if it lives; whether it is known to be gone, which of another host it is not."""
    host, pid, _ = name.rsplit(":", 2)
    if host == socket.gethostname() and not is_known_exited(name):
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            return True
    return is_known_exited(name)


def has_exited(pid: int) -> bool:
    """Tell whether no process has this pid, or a dead one that nobody has buried."""
    return _read_start_tick(pid) is None


def _read_start_tick(pid: int) -> str | None:
    """The tick at which a process started; None if there is none, or a dead one that nobody has buried."""
    found = read_process(pid)
    return None if found is None or found.is_zombie else found.started

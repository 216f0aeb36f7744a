"""Processes of this machine found by what their environment carries, which their children inherit."""

import os
import signal
import socket
from collections.abc import Collection, Iterator
from pathlib import Path


def carrying(variable: str, value: str) -> Iterator[int]:
    """Pids of all processes with this variable in their environment, found in /proc."""
    needle = f"{variable}={value}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except (OSError, ProcessLookupError):
                continue
            if needle in environment.split(b"\0"):
                yield int(entry.name)


def kill_carrying(variable: str, value: str, spare: Collection[int] = ()) -> list[int]:
    """Kill them, and return the pids."""
    killed = []
    for pid in carrying(variable, value):
        if pid not in spare:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            except ProcessLookupError:
                pass
    return killed


def identity() -> str:
    """This process, as no other was or will be: host, pid, and the clock tick at which it started."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def is_dead(name: str) -> bool:
    """Whether the process of an identity is known to be gone; nothing is known of another host's."""
    host, pid, started = name.rsplit(":", 2)
    return host == socket.gethostname() and _started(int(pid)) != started


def is_alive(name: str) -> bool:
    """Whether the process of an identity is known to live; nothing is known of another host's."""
    return name.rsplit(":", 2)[0] == socket.gethostname() and not is_dead(name)


def kill_identified(name: str) -> bool:
    """Kill the process of an identity if it lives; whether it is known to be gone, which of another host it is not."""
    host, pid, _ = name.rsplit(":", 2)
    if host == socket.gethostname() and not is_dead(name):
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            return True
    return is_dead(name)


def _started(pid: int) -> str | None:
    """The tick at which a process started; None if there is none, or a dead one that nobody has buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]

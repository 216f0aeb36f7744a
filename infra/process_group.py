"""Start and end groups of training processes on this machine.

torchrun puts its ranks into their own sessions and closes inherited descriptors, so neither a signal to the process
group nor an inherited pipe reaches them. A FIFO does: the supervisor holds it open, each rank opens it by name, and
exits when the supervisor's end closes, which the kernel guarantees however the supervisor exits.
"""

import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from infra.files import open_log, remove_path
from infra.parent_heartbeat import EXIT_TEMPORARY_FAILURE, PARENT_FILE_VARIABLE, exit_on_lost_heartbeat
from infra.polling import poll_until
from infra.processes import find_pids, kill_processes

log = logging.getLogger(__name__)

PARENT_FIFO_VARIABLE = "COTRAIN_PARENT_FIFO"
TERM_GRACE_S = 10.0
FIFO_EXIT_TIMEOUT_S = 2.0  # a rank exits at once when the FIFO closes, unless it is stopped (SIGSTOP)


@contextlib.contextmanager
def run_child(
    command: list[str], folder: Path, *, env: Mapping[str, str], log_name: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command whose processes call `exit_with_parent`; all of them have exited when the block ends.

    Output goes to `log_name` in the folder. Symbolic links that an earlier command left there are not followed.
    """
    fifo = folder / ".parent"
    remove_path(fifo)
    os.mkfifo(fifo, 0o600)
    descriptor = os.open(fifo, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    process = None
    try:
        with os.fdopen(open_log(folder / log_name), "ab") as output:
            process = subprocess.Popen(
                command,
                env={**env, PARENT_FIFO_VARIABLE: str(fifo)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        yield process
    finally:
        os.close(descriptor)  # the ranks see that the FIFO has no writer any more, and exit
        if process is not None:
            _wait_for_ranks_to_exit(process, fifo)
            end_process(process)
        remove_path(fifo)


def _wait_for_ranks_to_exit(process: subprocess.Popen[bytes], fifo: Path) -> None:
    """Wait for the ranks to exit, and kill those that do not."""

    def have_exited() -> bool:
        return not set(find_pids(PARENT_FIFO_VARIABLE, str(fifo))) - {process.pid}

    if not poll_until(have_exited, timeout_s=FIFO_EXIT_TIMEOUT_S, pause_s=0.02):
        killed = kill_processes(PARENT_FIFO_VARIABLE, str(fifo), spare={process.pid})
        log.warning("killed %s, which did not exit by themselves within %.0f s", killed, FIFO_EXIT_TIMEOUT_S)


def build_torchrun_command(num_processes: int, *program: str | Path) -> list[str]:
    """Return the torchrun command for `num_processes` ranks of a program on this machine.

    Args:
        program: a script, or `-m` and a module, or `--no-python` and a program; then its arguments.

    >>> build_torchrun_command(2, "-m", "yuan.train.run", Path("runs/7"))[-3:]
    ['-m', 'yuan.train.run', 'runs/7']
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_processes}"]
    return [*command, "--master-addr=127.0.0.1", f"--master-port={find_free_port()}", *map(str, program)]


def exit_with_parent() -> None:
    """Exit this process when its supervisor exits.

    The environment names the supervisor's FIFO (exit at once) or its heartbeat file (exit within half a minute); with
    neither of them, the supervisor is not watched.
    """
    if file := os.environ.get(PARENT_FILE_VARIABLE):
        exit_on_lost_heartbeat(Path(file))
    name = os.environ.get(PARENT_FIFO_VARIABLE)
    if not name:
        return
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        os._exit(EXIT_TEMPORARY_FAILURE)
    # If the writer exited before this process opened the FIFO, poll reports no POLLHUP, but a read returns end of file.
    try:
        if not os.read(descriptor, 1):
            os._exit(EXIT_TEMPORARY_FAILURE)
    except BlockingIOError:
        pass
    threading.Thread(target=_watch_fifo, args=(descriptor,), daemon=True, name="parent-watch").start()


def _watch_fifo(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLHUP)
    poll.poll()
    os._exit(EXIT_TEMPORARY_FAILURE)  # a rank that is blocked in a collective cannot exit in any other way


def end_process(process: subprocess.Popen[bytes], grace_s: float = TERM_GRACE_S) -> int:
    """Send SIGTERM, then SIGKILL after the grace period, and return the exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            log.warning("killing pid %d after %.0f s of grace", process.pid, grace_s)
            process.kill()
    return process.wait()


def find_free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def hold_file_lock(lock_file: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file while the block runs; the kernel releases it however the process exits."""
    with lock_file.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""Run jobs on this machine through torchrun."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from infra.confinement import SHARED_MEMORY_FOLDER, Confinement
from infra.launchers.job import Job, JobExit, RunningJob
from infra.polling import poll_until
from infra.process_group import build_torchrun_command, run_child
from infra.processes import find_pids, kill_processes

JOB_VARIABLE = "COTRAIN_JOB"  # in the environment of all of a job's processes


class LocalLauncher:
    """Run a job's processes on this machine; they exit when this process exits, however it does.

    Args:
        confined: restrict them to write into the job's folder only, and to read nothing but it and the code.
    """

    def __init__(self, *, confined: bool = False) -> None:
        self._confined = confined

    @contextlib.contextmanager
    def run(self, job: Job) -> Iterator[RunningJob]:
        """Start a job.

        Raises:
            ValueError: if it needs more than one node.
        """
        if job.num_nodes > 1:
            raise ValueError(
                f"a local job must have 1 node, got {job.num_nodes} for {job.name}; choose another launcher"
            )
        environment = {**job.environment, JOB_VARIABLE: job.name}
        command = self.build_command(job)
        with run_child(command, job.folder, env=environment, log_name=job.log_name) as process:
            yield _RunningLocalJob(process)

    def build_command(self, job: Job) -> list[str]:
        """Return the command that starts the job's ranks."""
        mark = f"{JOB_VARIABLE}={job.name}"  # an argument, since other processes may not read the environment
        program = ["-m", job.module, str(job.folder), mark]
        if not self._confined:
            if not job.is_distributed:
                return [sys.executable, *program]
            return build_torchrun_command(job.num_processes, *program)

        if not job.is_distributed:
            confinement = Confinement(
                read=job.input_folders, write=(job.folder,), accelerators="process", signal="SIGKILL"
            )
            return confinement.command(sys.executable, *program)

        # torchrun as well as each rank: it needs rights for all ranks, and a rank only those for itself. The ranks
        # exchange memory handles through abstract sockets (NCCL), within the confinement of torchrun.
        folders = (job.folder, Path(SHARED_MEMORY_FOLDER))
        rank = Confinement(
            read=job.input_folders, write=folders, accelerators="process", scope_sockets=False, signal="SIGKILL"
        )
        torchrun = Confinement(read=job.input_folders, write=folders, accelerators="descendants", signal="SIGKILL")
        rank_command = rank.command(sys.executable, *program)
        return torchrun.command(*build_torchrun_command(job.num_processes, "--no-python", *rank_command))

    def end(self, name: str, within_s: float) -> bool:
        """Kill all processes of the job of this name; true if none remains within `within_s` seconds."""
        kill_processes(JOB_VARIABLE, name)
        return poll_until(lambda: not any(find_pids(JOB_VARIABLE, name)), timeout_s=within_s, pause_s=0.02)


class _RunningLocalJob:
    """Wait for the torchrun process of a job."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._oom_kills_at_start = count_oom_kills()

    def wait(self, seconds: float) -> JobExit | None:
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        is_out_of_memory = status != 0 and count_oom_kills() > self._oom_kills_at_start
        return JobExit(status=status, cause="out of memory" if is_out_of_memory else None)


def count_oom_kills() -> int:
    """Count the kernel's OOM kills since boot (oom_kill in /proc/vmstat)."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

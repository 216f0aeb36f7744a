"""Run jobs through Slurm: submit a script with `sbatch` that starts torchrun on every node with `srun`.

Slurm requeues a job itself after preemption or a node loss (`--requeue`), and the run resumes from its checkpoint.
Every other exit is reported to the supervisor, which decides what to do.
"""

import contextlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.files import remove_path, replace_file
from infra.launchers.job import (
    Job,
    JobExit,
    JobExitCause,
    LauncherUnreachable,
    RunningJob,
    select_rank_variables,
)
from infra.parent_heartbeat import PARENT_FILE_VARIABLE, send_parent_heartbeats
from infra.polling import poll_until

log = logging.getLogger(__name__)

SLURM_COMMAND_TIMEOUT_S = 30.0  # the commands wait for 18 s if the controller is unreachable
SLURM_CANCEL_TIMEOUT_S = 60.0
SLURM_UNREACHABLE_MESSAGES = (
    "unable to contact",
    "connection refused",
    "timed out",
    "zero bytes were transmitted",
    "connect failure",
)

CAUSE_BY_FINAL_STATE: dict[str, JobExitCause | None] = {
    "COMPLETED": None,
    "FAILED": None,
    "TIMEOUT": None,  # the site's limit: restarted, and failed if no start reaches a checkpoint
    "DEADLINE": None,
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node lost",
    "BOOT_FAIL": "node lost",
    "OUT_OF_MEMORY": "out of memory",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
}


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Hold a site's Slurm options, the keys of [pool.launch].

    Attributes:
        gres: generic resources per node, such as `gpu:8`.
        time_limit: maximum run time of a job, in Slurm's format.
        memory_per_node: in Slurm's format, such as `64G`.
        rendezvous_port: TCP port of the job's first node, where the ranks meet.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None
    time_limit: str | None = None
    cpus_per_node: int | None = None
    memory_per_node: str | None = None
    rendezvous_port: int = 29_500


class SlurmLauncher:
    """Run jobs on the nodes of a Slurm cluster that mounts the run folders.

    A job's processes exit by themselves within half a minute when this process exits.
    """

    def __init__(self, options: SlurmOptions = SlurmOptions()) -> None:
        self._options = options

    @contextlib.contextmanager
    def run(self, job: Job) -> Iterator[RunningJob]:
        """Submit a job, and end it with the block.

        Raises:
            OSError: if Slurm's commands are not installed.
            LauncherUnreachable: if the controller does not respond.
            RuntimeError: if Slurm rejects the job; the message quotes Slurm's.
        """
        if shutil.which("sbatch") is None:
            raise OSError(
                "sbatch is not on the PATH; run on a machine that can submit jobs, or choose another launcher"
            )
        script = job.folder / f".{job.name}.sh"
        replace_file(script, render_batch_script(job, self._options))
        with send_parent_heartbeats(job.parent_heartbeat_file):
            try:
                number = _submit_job(job, script)
                log.info("submitted %s as job %s", job.name, number)
                yield _RunningSlurmJob(number)
            finally:  # also after an unanswered submission, since the job may exist
                while not self.end(job.name, SLURM_CANCEL_TIMEOUT_S):
                    log.warning("%s has not ended yet; keeping its devices leased until it has", job.name)
        remove_path(script)
        remove_path(job.parent_heartbeat_file)

    def end(self, name: str, within_s: float) -> bool:
        """Cancel the job of a name; true if it is not in the queue any more."""

        def cancel() -> bool:
            """Cancel the job if it is in the queue; true if it is not."""
            with contextlib.suppress(RuntimeError):
                if not _run_slurm_command("squeue", "--noheader", f"--name={name}", "--format=%i"):
                    return True
                _run_slurm_command("scancel", f"--name={name}")
            return False

        return poll_until(cancel, timeout_s=within_s, pause_s=0.5)


class _RunningSlurmJob:
    """Poll a submitted job by its Slurm job number."""

    def __init__(self, number: str) -> None:
        self._number = number

    def wait(self, seconds: float) -> JobExit | None:
        return poll_until(self._read_exit, timeout_s=seconds, pause_s=0.5)

    def _read_exit(self) -> JobExit | None:
        try:
            job_line = _run_slurm_command("scontrol", "show", "job", "--oneliner", self._number)
        except RuntimeError as error:
            if "Invalid job id" in str(error):  # the controller forgets ended jobs after MinJobAge
                return JobExit(status=1, message=f"Slurm no longer knows job {self._number}")
            log.warning("Slurm does not respond: %s", str(error)[:150])
            return None
        return parse_job_exit(job_line)


def parse_job_exit(job_line: str) -> JobExit | None:
    """Parse the output of `scontrol show job --oneliner`; None if the job is pending, running or completing.

    >>> parse_job_exit("JobId=7 JobState=RUNNING Reason=None ExitCode=0:0")
    >>> parse_job_exit("JobId=7 JobState=NODE_FAIL Reason=NodeDown ExitCode=0:0").cause
    'node lost'
    """
    fields = dict(word.split("=", 1) for word in job_line.split() if "=" in word)
    state = fields["JobState"]
    if state not in CAUSE_BY_FINAL_STATE:
        return None
    code, _, signal = fields.get("ExitCode", "0:0").partition(":")
    status = int(code) or int(signal or 0) or int(state != "COMPLETED")
    return JobExit(
        status=status,
        cause=CAUSE_BY_FINAL_STATE[state],
        message=f"Slurm reports {state}, {fields.get('Reason', '')}, {code}:{signal}",
    )


def render_batch_script(job: Job, options: SlurmOptions) -> str:
    """Render the batch script of a job."""
    directives = {
        "job-name": job.name,
        "nodes": job.num_nodes,
        "ntasks-per-node": 1,
        "output": job.folder / job.log_name,
        "chdir": job.folder,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "gres": options.gres,
        "time": options.time_limit,
        "cpus-per-task": options.cpus_per_node,
        "mem": options.memory_per_node,
        "exclude": ",".join(job.excluded_hosts) or None,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    values = {
        **select_rank_variables(job.environment),
        "PATH": os.environ["PATH"],
        PARENT_FILE_VARIABLE: str(job.parent_heartbeat_file),
    }
    exports = [f"export {name}={shlex.quote(text)}" for name, text in sorted(values.items())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={job.num_nodes}", "--max-restarts=0"]
    torchrun += [
        f"--nproc-per-node={job.num_processes // job.num_nodes}",
        "--rdzv-backend=c10d",
        "--rdzv-id=$SLURM_JOB_ID",
    ]
    folder = shlex.quote(str(job.folder))
    # --log-dir: torchrun makes a folder for logs that it leaves behind, by default in /tmp
    torchrun += [f"--log-dir={folder}", f"--rdzv-endpoint=$head:{options.rendezvous_port}", "-m", job.module, folder]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            # a requeued job appends to the same log
            "#SBATCH --open-mode=append",
            "#SBATCH --requeue",
            *exports,
            # Not SLURM_LAUNCH_NODE_IPADDR, which is the submit host: the rendezvous is on the job's first node
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            # exec: the batch shell would exit at the first signal and orphan its children
            f"exec srun --kill-on-bad-exit=1 --export=ALL {' '.join(torchrun)}",
            "",
        ]
    )


def _submit_job(job: Job, script: Path) -> str:
    """Submit a job's script and return its job number.

    Raises:
        RuntimeError: if Slurm rejects it; the message quotes Slurm's and names the excluded hosts, a possible cause.
    """
    try:
        return _run_slurm_command("sbatch", "--parsable", "--export=NIL", str(script)).split(";")[0]
    except LauncherUnreachable:
        raise
    except RuntimeError as error:
        hint = f"; it excludes {', '.join(job.excluded_hosts)}, where devices were lost" if job.excluded_hosts else ""
        raise RuntimeError(f"{error}{hint}; correct [pool.launch] in the pool's file") from None


def _run_slurm_command(*command: str) -> str:
    """Run a Slurm command and return its output.

    Raises:
        LauncherUnreachable: if Slurm does not respond.
        RuntimeError: if the command fails; the message quotes its error output.
    """
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_COMMAND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise LauncherUnreachable(
            f"{command[0]} did not respond within {SLURM_COMMAND_TIMEOUT_S:.0f} s; see `scontrol ping`"
        ) from None
    if process.returncode:
        output = (process.stderr or process.stdout).strip()[:500]
        is_unreachable = any(message in output.lower() for message in SLURM_UNREACHABLE_MESSAGES)
        error_class = LauncherUnreachable if is_unreachable else RuntimeError
        raise error_class(f"{' '.join(command[:2])}: {output}")
    return process.stdout.strip()

"""Test the Slurm launcher on a real one-node Slurm; skipped where Debian's packages are not installed."""

import os
import socket
import time
from pathlib import Path

import pytest

from flows.supervisor.pool_launcher import find_launcher_files
from infra.confinement import Confinement
from infra.launchers.job import Job
from infra.launchers.slurm import SlurmLauncher, SlurmOptions, parse_job_exit, render_batch_script
from infra.processes import find_pids
from tests.infra.cluster import needs_slurm, run_command, start_slurm_cluster
from tests.waiting import wait_until

# A rank like the platform's: it exits when its supervisor's heartbeat stops, or with the status in the file `leave`.
RANK = """
import os, pathlib, sys, time
from infra.process_group import exit_with_parent
exit_with_parent()
folder = pathlib.Path(sys.argv[1])
(folder / f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
os.write(1, f"restart {os.environ.get('SLURM_RESTART_COUNT', '0')}\\n".encode())  # one write: lines stay whole
while not (folder / "leave").exists():
    time.sleep(0.05)
sys.exit(int((folder / "leave").read_text()))
"""


@pytest.fixture(scope="module")
def slurm():
    with start_slurm_cluster() as folder:
        yield folder


@pytest.fixture
def job(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}",
        "OMP_NUM_THREADS": "1",
        "GLOO_MARK": tmp_path.name,
        "AWS_SECRET_ACCESS_KEY": "do not pass on",
    }
    return Job(
        name=f"job-{tmp_path.name.replace('_', '-')[:40]}",
        module="rank",
        folder=tmp_path,
        num_processes=2,
        processes_per_node=2,
        environment=environment,
        log_name="train.log",
    )


def wait_for_rank_pids(job):
    wait_until(lambda: all((job.folder / f"rank-{n}").exists() for n in range(2)))
    return [int((job.folder / f"rank-{n}").read_text()) for n in range(2)]


def wait_for_exit(running):
    end = time.monotonic() + 90
    while (job_exit := running.wait(0.2)) is None:
        assert time.monotonic() < end, "did not end in time"
    return job_exit


@needs_slurm
@pytest.mark.parametrize("status", [0, 7])
def test_a_job_runs_to_its_end(slurm, job, status):
    with SlurmLauncher().run(job) as running:
        wait_for_rank_pids(job)
        assert running.wait(0.1) is None
        (job.folder / "leave").write_text(str(status))
        job_exit = wait_for_exit(running)
    assert list(job.folder.glob("*_*/attempt_0"))  # torchrun's folder for logs, by default in the temporary folder
    assert job_exit.cause is None and (job_exit.status == 0) == (status == 0)
    assert (job.folder / "train.log").read_text().count("restart 0") == 2


@needs_slurm
def test_exiting_the_launcher_context_ends_every_process(slurm, job):
    with SlurmLauncher().run(job):
        pids = wait_for_rank_pids(job)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not list(find_pids("GLOO_MARK", job.folder.name))


@needs_slurm
def test_cancelled_job_is_reported_as_cancelled(slurm, job):
    with SlurmLauncher().run(job) as running:
        wait_for_rank_pids(job)
        run_command("scancel", f"--name={job.name}")
        assert wait_for_exit(running).cause == "cancelled"


@needs_slurm
def test_job_excludes_lost_nodes(slurm, job):
    excluding_job = Job(**{**job.__dict__, "excluded_hosts": (socket.gethostname().split(".")[0],)})
    with (
        pytest.raises(RuntimeError, match=r"Requested node configuration is not available.*it excludes"),
        SlurmLauncher().run(excluding_job),
    ):
        pass


@needs_slurm
def test_a_cluster_that_cannot_start_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTER_MARK", tmp_path.name)
    (tmp_path / "slurmctld").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "slurmctld").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = os.environ.get("SLURM_CONF")
    with pytest.raises(AssertionError, match="did not become true"), start_slurm_cluster(timeout_s=3):
        pass
    assert not list(find_pids("CLUSTER_MARK", tmp_path.name)) and os.environ.get("SLURM_CONF") == before


@pytest.mark.slow
@needs_slurm
def test_requeued_job_restarts_and_finishes(slurm, job):
    with SlurmLauncher().run(job) as running:
        first_pids = wait_for_rank_pids(job)
        for rank in range(2):
            (job.folder / f"rank-{rank}").unlink()
        run_command("scontrol", "requeue", run_command("squeue", "--noheader", f"--name={job.name}", "--format=%i"))
        assert wait_for_rank_pids(job) != first_pids
        (job.folder / "leave").write_text("0")
        assert wait_for_exit(running).status == 0
    assert "restart 1" in (job.folder / "train.log").read_text()


@needs_slurm
def test_job_refused_by_slurm_raises_the_slurm_error_message(slurm, job):
    with (
        pytest.raises(RuntimeError, match="invalid partition specified"),
        SlurmLauncher(SlurmOptions(partition="none")).run(job),
    ):
        pass


@needs_slurm
def test_a_confined_process_submits_and_follows_jobs(slurm, tmp_path):
    """Submit like the worker, which may read only Slurm's configuration and its own folder."""
    confinement = Confinement(read=find_launcher_files("slurm"), write=(tmp_path,))
    job_id = run_command(*confinement.command("/usr/bin/sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 30"))
    assert job_id.isdigit()
    assert run_command(*confinement.command("/usr/bin/squeue", "--noheader", "--format=%i")) == job_id
    run_command(*confinement.command("/usr/bin/scancel", job_id))
    wait_until(lambda: not run_command(*confinement.command("/usr/bin/squeue", "--noheader")))


def test_batch_script_contains_no_secret_and_sets_the_rendezvous_endpoint(job):
    script = render_batch_script(job, SlurmOptions(gres="gpu:8", account="a b"))
    assert "do not pass on" not in script and "--gres=gpu:8" in script
    assert "export OMP_NUM_THREADS=1" in script and "--rdzv-endpoint=$head:29500" in script


@pytest.mark.parametrize(
    ("state", "code", "cause", "status"),
    [
        ("COMPLETED", "0:0", None, 0),
        ("FAILED", "1:0", None, 1),
        ("FAILED", "0:9", None, 9),
        ("TIMEOUT", "0:15", None, 15),
        ("PREEMPTED", "0:15", "preempted", 15),
        ("NODE_FAIL", "0:0", "node lost", 1),
        ("OUT_OF_MEMORY", "0:125", "out of memory", 125),
        ("CANCELLED", "0:0", "cancelled", 1),
    ],
)
def test_final_job_state_determines_the_job_exit(state, code, cause, status):
    job_exit = parse_job_exit(f"JobId=7 JobName=x JobState={state} Reason=R ExitCode={code} Comment=a b")
    assert (job_exit.cause, job_exit.status) == (cause, status)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "CONFIGURING"])
def test_unfinished_job_has_no_exit(state):
    assert parse_job_exit(f"JobId=7 JobState={state} Reason=None ExitCode=0:0") is None

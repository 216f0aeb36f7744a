"""Training under injected faults: `python benchmarks/faults.py [--times 3] [--outage 20] [--only NAME]`, 16 min.

One embedded stack executes a run for each fault, all from the same seed on the same snapshot in fp32. While a run
trains, its fault is injected `times` times at random moments, without manual help. Every run must end with exported
weights; its recorded positions (each once) and its last loss must equal those of a run without faults, to the bit.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairs import make_line, print_lines

from feedback.client import Client
from feedback.contracts import RoundParameters
from feedback.states import DatasetPurpose
from flows.demo.demo_corpus import BASE_SKILLS
from flows.stack.stack_config import load_config
from infra.keeper import find_stack_pids
from infra.keeper_state import read_service_states
from infra.polling import poll_until
from infra.settings import Settings
from yuan.data.rows import dump_rows
from yuan.data.skills import load_skills
from yuan.train.checkpoint_manifest import list_committed_checkpoints
from yuan.train.events import CheckpointEvent, CheckpointFailedEvent, CheckpointStoredEvent, EndedEvent
from yuan.train.heartbeat import read_heartbeats
from yuan.train.metrics_row import END_POSITION_METRIC, FIRST_POSITION_METRIC, LOSS_METRIC, STEP_SECONDS_METRIC
from yuan.train.run_folder import RunFolder

MAX_STEPS = 100
CHECKPOINT_EVERY = 20  # steps
RUN_LIMIT_S = 240
FAULT_LIMIT_S = 60  # for each fault, in addition to RUN_LIMIT_S
DISK_MIB = 700


@dataclass
class Trial:
    """Inject faults into a running training run."""

    home: Path
    folder: RunFolder
    outage_s: float
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def step(self) -> int:
        rows = self.folder.read_metrics()
        return rows[-1].step if rows else 0

    @property
    def is_over(self) -> bool:
        return self.folder.is_finished

    def find_pids(self, words: str) -> list[int]:
        """Return the pids of the stack's processes whose command line contains the words."""
        pids = []
        for pid in find_stack_pids(load_config(self.home).stack_id):
            with contextlib.suppress(OSError):
                if words in Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " "):
                    pids.append(pid)
        return pids

    def kill(self, pid: int, number: int = signal.SIGKILL) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def choose_rank_pid(self) -> int | None:
        """Return the pid of a random live rank."""
        beats = list(read_heartbeats(self.folder.path).values())
        alive = [beat.pid for beat in beats if time.time() - beat.time < 3 and Path(f"/proc/{beat.pid}").exists()]
        return self.rng.choice(alive) if alive else None


Fault = Callable[[Trial], bool]


def kill_rank(trial: Trial) -> bool:
    pid = trial.choose_rank_pid()
    return pid is not None and trial.kill(pid)


def stop_rank(trial: Trial) -> bool:
    pid = trial.choose_rank_pid()
    return pid is not None and trial.kill(pid, signal.SIGSTOP)


def make_kill(words: str) -> Fault:
    def inject(trial: Trial) -> bool:
        pids = trial.find_pids(words)
        return bool(pids) and trial.kill(trial.rng.choice(pids))

    return inject


def kill_worker(trial: Trial) -> bool:
    pid = read_service_states(trial.home)["worker"].pid
    return trial.kill(pid) if pid else False


def make_outage(name: str) -> Fault:
    """Kill the server each time its keeper restarts it, until the outage ends."""

    def inject(trial: Trial) -> bool:
        end = time.monotonic() + trial.outage_s
        while time.monotonic() < end:
            with contextlib.suppress(KeyError, FileNotFoundError):
                pid = read_service_states(trial.home)[name].pid
                if pid:
                    trial.kill(pid)
            time.sleep(0.1)
        return True

    return inject


def fill_disk(trial: Trial) -> bool:
    """Fill the runs' file system until a checkpoint has failed, or the run has stopped."""
    filler = trial.home / "runs" / "filler"
    before = len(trial.folder.read_events())
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**20))
            file.flush()

    def has_failed_or_ended() -> bool:
        events = trial.folder.read_events()[before:]
        is_noted = any(isinstance(event, CheckpointFailedEvent | EndedEvent) for event in events)
        return is_noted or trial.is_over or not trial.find_pids("yuan.train.run")

    poll_until(has_failed_or_ended, timeout_s=60, pause_s=0.1)
    filler.unlink()
    return True


def flip_bit(trial: Trial) -> bool:
    """Damage the newest checkpoint, and kill a rank so that the run must load one."""
    checkpoints = list(list_committed_checkpoints(trial.folder.checkpoints))
    if len(checkpoints) < 2:
        return False
    victim = max(checkpoints[-1].glob("*.distcp"), key=lambda path: path.stat().st_size)
    with contextlib.suppress(FileNotFoundError), victim.open("r+b") as file:
        file.seek(trial.rng.randrange(victim.stat().st_size))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1 << trial.rng.randrange(8)]))
    return kill_rank(trial)


FAULTS: dict[str, Fault] = {
    "kill -9 of a rank": kill_rank,
    "kill -9 of the launcher": make_kill("torch.distributed.run"),
    "kill -9 of the supervisor": make_kill("flows.dispatcher.flow_process"),
    "kill -9 of the worker": kill_worker,
    "SIGSTOP of a rank": stop_rank,
    "PostgreSQL down": make_outage("postgres"),
    "S3 down": make_outage("s3"),
    "MLflow down": make_outage("mlflow"),
    "Prefect server down": make_outage("prefect"),
    "disk full during a save": fill_disk,
    "bit flipped in a checkpoint": flip_bit,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--outage", type=float, default=20.0)
    parser.add_argument("--only", help="part of a fault's name")
    arguments = parser.parse_args()
    ok = True
    references: dict[int, dict[str, Any]] = {}
    with start_stack() as (home, client, is_small):
        for name, fault in FAULTS.items():
            if arguments.only and arguments.only not in name:
                continue
            if fault is fill_disk and not is_small:
                print_lines({"name": name, "skipped": "no file system of its own can be mounted here"})
                continue
            steps = MAX_STEPS
            if name.endswith("down"):
                steps = compute_num_steps(
                    run_without_faults(home, client, MAX_STEPS, references, arguments)["step_seconds"], arguments
                )
            reference = run_without_faults(home, client, steps, references, arguments)
            result = run(home, client, fault, steps, arguments)
            equalities = {f"same_{key}": result[key] == reference[key] for key in ("positions", "loss")}
            ok &= print_lines(
                {
                    **make_line(name, result["num_faults"], "faults", "run without faults"),
                    "goal": "ends by itself, every position once, last loss bit-equal",
                    "ok": result["ended"] and all(equalities.values()) and result["num_faults"] > 0,
                    **equalities,
                    **{key: result[key] for key in ("ended", "seconds", "loss", "events")},
                }
            )
    ok &= all(reference["ended"] for reference in references.values())
    return 0 if ok else 1


def run_without_faults(
    home: Path, client: Client, steps: int, runs_by_steps: dict[int, dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the run without faults, executed once for each number of steps."""
    if steps not in runs_by_steps:
        result = runs_by_steps[steps] = run(home, client, None, steps, arguments)
        result_line = make_line(f"run without faults, {steps} steps", result["seconds"], "s")
        print_lines({**result_line, "loss": result["loss"], "ok": result["ended"]})
    return runs_by_steps[steps]


def compute_num_steps(step_seconds: float, arguments: argparse.Namespace) -> int:
    """Return the number of steps a run needs so that all outages fit in sequence."""
    return int(1.25 * arguments.times * arguments.outage / step_seconds) + 2 * CHECKPOINT_EVERY


@contextlib.contextmanager
def start_stack() -> Iterator[tuple[Path, Client, bool]]:
    """Start an embedded stack with a small base mixture; runs get a small file system, if one can be mounted."""
    home = Path(tempfile.mkdtemp(prefix="faults-"))
    runs = home / "runs"
    runs.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(runs)], check=False)
    (home / "env.local").write_text("COTRAIN_ROUND_AFTER_REPORTS=0\n")
    env = {**os.environ, "COTRAIN_HOME": str(home)}
    cotrain = [sys.executable, "-m", "flows.cli.app"]
    try:
        subprocess.run([*cotrain, "up"], env=env, check=True, stdout=sys.stderr)
        settings = Settings(_env_file=home / "env", home=home)
        with Client(settings.portal_url, settings.operator_token.get_secret_value()) as client:
            rows = [row for skill in load_skills(BASE_SKILLS)[:4] for row in skill.make_rows(300, seed=0)]
            (home / "rows.jsonl").write_bytes(dump_rows(rows))
            client.push_dataset(home / "rows.jsonl", name="base", purpose=DatasetPurpose.BASE)
            yield home, client, mounted.returncode == 0
    finally:
        subprocess.run([*cotrain, "down"], env=env, check=False, stdout=sys.stderr)
        if mounted.returncode == 0:
            subprocess.run(["umount", str(runs)], check=False)
        shutil.rmtree(home, ignore_errors=True)


def run(home: Path, client: Client, fault: Fault | None, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Execute one run from its request to exported weights; then cancel the round, so that every run is a first one."""
    earlier_runs = set((home / "runs").glob("[0-9a-f]*"))
    for old_run in earlier_runs:
        shutil.rmtree(old_run, ignore_errors=True)
    start = time.monotonic()
    parameters = RoundParameters(
        max_steps=steps, learning_rate=1e-3, precision="fp32", checkpoint_every=CHECKPOINT_EVERY
    )
    training_round = retry(lambda: client.start_round(parameters))
    limit_s = RUN_LIMIT_S + arguments.times * (FAULT_LIMIT_S + arguments.outage)

    def find_new_run() -> Path | None:
        folders = (file.parent for file in (home / "runs").glob("[0-9a-f]*/status.json"))
        return next((folder for folder in folders if folder not in earlier_runs), None)

    if (run_folder := poll_until(find_new_run, timeout_s=limit_s, pause_s=0.05)) is None:
        raise TimeoutError(f"round {training_round.number} does not train")
    trial = Trial(home, RunFolder(run_folder), arguments.outage)
    num_faults = 0
    # Inject when the run first reaches a step, so that every fault hits a running run.
    fault_steps = draw_fault_steps(trial.rng, CHECKPOINT_EVERY + 2, steps * 3 // 4, arguments.times) if fault else []
    while not trial.is_over and time.monotonic() - start < limit_s:
        if fault_steps and trial.step >= fault_steps[0] and fault is not None and fault(trial):
            num_faults += 1
            fault_steps.pop(0)
        time.sleep(0.05)
    seconds = time.monotonic() - start
    rows = trial.folder.read_metrics()
    step_seconds = [value for row in rows if (value := row.metrics[STEP_SECONDS_METRIC]) is not None]
    result = {
        "ended": trial.is_over,
        "num_faults": num_faults,
        "seconds": round(seconds),
        "step_seconds": statistics.median(step_seconds) if step_seconds else 1.0,
        "positions": [[row.step, row.metrics[FIRST_POSITION_METRIC], row.metrics[END_POSITION_METRIC]] for row in rows],
        "loss": rows[-1].metrics[LOSS_METRIC] if rows else None,
        "events": count_events(trial.folder),
    }
    if not trial.is_over:
        sys.stderr.write((trial.folder.path / "train.log").read_text()[-3000:])
    while (current := retry(lambda: client.round(training_round.id))).state == "running":
        retry(lambda: client.cancel_round(training_round.id))
    if current.state != "cancelled":
        sys.stderr.write(f"round {training_round.number}: {current.state}: {current.reason}\n")
    return result


def draw_fault_steps(rng: random.Random, first: int, end: int, times: int) -> list[int]:
    """Return a random step from each of the equal parts of a run, so that the outages fit between them."""
    width = (end - first) / times
    return [int(first + (n + rng.random()) * width) for n in range(times)]


def retry(call: Callable[[], Any]) -> Any:
    """Retry a call while the portal has no database connection."""
    end = time.monotonic() + 120
    while True:
        try:
            return call()
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def count_events(folder: RunFolder) -> dict[str, int]:
    counts: dict[str, int] = {}
    for event in folder.read_events():
        name = f"{event.name}: {event.exit_reason}" if isinstance(event, EndedEvent) else event.name
        counts[name] = counts.get(name, 0) + 1
    routine = (CheckpointEvent.name, CheckpointStoredEvent.name)
    return {name: count for name, count in counts.items() if name not in routine}


if __name__ == "__main__":
    sys.exit(main())

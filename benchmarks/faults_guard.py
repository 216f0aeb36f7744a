"""The loss guard with a NaN and a tenfold loss injected on one rank: `python benchmarks/faults_guard.py`, two minutes.

The fault lasts for one step, for two, or so long that the run must roll back; each run is compared with one without
faults. The positions missing from the metrics must be those skipped in the events, and the loss of the exported weights
over all data must be within 1 %.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import make_line, print_lines
from training_grids import make_training_inputs

from infra.process_group import build_torchrun_command, run_child
from yuan.config import ModelConfig, TrainConfig
from yuan.data.samples import Sample
from yuan.model import weights
from yuan.model.loss import weighted_cross_entropy
from yuan.plan.planner import make_plan_from_bounds
from yuan.plan.pool import make_cpu_pool
from yuan.plan.workload import Workload
from yuan.train.events import RepeatEvent, RollBackEvent, SkipEvent
from yuan.train.metrics_row import END_POSITION_METRIC, FIRST_POSITION_METRIC
from yuan.train.run_folder import RunFolder
from yuan.train.run_spec import RunSpec

MAX_STEPS = 80
GLOBAL_BATCH_SIZE = 16
MAX_DIFFERENCE = 0.01  # of the loss, relative
TRAIN_CONFIG = TrainConfig(
    max_steps=MAX_STEPS,
    learning_rate=1e-3,
    seq_len=64,
    micro_batch_size=2,
    global_batch_size=GLOBAL_BATCH_SIZE,
    warmup_steps=10,
    checkpoint_every=10,
)
FIRST_BAD_POSITION = 40 * GLOBAL_BATCH_SIZE  # first position of the injected fault
FAULT_SPANS: dict[str, dict[str, Any]] = {
    "once": {"first": FIRST_BAD_POSITION, "end": FIRST_BAD_POSITION + GLOBAL_BATCH_SIZE, "times": 1},
    "two steps": {"first": FIRST_BAD_POSITION, "end": FIRST_BAD_POSITION + 2 * GLOBAL_BATCH_SIZE, "times": None},
    "five steps": {"first": FIRST_BAD_POSITION, "end": FIRST_BAD_POSITION + 5 * GLOBAL_BATCH_SIZE, "times": None},
}


def main() -> int:
    ok = True
    with tempfile.TemporaryDirectory() as name:
        parent, model, samples = make_training_inputs(Path(name) / "parent")
        clean_run = run(Path(name) / "alone", parent, model, samples, None)
        clean_loss = compute_loss(clean_run)
        for kind in ("nan", "tenfold"):
            for length, span in FAULT_SPANS.items():
                folder = run(Path(name) / f"{kind} {length}", parent, model, samples, {"kind": kind, **span})
                difference, (missing, reported) = compute_loss(folder) / clean_loss - 1, find_skipped_positions(folder)
                result_line = make_line(
                    f"{kind}, {length}", round(difference, 5), "of the loss without faults", "run without faults"
                )
                is_right = (
                    abs(difference) <= MAX_DIFFERENCE
                    and missing == reported
                    and len(folder.read_metrics()) >= MAX_STEPS - 2
                )
                is_equal = length != "once" or are_weights_equal(clean_run, folder)
                counts = {
                    event_type.name: sum(isinstance(event, event_type) for event in folder.read_events())
                    for event_type in (RepeatEvent, SkipEvent, RollBackEvent)
                }
                goal = f"within {MAX_DIFFERENCE}, skipped positions those of the events" + (
                    "; bit-equal" if length == "once" else ""
                )
                details = {"skipped": len(missing), "bit_equal": are_weights_equal(clean_run, folder), **counts}
                ok &= print_lines({**result_line, "goal": goal, "ok": is_right and is_equal, **details})
    return 0 if ok else 1


def run(path: Path, parent: Path, model: ModelConfig, samples: list[Sample], fault: dict[str, Any] | None) -> RunFolder:
    plan = make_plan_from_bounds(
        Workload.from_train_config(model, TRAIN_CONFIG),
        make_cpu_pool().groups[0],
        (0, 4, 6),
        data_size=1,
        micro_batch_size=2,
    )
    path.mkdir()
    (path / "parent").symlink_to(parent)
    (path / "tokenizer.model").write_bytes((parent / "tokenizer.model").read_bytes())
    folder = RunFolder(path)
    spec = RunSpec(
        kind="finetune", model=model, snapshot="s", plan=plan, train_config=TRAIN_CONFIG, seed=5, parent="v1"
    )
    folder.prepare(spec, {"documents": samples}, pad=0)
    program: list[str | Path] = ["-m", "yuan.train.run"]
    if fault is not None:
        (path / "fault.json").write_text(json.dumps(fault))
        program = [Path(__file__).with_name("fault_injection.py")]
    command = build_torchrun_command(plan.pipeline_size, *program, path)
    with run_child(command, path, env=dict(os.environ), log_name="train.log") as process:
        if process.wait(300):
            raise RuntimeError((path / "train.log").read_text()[-3000:])
    return folder


def find_skipped_positions(folder: RunFolder) -> tuple[list[int], list[int]]:
    """Return the positions missing from the recorded steps, and the positions skipped according to the events."""
    rows = folder.read_metrics()
    reported: set[int] = set()
    for event in folder.read_events():
        if isinstance(event, SkipEvent):
            reported |= set(range(*event.positions))
        if isinstance(event, RollBackEvent):
            reported |= {position for span in event.positions for position in range(*span)}
    spans = [(int(row.metrics[FIRST_POSITION_METRIC] or 0), int(row.metrics[END_POSITION_METRIC] or 0)) for row in rows]
    trained = {position for first, end in spans for position in range(first, end)} - reported
    return sorted(set(range(spans[-1][1])) - trained), sorted(reported)


def compute_loss(folder: RunFolder) -> float:
    """Return the exported weights' mean loss over all target tokens of the run's data."""
    model, corpus = weights.load(folder.export), folder.open_corpus(5)
    windows, _ = corpus.read(np.arange(corpus.sources[0].windows))
    tokens, labels, documents = (
        torch.from_numpy(array).long() for array in (windows.tokens, windows.labels, windows.documents)
    )
    loss_mask = torch.from_numpy(windows.loss_mask).float()
    with torch.no_grad():
        return float(weighted_cross_entropy(model(tokens, documents), labels, loss_mask / loss_mask.sum()))


def are_weights_equal(first_run: RunFolder, second_run: RunFolder) -> bool:
    states = [weights.load(folder.export).state_dict() for folder in (first_run, second_run)]
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


if __name__ == "__main__":
    sys.exit(main())

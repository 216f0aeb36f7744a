"""Fault injection in a training rank: `torchrun benchmarks/fault_injection.py RUN_DIR`, for tests and benchmarks.

RUN_DIR/fault.json configures the fault: {"kind": "nan" | "tenfold", "first", "end", "times"}. On the last rank, the
loss of each step whose data overlaps the positions [first, end) is corrupted, in the first `times` passes; null: in
every pass.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from infra.logs import configure_logging
from infra.process_group import exit_with_parent
from yuan.data.shuffle import Int64Array
from yuan.train import run
from yuan.train.trainer import Trainer

FACTORS = {"nan": float("nan"), "tenfold": 10.0}


def inject_fault(trainer: Trainer, kind: str, first: int, end: int, times: int | None) -> None:
    """Corrupt the trainer's loss at the configured positions.

    Replaces methods of this trainer: a hook in it would have this one user, which must not run in training.
    """
    remaining = [times]
    inner_pass, inner_loss = trainer.run_pass, trainer.module.loss_fn
    is_corrupted = [False]

    def run_corrupted_pass(positions: Int64Array) -> Any:
        is_hit = bool(((positions >= first) & (positions < end)).any()) and remaining[0] != 0
        is_corrupted[0] = is_hit and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if is_hit and remaining[0] is not None:
            remaining[0] -= 1
        return inner_pass(positions)

    def compute_corrupted_loss(outputs: Any, labels: Any) -> Any:
        correct_loss = inner_loss(outputs, labels)
        return correct_loss * FACTORS[kind] if is_corrupted[0] else correct_loss

    trainer.run_pass, trainer.module.loss_fn = run_corrupted_pass, compute_corrupted_loss  # type: ignore[method-assign]


def main() -> int:
    configure_logging()
    exit_with_parent()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]).resolve()
    fault = json.loads((folder / "fault.json").read_text())
    original_run = Trainer.run

    def run_with_fault(self: Trainer) -> None:
        inject_fault(self, **fault)
        original_run(self)

    Trainer.run = run_with_fault  # type: ignore[method-assign]
    return run.main()


if __name__ == "__main__":
    sys.exit(main())

"""A training rank that goes wrong on purpose: `torchrun benchmarks/planted.py RUN_DIR`, for tests and benchmarks.

RUN_DIR/plant.json says how: {"what": "nan" | "tenfold", "first", "end", "times"}. The loss of each step whose data
touches the positions [first, end) is spoilt on the last rank, in as many passes as `times` says; null: always.
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


def plant(trainer: Trainer, what: str, first: int, end: int, times: int | None) -> None:
    """Make the trainer's loss wrong where asked for."""
    left = [times]
    inner_pass, inner_loss = trainer._run_pass, trainer.module.loss_fn
    is_spoilt = [False]

    def one_pass(positions: Int64Array) -> Any:
        is_hit = bool(((positions >= first) & (positions < end)).any()) and left[0] != 0
        is_spoilt[0] = is_hit and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if is_hit and left[0] is not None:
            left[0] -= 1
        return inner_pass(positions)

    def loss(outputs: Any, labels: Any) -> Any:
        right = inner_loss(outputs, labels)
        return right * FACTORS[what] if is_spoilt[0] else right

    trainer._run_pass, trainer.module.loss_fn = one_pass, loss  # type: ignore[method-assign]


def main() -> int:
    configure_logging()
    exit_with_parent()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]).resolve()
    asked = json.loads((folder / "plant.json").read_text())
    plain = Trainer.run

    def planted_run(self: Trainer) -> None:
        plant(self, **asked)
        plain(self)

    Trainer.run = planted_run  # type: ignore[method-assign]
    return run.main()


if __name__ == "__main__":
    sys.exit(main())

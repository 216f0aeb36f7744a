"""Entry of one training rank: `torchrun -m yuan.train.run RUN_DIR`.

A run can be killed at any time and restarted on the same folder; it resumes from the last committed
checkpoint with the same order of data.
"""

import logging
import os
import sys
from pathlib import Path

import torch

from infra.logs import configure_logging
from infra.process_group import exit_with_parent, hold_file_lock
from yuan.train.exit_status import ExitStatus, classify_error, write_exit_note
from yuan.train.heartbeat import HeartbeatWriter
from yuan.train.run_folder import RunFolder
from yuan.train.trainer import Trainer
from yuan.train.zero.engine import start_distributed, stop_distributed

log = logging.getLogger(__name__)


def main() -> int:
    configure_logging()
    exit_with_parent()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = RunFolder(Path(sys.argv[1]).resolve())
    rank = int(os.environ["RANK"])
    try:
        train(folder, rank)
    except Exception as error:
        status = classify_error(error)
        log.exception("rank %d ends: %s", rank, status.name.lower().replace("_", " "))
        write_exit_note(folder.path, rank, status, f"{type(error).__name__}: {error}")
        # Exit without destroying the process groups: that would wait for peers that may wait for this rank.
        logging.shutdown()
        os._exit(status)
    write_exit_note(folder.path, rank, ExitStatus.FINISHED, "")
    return 0


def train(folder: RunFolder, rank: int) -> None:
    """Train one rank of the run in a folder, from start to export."""
    spec = folder.read_spec()
    # The same rank of an earlier start may not have exited yet; two of them must not write the same files.
    with hold_file_lock(folder.path / f".rank-{rank}.lock"):
        heartbeat = HeartbeatWriter(folder.path, rank, spec.train_config.step_limit_s)
        start_distributed(spec.plan.num_ranks)
        Trainer(folder, spec, heartbeat).run()
        stop_distributed()


if __name__ == "__main__":
    sys.exit(main())

"""Entry of one rank of a calibration: `torchrun -m yuan.train.calibration.run FOLDER`."""

import os
import sys
from pathlib import Path

import torch

from infra.logs import configure_logging
from infra.process_group import exit_with_parent
from yuan.train.calibration.measure import measure
from yuan.train.zero.engine import stop_distributed


def main() -> int:
    configure_logging()
    exit_with_parent()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    measure(Path(sys.argv[1]).resolve())
    stop_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Run a measurement in the processes that a training would have."""

import os
import tempfile
from pathlib import Path

from infra.confinement import built_environment
from infra.files import read_end
from infra.process_group import supervised, torchrun_command
from yuan.train.calibration.messages import Answer, Request

LIMIT_S = 1800.0


def run_measurement(request: Request, ranks: int) -> Answer:
    """Measure on so many ranks of this machine, of one thread each unless OMP_NUM_THREADS says otherwise.

    Raises:
        RuntimeError: with the end of the log, if the ranks fail.
        TimeoutExpired: after half an hour.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = built_environment(folder, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
        request.write(folder)
        with supervised(
            torchrun_command(ranks, "-m", "yuan.train.calibration.run", folder), folder, env, "measure.log"
        ) as process:
            status = process.wait(LIMIT_S)
        if status:
            raise RuntimeError(f"measuring ended with status {status}: {read_end(folder / 'measure.log', 2000)}")
        return Answer.read(folder)

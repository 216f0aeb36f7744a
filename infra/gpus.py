"""List the GPUs of this machine; with the standard library alone, so that the planner needs nothing else."""

import contextlib
from pathlib import Path

NVIDIA_DRIVER_FOLDER = Path("/proc/driver/nvidia")


def list_gpu_models(driver_folder: Path = NVIDIA_DRIVER_FOLDER) -> list[str]:
    """Return the name of each NVIDIA GPU of this machine, by its bus address, as the driver reports it.

    It reads the driver's files in /proc, which confined processes without access to the devices can read as well.
    """
    models = []
    for file in sorted((driver_folder / "gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            for line in file.read_text(errors="replace").splitlines():
                name, _, text = line.partition(":")
                if name.strip() == "Model":
                    models.append(text.strip())
    return models

"""Check, before anything is installed, that this machine can run the project: `python3 preflight.py`.

It runs on any Python 3 and imports nothing of this project. It prints one line per fault, with the fix.
"""

import importlib.util
import os
import shutil
import sys

SETUP_DISK_GIB = 15
SETUP_MEMORY_GIB = 7.5


def find_setup_faults(folder: str) -> "list[str]":
    """Return the faults of this machine, each with its fix."""
    faults = []
    if sys.version_info < (3, 11):
        version = "%d.%d" % sys.version_info[:2]
        faults.append(
            f"Python 3.11 or newer is required, got {version}: install it and run `make PYTHON=python3.11 ...`"
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        faults.append("Python has no venv module: install it (Debian: python3-venv)")
    if not os.access(folder, os.W_OK):
        faults.append(f"{folder} is not writable: change its permissions, or clone elsewhere")
    free = shutil.disk_usage(folder).free / 2**30
    if free < SETUP_DISK_GIB and not os.path.exists(os.path.join(folder, ".venv", "bin", "cotrain")):
        faults.append(f"{SETUP_DISK_GIB} GiB of free disk are required at {folder}, got {free:.1f}: free some space")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if memory < SETUP_MEMORY_GIB:
        faults.append(f"8 GiB of memory are required, got {memory:.1f}: use a larger machine")
    return faults


def main() -> int:
    faults = find_setup_faults(os.getcwd())
    for fault in faults:
        print(f"cannot set up: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

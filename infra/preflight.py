"""Check, before anything is installed, that this machine can run the project: `python3 preflight.py`.

Runs on any Python 3 and imports nothing of ours. One line for each fault, with the mend.
"""

import importlib.util
import os
import shutil
import sys

SETUP_DISK_GIB, SETUP_MEMORY_GIB = 15, 7.5


def find_setup_faults(folder: str) -> "list[str]":
    """What is wrong here, each with its mend."""
    found = []
    if sys.version_info < (3, 11):
        version = "%d.%d" % sys.version_info[:2]
        found.append(
            f"Python 3.11 or newer is needed and this is {version}: install it and run `make PYTHON=python3.11 ...`"
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        found.append("Python has no venv module: install it (Debian: python3-venv)")
    if not os.access(folder, os.W_OK):
        found.append(f"{folder} cannot be written: give yourself the right, or clone elsewhere")
    free = shutil.disk_usage(folder).free / 2**30
    if free < SETUP_DISK_GIB and not os.path.exists(os.path.join(folder, ".venv", "bin", "cotrain")):
        found.append(f"{SETUP_DISK_GIB} GiB of free disk are needed at {folder} and {free:.1f} are free: make room")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if memory < SETUP_MEMORY_GIB:
        found.append(f"8 GiB of memory are needed and this machine has {memory:.1f}: use a larger one")
    return found


def main() -> int:
    found = find_setup_faults(os.getcwd())
    for fault in found:
        print(f"cannot set up: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

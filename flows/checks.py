"""What can be wrong with a machine or a stack, and the mend for each; what its servers do is tried in flows.probes."""

import os
import shutil
from pathlib import Path

from flows.home import load_config, port_holder
from infra.confinement import is_enforced, refuses_calls
from infra.devices import memory_gib
from infra.services import is_running, read_state

Fault = tuple[str, str]

UNCONFINED = (
    "this kernel has no Landlock, so every service can read the others' folders and secrets",
    "use a kernel of 5.13 or later with landlock in its `lsm=` list; docs/security.md says what is not promised",
)
UNFILTERED = (
    "this kernel or processor has no filter of system calls, so a service that is taken over can end the keeper and "
    "reach every port of this machine",
    "use x86_64 or aarch64 and a kernel with CONFIG_SECCOMP_FILTER; docs/security.md says what is not promised",
)
MIN_DISK_GIB, MIN_MEMORY_GIB = 2.0, 3.0


def machine_faults(home: Path) -> list[Fault]:
    """Permissions, disk, memory and busy ports."""
    found: list[Fault] = []
    place = next(path for path in (home, *home.parents) if path.exists())
    if not os.access(place, os.W_OK):
        return [*found, (f"{place} cannot be written", "give yourself the right, or set COTRAIN_HOME elsewhere")]
    free = shutil.disk_usage(place).free / 2**30
    if free < MIN_DISK_GIB:
        found.append((f"{free:.1f} GiB of disk are free at {place}, {MIN_DISK_GIB:.0f} are needed", "make room there"))
    if not is_running(home):
        if memory_gib() < MIN_MEMORY_GIB:
            mend = "end other programs or use a larger machine"
            found.append((f"{memory_gib():.1f} GiB of memory are free, {MIN_MEMORY_GIB:.0f} are needed", mend))
        found += busy_ports(home)
    return found


def busy_ports(home: Path) -> list[Fault]:
    """Ports that this folder remembered and another program holds."""
    if not (home / "stack-config.json").exists():
        return []
    config = load_config(home)
    mend = f"end that program, or delete the line in {home / 'stack-config.json'} to choose another port"
    return [
        (f"port {port} of {name} is busy{holder}", mend)
        for name, port in config.ports.items()
        if (holder := port_holder(port, config.stack_id)) is not None
    ]


def stack_faults(home: Path) -> list[Fault]:
    """Services that are not ready, and a kernel that does not confine them."""
    if not is_running(home):
        return [("the stack is not up", "run `cotrain up`")] if (home / "stack-config.json").exists() else []
    found = [
        (f"{name} is {state['state']}: {state['error'] or 'no reason yet'}", f"see `cotrain logs {name}`")
        for name, state in read_state(home).get("services", {}).items()
        if state["state"] != "ready"
    ]
    found += [] if is_enforced() else [UNCONFINED]
    return found if refuses_calls() else [*found, UNFILTERED]

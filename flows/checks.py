"""What can be wrong with a machine or a stack, and the mend for each; what its servers do is tried in flows.probes."""

import difflib
import os
import shutil
import time
from pathlib import Path

from flows.duties import DISPATCHER_SIGN, WORKER_SIGN
from flows.home import CONFIG_FILE, has_data, load_config, port_holder
from infra.confinement import is_enforced, refuses_calls
from infra.devices import memory_gib
from infra.keeper_lock import find_holder, is_running
from infra.services import read_state
from infra.settings import PREFIX, Settings, bindings, place_of, variable, wrong_values

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
SIGNS = {"dispatcher": DISPATCHER_SIGN, "worker": WORKER_SIGN}
SILENT_S = 30.0
# What may stand in env.local: the settings, and a variable that commands take from a shell which reads the file.
KNOWN = {*map(variable, Settings.model_fields), variable("token")}


def setting_faults(home: Path) -> list[Fault]:
    """Lines of `env.local` that set nothing, names that no setting has, and values that break a setting's rule.

    Variables of the environment count too, since they win over the file; names without the prefix are not ours.
    """
    file = home / "env.local"
    try:
        lines = [line for line in bindings(file) if PREFIX in line.original.string.upper()]
    except (OSError, UnicodeDecodeError) as error:
        return [(f"{file} cannot be read: {error}", "make it a text file in UTF-8 that you may read")]
    found: list[Fault] = []
    for line in lines:
        name, place = (line.key or "").upper(), place_of(line, file)
        if line.error or (name.startswith(PREFIX) and line.value is None):
            found.append((f"a line without NAME=VALUE sets nothing ({place})", "write one, or # before the line"))
        elif name.startswith(PREFIX) and name not in KNOWN:
            near = difflib.get_close_matches(name.removeprefix(PREFIX), [one.removeprefix(PREFIX) for one in KNOWN])
            meant = f"write {' or '.join(map(variable, near))}" if near else "the names are in .env.example; write one"
            found.append((f"there is no setting {name} ({place})", f"{meant}, or take the line out"))
    return found + [(wrong, "correct the value there") for wrong in wrong_values(file)]


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
    if not (home / CONFIG_FILE).exists() or config_faults(home):
        return []
    config = load_config(home)
    mend = f"end that program, or delete the line in {home / CONFIG_FILE} to choose another port"
    return [
        (f"port {port} of {name} is busy{holder}", mend)
        for name, port in config.ports.items()
        if (holder := port_holder(port, config.stack_id)) is not None
    ]


def stack_faults(home: Path) -> list[Fault]:
    """A lost config, a keeper or services that give no sign of life, and a kernel that does not confine them."""
    found = config_faults(home)
    if not is_running(home):
        is_expected = not found and (home / CONFIG_FILE).exists()
        return [*found, ("the stack is not up", "run `cotrain up`")] if is_expected else found
    found += keeper_faults(home)
    found += [
        (f"{name} is {state['state']}: {state['error'] or 'no reason yet'}", f"see `cotrain logs {name}`")
        for name, state in read_state(home).get("services", {}).items()
        if state["state"] != "ready"
    ]
    found += silent_services(home)
    found += [] if is_enforced() else [UNCONFINED]
    return found if refuses_calls() else [*found, UNFILTERED]


def config_faults(home: Path) -> list[Fault]:
    """A config that is lost or cannot be read, or is not that of the stack which runs."""
    file = home / CONFIG_FILE
    keeper = find_holder(home)
    if not file.exists() and keeper is None and not has_data(home):
        return []
    try:
        config = load_config(home)
    except (OSError, ValueError) as error:
        return [(str(error), "restore it; until then only `cotrain down` works")]
    if keeper is not None and keeper.stack_id not in (None, config.stack_id):
        mend = f"restore the file with the stack_id {keeper.stack_id}, or run `cotrain down`"
        return [(f"{file} is not the config of the stack that runs", mend)]
    return []


def keeper_faults(home: Path) -> list[Fault]:
    """A keeper that hangs: its services may run, and nobody restarts one that does not."""
    keeper = find_holder(home)
    if keeper is None or not keeper.is_silent:
        return []
    fault = (
        f"the keeper (pid {keeper.pid}) has given no sign of life for {keeper.silent_s:.0f} s; it restarts nothing now"
    )
    return [(fault, "run `cotrain down`, which ends it, then `cotrain up`; see `cotrain logs keeper`")]


def silent_services(home: Path) -> list[Fault]:
    """Services without a port that are ready and have given no sign of life lately."""
    found: list[Fault] = []
    services = read_state(home).get("services", {})
    for name, sign in SIGNS.items():
        try:
            silent_s = time.time() - (home / sign).lstat().st_mtime
        except OSError:  # it has yet to give one; without it the keeper does not call the dispatcher ready
            continue
        if services.get(name, {}).get("state") == "ready" and silent_s > SILENT_S:
            mend = f"the keeper restarts it if this goes on; see `cotrain logs {name}`"
            found.append((f"the {name} has given no sign of life for {silent_s:.0f} s", mend))
    return found

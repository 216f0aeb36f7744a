"""What can be wrong with a machine or a stack, and the mend for each.

What its servers do is tried in `flows.stack.probes`.
"""

import difflib
import os
import shutil
import time
from pathlib import Path

from flows.duties import DISPATCHER_HEARTBEAT_FILE, WORKER_HEARTBEAT_FILE
from flows.stack.probing import Finding, convert_timestamp
from flows.stack.stack_config import CONFIG_FILE, describe_port_holder, has_data, load_config
from infra.confinement import is_landlock_enforced, is_seccomp_enforced
from infra.keeper import read_stack_state
from infra.keeper_lock import find_keeper, is_keeper_running
from infra.machine import measure_available_memory_gib
from infra.settings import (
    SETTINGS_VARIABLE_PREFIX,
    Settings,
    describe_variable_place,
    find_wrong_values,
    get_variable_name,
    parse_variable_file,
)

MACHINE_SUBJECT, KEEPER_SUBJECT, STACK_CONFIG_SUBJECT, SETTINGS_SUBJECT = (
    "this machine",
    "the keeper",
    "the stack's config",
    "the settings",
)
NO_LANDLOCK_FINDING = Finding(
    MACHINE_SUBJECT,
    None,
    "this kernel has no Landlock, so every service can read the others' folders and secrets",
    "use a kernel of 5.13 or later with landlock in its `lsm=` list; docs/security.md says what is not promised",
)
NO_SECCOMP_FINDING = Finding(
    MACHINE_SUBJECT,
    None,
    "this kernel or processor has no filter of system calls, so a service that is taken over can end the keeper and "
    "reach every port of this machine",
    "use x86_64 or aarch64 and a kernel with CONFIG_SECCOMP_FILTER; docs/security.md says what is not promised",
)
MIN_DISK_GIB, MIN_MEMORY_GIB = 2.0, 3.0
FULL_DISK_BYTES = 64 * 2**20  # with less, PostgreSQL and the store begin to refuse
HEARTBEAT_FILES = {"dispatcher": DISPATCHER_HEARTBEAT_FILE, "worker": WORKER_HEARTBEAT_FILE}
SERVICE_HEARTBEAT_TIMEOUT_S = 30.0
# What may stand in env.local: the settings, and a variable that commands take from a shell which reads the file.
KNOWN_VARIABLES = {*map(get_variable_name, Settings.model_fields), get_variable_name("token")}


def find_setting_faults(home: Path) -> list[Finding]:
    """Lines of `env.local` that set nothing, names that no setting has, and values that break a setting's rule.

    Variables of the environment count too, since they win over the file; names without the prefix are not ours.
    """
    file = home / "env.local"
    try:
        lines = [line for line in parse_variable_file(file) if SETTINGS_VARIABLE_PREFIX in line.original.string.upper()]
    except (OSError, UnicodeDecodeError) as error:
        mend = "make it a text file in UTF-8 that you may read"
        return [Finding(SETTINGS_SUBJECT, None, f"{file} cannot be read: {error}", mend)]
    found: list[Finding] = []
    for line in lines:
        name, place = (line.key or "").upper(), describe_variable_place(line, file)
        if line.error or (name.startswith(SETTINGS_VARIABLE_PREFIX) and line.value is None):
            fault = f"a line without NAME=VALUE sets nothing ({place})"
            found.append(Finding(SETTINGS_SUBJECT, None, fault, "write one, or # before the line"))
        elif name.startswith(SETTINGS_VARIABLE_PREFIX) and name not in KNOWN_VARIABLES:
            near = difflib.get_close_matches(
                name.removeprefix(SETTINGS_VARIABLE_PREFIX),
                [one.removeprefix(SETTINGS_VARIABLE_PREFIX) for one in KNOWN_VARIABLES],
            )
            meant = (
                f"write {' or '.join(map(get_variable_name, near))}"
                if near
                else "the names are in .env.example; write one"
            )
            fault = f"there is no setting {name} ({place})"
            found.append(Finding(SETTINGS_SUBJECT, None, fault, f"{meant}, or take the line out"))
    return found + [
        Finding(SETTINGS_SUBJECT, None, wrong, "correct the value there") for wrong in find_wrong_values(file)
    ]


def find_machine_faults(home: Path) -> list[Finding]:
    """Disk, permissions, memory and busy ports; a full disk first, since it may be the reason of all else."""
    found = find_disk_faults(home)
    place = find_existing_folder(home)
    if not os.access(place, os.W_OK):
        mend = "give yourself the right, or set COTRAIN_HOME elsewhere"
        return [*found, Finding(MACHINE_SUBJECT, None, f"{place} cannot be written", mend)]
    if not is_keeper_running(home):
        if measure_available_memory_gib() < MIN_MEMORY_GIB:
            fault = f"{measure_available_memory_gib():.1f} GiB of memory are free, {MIN_MEMORY_GIB:.0f} are needed"
            found.append(Finding(MACHINE_SUBJECT, None, fault, "end other programs or use a larger machine"))
        found += find_busy_ports(home)
    return found


def find_disk_faults(home: Path) -> list[Finding]:
    """Look for a disk that is full, or will be soon."""
    place = find_existing_folder(home)
    free = shutil.disk_usage(place).free
    if free >= MIN_DISK_GIB * 2**30:
        return []
    said = "is full" if free < FULL_DISK_BYTES else "is nearly full"
    fault = f"the disk of {place} {said}: {free} bytes are free there, {MIN_DISK_GIB * 2**30:.0f} are needed"
    mend = "make room on that disk (`du -xh --max-depth=2` shows what takes it); what failed for it goes on by itself"
    return [Finding(MACHINE_SUBJECT, None, fault, mend)]


def find_existing_folder(home: Path) -> Path:
    """Return the folder itself, or the first above it that is there."""
    return next(path for path in (home, *home.parents) if path.exists())


def find_busy_ports(home: Path) -> list[Finding]:
    """Ports that this folder remembered and another program holds."""
    if not (home / CONFIG_FILE).exists() or find_config_faults(home):
        return []
    config = load_config(home)
    mend = f"end that program, or delete the line in {home / CONFIG_FILE} to choose another port"
    return [
        Finding(MACHINE_SUBJECT, None, f"port {port} of {name} is busy{holder}", mend)
        for name, port in config.ports.items()
        if (holder := describe_port_holder(port, config.stack_id)) is not None
    ]


def find_stack_faults(home: Path) -> list[Finding]:
    """A lost config, a keeper or services that give no sign of life, and a kernel that does not confine them."""
    found = find_config_faults(home)
    if not is_keeper_running(home):
        is_expected = not found and (home / CONFIG_FILE).exists()
        return [*found, Finding("the stack", None, "the stack is not up", "run `cotrain up`")] if is_expected else found
    found += find_keeper_faults(home)
    found += [
        Finding(
            name,
            convert_timestamp(state["ready_at"]) if state.get("ready_at") else None,
            f"{name} is {state['state']}: {state['error'] or state['restart_reason'] or 'no reason yet'}",
            f"see `cotrain logs {name}`",
            or_later=True,
        )
        for name, state in read_stack_state(home).get("services", {}).items()
        if state["state"] != "ready"
    ]
    found += find_silent_services(home)
    found += [] if is_landlock_enforced() else [NO_LANDLOCK_FINDING]
    return found if is_seccomp_enforced() else [*found, NO_SECCOMP_FINDING]


def find_config_faults(home: Path) -> list[Finding]:
    """A config that is lost or cannot be read, or is not that of the stack which runs."""
    file = home / CONFIG_FILE
    keeper = find_keeper(home)
    if not file.exists() and keeper is None and not has_data(home):
        return []
    try:
        config = load_config(home)
    except (OSError, ValueError) as error:
        return [Finding(STACK_CONFIG_SUBJECT, None, str(error), "restore it; until then only `cotrain down` works")]
    if keeper is not None and keeper.stack_id not in (None, config.stack_id):
        mend = f"restore the file with the stack_id {keeper.stack_id}, or run `cotrain down`"
        return [Finding(STACK_CONFIG_SUBJECT, None, f"{file} is not the config of the stack that runs", mend)]
    return []


def find_keeper_faults(home: Path) -> list[Finding]:
    """A keeper that hangs: its services may run, and nobody restarts one that does not."""
    keeper = find_keeper(home)
    if keeper is None or not keeper.is_silent:
        return []
    fault = (
        f"the keeper (pid {keeper.pid}) has given no sign of life for {keeper.silent_s:.0f} s; it restarts nothing now"
    )
    mend = "run `cotrain down`, which ends it, then `cotrain up`; see `cotrain logs keeper`"
    return [Finding(KEEPER_SUBJECT, convert_timestamp(time.time() - keeper.silent_s), fault, mend)]


def find_silent_services(home: Path) -> list[Finding]:
    """Services without a port that are ready and have given no sign of life lately."""
    found: list[Finding] = []
    services = read_stack_state(home).get("services", {})
    for name, sign in HEARTBEAT_FILES.items():
        try:
            silent_s = time.time() - (home / sign).lstat().st_mtime
        except OSError:  # it has yet to give one; without it the keeper does not call the dispatcher ready
            continue
        if services.get(name, {}).get("state") == "ready" and silent_s > SERVICE_HEARTBEAT_TIMEOUT_S:
            mend = f"the keeper restarts it if this goes on; see `cotrain logs {name}`"
            fault = f"the {name} has given no sign of life for {silent_s:.0f} s"
            found.append(Finding(f"the {name}", convert_timestamp(time.time() - silent_s), fault, mend))
    return found

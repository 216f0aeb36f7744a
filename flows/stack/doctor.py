"""Find faults of the machine and the stack, each with its fix.

The servers' functions are tested in `flows.stack.probes`.
"""

import difflib
import os
import shutil
import time
from pathlib import Path

from dotenv.parser import Binding

from flows.cleanup_record import read_cleanup_record
from flows.disk_history import forecast_disk, read_disk_history
from flows.duties import DISPATCHER_HEARTBEAT_FILE, SERVICE_HEARTBEAT_TIMEOUT_S, WORKER_HEARTBEAT_FILE
from flows.recipe_files import find_misnamed_recipes, find_recipe_file, find_recipe_files
from flows.retention_policy import RETENTION_FILE, read_retention_policy
from flows.stack.findings import Finding, convert_timestamp
from flows.stack.stack_config import CONFIG_FILE, describe_port_holder, has_data, load_config
from infra.confinement import is_landlock_enforced, is_seccomp_enforced
from infra.keeper_lock import find_keeper, is_keeper_running
from infra.keeper_state import ServiceState, read_service_states
from infra.machine import measure_available_memory_gib
from infra.settings import (
    SETTINGS_VARIABLE_PREFIX,
    Settings,
    describe_variable_place,
    find_wrong_values,
    get_variable_name,
    parse_variable_file,
)
from yuan.config import format_count
from yuan.recipe import parse_recipe

MACHINE_SUBJECT = "this machine"
KEEPER_SUBJECT = "the keeper"
STACK_CONFIG_SUBJECT = "the stack's config"
SETTINGS_SUBJECT = "the settings"
RECIPES_SUBJECT = "the recipes"
RETENTION_SUBJECT = "the retention policy"
CLEANUP_SUBJECT = "the last cleanup"
NO_LANDLOCK_FINDING = Finding(
    MACHINE_SUBJECT,
    fault="this kernel has no Landlock, so every service can read the others' folders and secrets",
    fix="use a kernel of 5.13 or later with landlock in its `lsm=` list; docs/security.md lists what is not guaranteed",
)
NO_SECCOMP_FINDING = Finding(
    MACHINE_SUBJECT,
    fault="this kernel or processor has no seccomp filter, so a compromised service can kill the keeper and connect to "
    "every port of this machine",
    fix="use x86_64 or aarch64 and a kernel with CONFIG_SECCOMP_FILTER; docs/security.md lists what is not guaranteed",
)
MIN_DISK_GIB = 2.0
MIN_ROUNDS_LEFT = 3  # with fewer, `doctor` and `status` report the disk
MIN_MEMORY_GIB = 3.0
FULL_DISK_BYTES = 64 * 2**20  # with less free space, PostgreSQL and the store begin to reject writes
HEARTBEAT_FILES = {"dispatcher": DISPATCHER_HEARTBEAT_FILE, "worker": WORKER_HEARTBEAT_FILE}
# Names allowed in env.local: the settings, and the token, which commands read if a shell sources the file.
KNOWN_VARIABLES = {*map(get_variable_name, Settings.model_fields), get_variable_name("token")}


def find_setting_faults(home: Path) -> list[Finding]:
    """Find lines of `env.local` without a value, unknown setting names, and invalid values.

    Environment variables are checked too, since they override the file; names without the prefix are ignored.
    """
    file = home / "env.local"
    try:
        lines = [line for line in parse_variable_file(file) if SETTINGS_VARIABLE_PREFIX in line.original.string.upper()]
    except (OSError, UnicodeDecodeError) as error:
        fix = "make it a text file in UTF-8 that you may read"
        return [Finding(SETTINGS_SUBJECT, fault=f"{file} cannot be read: {error}", fix=fix)]
    findings = [finding for line in lines if (finding := _check_setting_line(line, file)) is not None]
    return findings + [
        Finding(SETTINGS_SUBJECT, fault=fault, fix="correct the value there") for fault in find_wrong_values(file)
    ]


def find_recipe_faults(home: Path) -> list[Finding]:
    """Find recipes in the home folder that break a rule or are never read, and a default recipe that does not exist."""
    findings = [
        Finding(RECIPES_SUBJECT, fault=f"{path} is never read: {reason}", fix="rename the file, or remove it")
        for path, reason in find_misnamed_recipes(home).items()
    ]
    for file in find_recipe_files(home, all_of_a_name=True):
        if not file.is_custom:
            continue
        try:
            parse_recipe(file.read(), file.name)
        except ValueError as error:
            findings.append(Finding(RECIPES_SUBJECT, fault=str(error), fix=f"correct {file.path}, or remove it"))
        if not find_recipe_file(home, file.name).is_custom:
            fault = f"{file.path} is not read, since the platform ships a recipe {file.name}"
            findings.append(Finding(RECIPES_SUBJECT, fault=fault, fix="rename the file"))
    try:
        find_recipe_file(home, _read_default_recipe(home))
    except ValueError as error:
        fault = f"rounds that name no recipe fail: {error}"
        findings.append(Finding(RECIPES_SUBJECT, fault=fault, fix="correct COTRAIN_RECIPE in env.local, or write it"))
    return findings


def _read_default_recipe(home: Path) -> str:
    """Return the recipe of rounds that name none, from the environment, env.local, or the settings' default."""
    variable = get_variable_name("recipe")
    lines = {line.key: line.value for line in parse_variable_file(home / "env.local")}
    return os.environ.get(variable) or lines.get(variable) or str(Settings.model_fields["recipe"].default)


def _check_setting_line(line: Binding, file: Path) -> Finding | None:
    """Return the fault of a line that names a variable of the platform; None if it sets a known one."""
    name, place = (line.key or "").upper(), describe_variable_place(line, file)
    if line.error or (name.startswith(SETTINGS_VARIABLE_PREFIX) and line.value is None):
        fault = f"a line without NAME=VALUE sets nothing ({place})"
        return Finding(SETTINGS_SUBJECT, fault=fault, fix="write one, or # before the line")
    if not name.startswith(SETTINGS_VARIABLE_PREFIX) or name in KNOWN_VARIABLES:
        return None

    similar_names = difflib.get_close_matches(
        name.removeprefix(SETTINGS_VARIABLE_PREFIX),
        [variable.removeprefix(SETTINGS_VARIABLE_PREFIX) for variable in KNOWN_VARIABLES],
    )
    correction = (
        f"write {' or '.join(map(get_variable_name, similar_names))}"
        if similar_names
        else "the names are in .env.example; write one"
    )
    return Finding(
        SETTINGS_SUBJECT, fault=f"there is no setting {name} ({place})", fix=f"{correction}, or take the line out"
    )


def find_machine_faults(home: Path) -> list[Finding]:
    """Check disk, permissions, memory and ports; a full disk comes first, since it may cause the other faults."""
    findings = find_disk_faults(home)
    place = find_existing_folder(home)
    if not os.access(place, os.W_OK):
        fix = "give yourself the right, or set COTRAIN_HOME elsewhere"
        return [*findings, Finding(MACHINE_SUBJECT, fault=f"{place} cannot be written", fix=fix)]
    if not is_keeper_running(home):
        if measure_available_memory_gib() < MIN_MEMORY_GIB:
            fault = f"{measure_available_memory_gib():.1f} GiB of memory are free, {MIN_MEMORY_GIB:.0f} are needed"
            findings.append(Finding(MACHINE_SUBJECT, fault=fault, fix="end other programs or use a larger machine"))
        findings += find_busy_ports(home)
    return findings


def find_disk_faults(home: Path) -> list[Finding]:
    """Return a fault if the disk is full or nearly full, else nothing."""
    place = find_existing_folder(home)
    free = shutil.disk_usage(place).free
    if free >= MIN_DISK_GIB * 2**30:
        return find_filling_disk(home, free)
    state = "is full" if free < FULL_DISK_BYTES else "is nearly full"
    fault = f"the disk of {place} {state}: {free} bytes are free there, {MIN_DISK_GIB * 2**30:.0f} are needed"
    fix = "make room on that disk (`du -xh --max-depth=2` shows the usage); failed work then resumes by itself"
    return [Finding(MACHINE_SUBJECT, fault=fault, fix=fix)]


def find_filling_disk(home: Path, free: int) -> list[Finding]:
    """Return a fault if the disk will be full within MIN_ROUNDS_LEFT rounds, by its growth over recent ones."""
    forecast = forecast_disk(read_disk_history(home), free)
    if forecast is None or forecast.rounds_left >= MIN_ROUNDS_LEFT:
        return []
    fault = (
        f"the disk of {home} has room for {format_count(forecast.rounds_left, 'more round')}: {free:,} bytes are free, "
        f"and each of the last {forecast.num_rounds - 1} took {forecast.bytes_per_round:,}"
    )
    fix = (
        f"keep less, by {home / RETENTION_FILE} and `cotrain cleanup`, or COTRAIN_MAX_CACHE_BYTES; or use a larger disk"
    )
    return [Finding(MACHINE_SUBJECT, fault=fault, fix=fix)]


def find_retention_faults(home: Path) -> list[Finding]:
    """Find a retention policy that cannot be read, with which nothing is removed."""
    try:
        read_retention_policy(home)
    except ValueError as error:
        return [Finding(RETENTION_SUBJECT, fault=f"no expired files are removed: {error}", fix="correct the file")]
    return []


def find_cleanup_faults(home: Path) -> list[Finding]:
    """Find areas that the last cleanup could not clean."""
    record = read_cleanup_record(home)
    if record is None or record.failing_since is None:
        return []
    return [
        Finding(
            CLEANUP_SUBJECT,
            fault=f"expired files stay since {convert_timestamp(record.failing_since):%F %T}: {area}: {problem}",
            fix="remove the cause and run `cotrain cleanup`; see also `cotrain logs flows`",
        )
        for area, problem in record.problems.items()
    ]


def find_existing_folder(home: Path) -> Path:
    """Return the folder itself, or its nearest existing parent."""
    return next(path for path in (home, *home.parents) if path.exists())


def find_busy_ports(home: Path) -> list[Finding]:
    """Find ports of this folder's config that another program uses."""
    if not (home / CONFIG_FILE).exists() or find_config_faults(home):
        return []
    config = load_config(home)
    fix = f"end that program, or delete the line in {home / CONFIG_FILE} to choose another port"
    return [
        Finding(MACHINE_SUBJECT, fault=f"port {port} of {name} is busy{holder}", fix=fix)
        for name, port in config.ports.items()
        if (holder := describe_port_holder(port, config.stack_id)) is not None
    ]


def find_stack_faults(home: Path) -> list[Finding]:
    """Check for a lost config, missing heartbeats of keeper or services, and a kernel that cannot confine them."""
    findings = find_config_faults(home)
    if not is_keeper_running(home):
        return findings or [Finding("the stack", fault=f"the stack in {home} is not up", fix="run `cotrain up`")]

    findings += find_keeper_faults(home)
    findings += [
        Finding(
            name,
            succeeded_at=convert_timestamp(state.ready_at) if state.ready_at else None,
            fault=f"{name} is {state.state}: {state.error or state.restart_reason or 'no reason yet'}",
            fix=f"see `cotrain logs {name}`",
            or_later=True,
        )
        for name, state in read_service_states(home).items()
        if state.state != "ready"
    ]
    findings += find_silent_services(home)
    if not is_landlock_enforced():
        findings.append(NO_LANDLOCK_FINDING)
    if not is_seccomp_enforced():
        findings.append(NO_SECCOMP_FINDING)
    return findings


def find_config_faults(home: Path) -> list[Finding]:
    """Check for a config that is lost, unreadable, or not that of the running stack."""
    file = home / CONFIG_FILE
    keeper = find_keeper(home)
    if not file.exists() and keeper is None and not has_data(home):
        return []
    try:
        config = load_config(home)
    except (OSError, ValueError) as error:
        return [Finding(STACK_CONFIG_SUBJECT, fault=str(error), fix="restore it; until then only `cotrain down` works")]
    if keeper is not None and keeper.stack_id not in (None, config.stack_id):
        fix = f"restore the file with the stack_id {keeper.stack_id}, or run `cotrain down`"
        return [Finding(STACK_CONFIG_SUBJECT, fault=f"{file} is not the config of the stack that runs", fix=fix)]
    return []


def find_keeper_faults(home: Path) -> list[Finding]:
    """Check for a keeper that hangs: its services may run, but failed ones are not restarted."""
    keeper = find_keeper(home)
    if keeper is None or not keeper.is_silent:
        return []
    fault = (
        f"the keeper (pid {keeper.pid}) has sent no heartbeat for {keeper.silent_s:.0f} s; it restarts no service now"
    )
    fix = "run `cotrain down`, which ends it, then `cotrain up`; see `cotrain logs keeper`"
    return [
        Finding(KEEPER_SUBJECT, succeeded_at=convert_timestamp(time.time() - keeper.silent_s), fault=fault, fix=fix)
    ]


def find_silent_services(home: Path) -> list[Finding]:
    """Find ready services without a port whose heartbeat is older than SERVICE_HEARTBEAT_TIMEOUT_S."""
    findings: list[Finding] = []
    services = read_service_states(home)
    for name, file in HEARTBEAT_FILES.items():
        try:
            heartbeat_at = (home / file).lstat().st_mtime
        except OSError:  # no heartbeat yet; without one the keeper does not report the dispatcher as ready
            continue
        silent_s = time.time() - heartbeat_at
        if services.get(name, ServiceState()).state == "ready" and silent_s > SERVICE_HEARTBEAT_TIMEOUT_S:
            findings.append(
                Finding(
                    f"the {name}",
                    succeeded_at=convert_timestamp(heartbeat_at),
                    fault=f"the {name} has sent no heartbeat for {silent_s:.0f} s",
                    fix=f"the keeper restarts it if this continues; see `cotrain logs {name}`",
                )
            )
    return findings

"""Configuration of the embedded stack in its home folder: id, ports, secrets, and the settings files."""

import contextlib
import json
import logging
import os
import random
import re
import secrets
import socket
import stat
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from flows.recipe_files import CUSTOM_RECIPES_FOLDER
from infra.files import write_private
from infra.keeper import find_stack_pids
from infra.listeners import describe_user, find_listener_uids
from infra.postgres import REQUIRE_SCRAM_OPTION
from infra.settings import Settings, read_settings, render_process_files

log = logging.getLogger(__name__)

PUBLIC_PORTS = {"portal": 8800, "prefect": 4200, "mlflow": 5000}
WEED_PORT_NAMES = ("master", "volume", "filer", "s3", "admin")
PORT_NAMES = (
    *PUBLIC_PORTS,
    "postgres",
    "model_server",
    *WEED_PORT_NAMES,
    *(f"{name}_grpc" for name in WEED_PORT_NAMES),
)
PORT_RANGE = (20_000, 28_999)  # below 29,500, torchrun's default rendezvous port
PORT_RANGE_VARIABLE = "COTRAIN_PORT_RANGE"
MAX_PORT = 65_535
MAX_PORT_TRIES = 10_000
SECRET_NAMES = (
    *("postgres", "database", "prefect_database", "mlflow_database", "mlflow_auth_database"),
    *("s3_access_key", "s3_secret_key", "s3_admin_access_key", "s3_admin_secret_key"),
    *("mlflow_s3_access_key", "mlflow_s3_secret_key", "mlflow", "mlflow_consumer", "mlflow_reader", "mlflow_session"),
    *("prefect", "model_server", "operator", "split_salt", "weed_1", "weed_2", "weed_3", "weed_4"),
)
WEED_CERTIFICATE = "weed-settings/tls.pem"
ROTATABLE_SECRET_NAMES = (*(name for name in SECRET_NAMES if name != "split_salt"), "weed_certificate")
PORT_RELEASE_TIMEOUT_S = 3.0
CONFIG_FILE = "stack-config.json"
CONFIG_COPY_FILE = "stack-config.copy.json"


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Hold the ports and secrets of one home folder, chosen at the first start and kept.

    Attributes:
        stack_id: in the environment of every process of the stack.
        ports: by the names in PORT_NAMES.
        secrets: by the names in SECRET_NAMES.
        durable: true if the database writes to disk at every commit.
        retired: secrets that rotations replaced, by name, oldest first, until every server uses the new ones.
    """

    stack_id: str
    ports: dict[str, int]
    secrets: dict[str, str]
    durable: bool = True
    retired: dict[str, list[str]] = field(default_factory=dict)


def load_or_make_config(home: Path, *, durable: bool = True) -> StackConfig:
    """Read the folder's config, or choose free ports and random secrets for a new one in a folder without data.

    Raises:
        ValueError: as `load_config`.
    """
    if (home / CONFIG_FILE).exists() or has_data(home):
        return load_config(home)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    config = StackConfig(
        stack_id=uuid.uuid4().hex, ports=choose_ports(), secrets=generate_secrets(SECRET_NAMES), durable=durable
    )
    save_config(home, config)
    return config


def has_data(home: Path) -> bool:
    """Return True if a stack has been started in this folder; its data needs the original config."""
    return any((home / name).exists() for name in (CONFIG_COPY_FILE, "pg", "env"))


def load_config(home: Path) -> StackConfig:
    """Read the folder's config; missing ports and secrets are chosen and saved.

    Raises:
        ValueError: if it is missing or unreadable. It is never recreated here: it holds the passwords of the existing
            data and the salt that decides which cases are held out.
    """
    file = home / CONFIG_FILE
    try:
        config = StackConfig(**json.loads(file.read_text()))
        # A port is missing if an operator removed it to change it, a secret if a newer version of the code needs it.
        missing_ports = [name for name in PORT_NAMES if name not in config.ports]
        missing_secrets = [name for name in SECRET_NAMES if name not in config.secrets]
    except FileNotFoundError:
        if not has_data(home):
            raise ValueError(f"there is no stack in {home}; make one with `cotrain up`") from None
        raise ValueError(_describe_lost_config(file, "is missing")) from None
    except (ValueError, TypeError, AttributeError):
        raise ValueError(_describe_lost_config(file, "is damaged")) from None
    if missing_ports or missing_secrets:
        config.ports.update(choose_ports(missing_ports, set(config.ports.values())))
        config.secrets.update(generate_secrets(missing_secrets))
        save_config(home, config)
    return config


def _describe_lost_config(file: Path, condition: str) -> str:
    copy = file.with_name(CONFIG_COPY_FILE)
    fix = f"put its copy back: cp {copy} {file}" if copy.exists() else "restore it from a backup"
    return f"{file}, which holds the stack's passwords, ports and salt, {condition}; {fix}"


def save_config(home: Path, config: StackConfig) -> None:
    """Write the config, and then its copy, so that one of the two is always complete."""
    text = json.dumps(asdict(config), indent=2)
    write_private(home / CONFIG_FILE, text)
    write_private(home / CONFIG_COPY_FILE, text)


def generate_secrets(names: Sequence[str]) -> dict[str, str]:
    """Return a random secret of 192 bits for each name."""
    return {name: secrets.token_urlsafe(24) for name in names}


def retire_secrets(home: Path, names: Sequence[str] = ()) -> list[str]:
    """Replace the named secrets, or all that can be rotated, and keep the old ones until the next start; return names.

    Servers read new secrets when they start. Those that store them in a database are then updated by signing in with
    the retired ones, of which there are several if a rotation was interrupted and repeated.

    Raises:
        ValueError: if a name is unknown, or is the split salt, which must never change.
    """
    config = load_config(home)
    wrong_names = [name for name in names if name not in ROTATABLE_SECRET_NAMES]
    if wrong_names:
        is_fixed = wrong_names[0] in SECRET_NAMES
        reason = " (it decides which cases are held out and must never change)" if is_fixed else ""
        raise ValueError(
            f"there is no secret {wrong_names[0]!r} to rotate{reason}; choose from {', '.join(ROTATABLE_SECRET_NAMES)}"
        )
    names_to_rotate = list(names or ROTATABLE_SECRET_NAMES)
    in_config = [name for name in names_to_rotate if name in config.secrets]
    retired = {name: [*config.retired.get(name, []), config.secrets[name]] for name in in_config}
    secrets_after = config.secrets | generate_secrets(in_config)
    save_config(home, replace(config, secrets=secrets_after, retired=config.retired | retired))
    if "weed_certificate" in names_to_rotate:  # a separate file, which the next start recreates
        (home / WEED_CERTIFICATE).unlink(missing_ok=True)
    return names_to_rotate


def drop_retired_secrets(home: Path) -> None:
    """Delete the retired secrets; call it when every server runs with the new ones."""
    config = load_config(home)
    if config.retired:
        save_config(home, replace(config, retired={}))


def choose_ports(names: Sequence[str] = PORT_NAMES, taken_ports: Collection[int] = ()) -> dict[str, int]:
    """Choose free loopback ports: the default ones for web interfaces, others outside the ephemeral range.

    With COTRAIN_PORT_RANGE=FIRST-LAST all are chosen from that range.

    Raises:
        ValueError: if the range is not valid.
        RuntimeError: if none is found.
    """
    port_range = read_port_range()
    defaults = {} if PORT_RANGE_VARIABLE in os.environ else PUBLIC_PORTS
    ports: dict[str, int] = {}
    for name in names:
        default_ports = [defaults[name]] if name in defaults else []
        random_ports = (random.SystemRandom().randint(*port_range) for _ in range(MAX_PORT_TRIES))
        for port in (*default_ports, *random_ports):
            is_taken = port in taken_ports or port in ports.values()
            if not is_taken and is_port_free(port) and not is_port_blocked(name, port):
                ports[name] = port
                break
        else:
            rule = f"ports {port_range[0]} to {port_range[1]}, and for the store their files {get_weed_socket(name, 0)}"
            raise RuntimeError(f"no free port for {name} in {MAX_PORT_TRIES} tries; see who holds {rule}")
    return ports


def read_port_range() -> tuple[int, int]:
    """Return the first and last port to choose from: that of the environment, else PORT_RANGE.

    Raises:
        ValueError: if the environment's is not valid.
    """
    text = os.environ.get(PORT_RANGE_VARIABLE)
    if text is None:
        return PORT_RANGE
    match = re.fullmatch(r"([0-9]{4,5})-([0-9]{4,5})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1024 <= first <= last - len(PORT_NAMES) or last > MAX_PORT:
        raise ValueError(
            f"{PORT_RANGE_VARIABLE} must be FIRST-LAST, more than {len(PORT_NAMES)} ports from 1024 to {MAX_PORT}, "
            f"got {text!r}; set 21000-21999, for example"
        )
    return first, last


def get_weed_socket(name: str, port: int) -> Path:
    """Return the path, fixed in the store, of the socket of one of its gRPC ports."""
    return Path(f"/tmp/seaweedfs-{name.removesuffix('_grpc')}-grpc-{port}.sock")


def is_port_blocked(name: str, port: int) -> bool:
    """Return True if a port is unusable because a file that we cannot remove is at the path of its socket."""
    if not name.endswith("_grpc"):
        return False
    try:
        entry = get_weed_socket(name, port).lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(entry.st_mode) or os.geteuid() not in (0, entry.st_uid)


def replace_blocked_ports(home: Path, config: StackConfig) -> StackConfig:
    """Choose other ports for blocked ones and save the config; only the store itself uses these ports."""
    blocked = [name for name, port in config.ports.items() if is_port_blocked(name, port)]
    if not blocked:
        return config
    for name in blocked:
        log.warning("%s is not ours to remove; another port is chosen", get_weed_socket(name, config.ports[name]))
    changed = replace(config, ports=config.ports | choose_ports(blocked, set(config.ports.values())))
    save_config(home, changed)
    return changed


def describe_port_holder(port: int, stack_id: str) -> str | None:
    """Describe the process that holds a port; None if the port is free or held by a process of this stack.

    A server that is exiting no longer listens but holds its port; wait PORT_RELEASE_TIMEOUT_S for it.
    """
    end = time.monotonic() + PORT_RELEASE_TIMEOUT_S
    while not is_port_free(port):
        if (holder := _describe_listener(port, stack_id)) is not None:
            return holder or None
        users = find_listener_uids(f"tcp://127.0.0.1:{port}")
        if users or time.monotonic() > end:
            return "".join(f", held by {describe_user(uid)}" for uid in sorted(users))
        time.sleep(0.05)
    return None


def _describe_listener(port: int, stack_id: str) -> str | None:
    """Describe the process that listens on a port; empty if it belongs to this stack, None if none is visible."""
    for connection in psutil.net_connections("tcp4"):
        is_listener = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        if not is_listener or connection.pid is None:  # None: a process of another user
            continue
        if connection.pid in set(find_stack_pids(stack_id)):
            return ""
        with contextlib.suppress(psutil.NoSuchProcess):  # it has exited since
            return f", held by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    return None


def is_port_free(port: int) -> bool:
    """Return True if a server of this user can listen on a port, even with lingering connections of an earlier one."""
    if find_listener_uids(f"tcp://127.0.0.1:{port}"):
        return False
    with socket.socket() as probe:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            probe.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def write_environment(home: Path, config: StackConfig) -> None:
    """Write `$COTRAIN_HOME/env` for the operator's commands, and the settings file of each process.

    Raises:
        ValueError: if one of the operator's values is invalid.
    """
    ports, secret = config.ports, config.secrets
    values = {
        "STACK_ID": config.stack_id,
        "DATABASE_URL": f"postgresql://cotrain:{secret['database']}@127.0.0.1:{ports['postgres']}/cotrain?{REQUIRE_SCRAM_OPTION}",
        "S3_ENDPOINT": f"http://127.0.0.1:{ports['s3']}",
        "S3_ACCESS_KEY": secret["s3_access_key"],
        "S3_SECRET_KEY": secret["s3_secret_key"],
        "MLFLOW_URL": f"http://127.0.0.1:{ports['mlflow']}",
        "MLFLOW_PASSWORD": secret["mlflow"],
        "MLFLOW_CONSUMER_PASSWORD": secret["mlflow_consumer"],
        "MLFLOW_READER_PASSWORD": secret["mlflow_reader"],
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['prefect']}/api",
        "PREFECT_AUTH": f"cotrain:{secret['prefect']}",
        "PORTAL_URL": f"http://127.0.0.1:{ports['portal']}",
        "MODEL_SERVER_URL": f"http://127.0.0.1:{ports['model_server']}",
        "MODEL_SERVER_TOKEN": secret["model_server"],
        "OPERATOR_TOKEN": f"ct_{secret['operator']}",
        "SPLIT_SALT": secret["split_salt"],
    }
    write_private(home / "env", "".join(f"COTRAIN_{name}={value}\n" for name, value in values.items()))
    settings = read_settings(Settings, home)
    for name in ("settings", CUSTOM_RECIPES_FOLDER):
        (home / name).mkdir(exist_ok=True, mode=0o700)
    for name, text in render_process_files(settings).items():
        write_private(home / name, text)

"""What one home folder keeps of the embedded stack: its id, ports, secrets and the settings file made of them."""

import json
import os
import random
import secrets
import socket
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.services import marked

PUBLIC_PORTS = {"portal": 8800, "prefect": 4200, "mlflow": 5000}
WEED_PORTS = ("master", "volume", "filer", "s3", "admin")
PORTS = (*PUBLIC_PORTS, "postgres", "model_server", *WEED_PORTS, *(f"{name}_grpc" for name in WEED_PORTS))
PORT_RANGE = (20_000, 29_999)
SECRETS = ("postgres", "database", "prefect_database", "mlflow_database", "mlflow_auth_database", "s3_access_key",
           "s3_secret_key", "mlflow", "mlflow_consumer", "mlflow_session", "prefect", "model_server", "operator",
           "split_salt", "weed_1", "weed_2", "weed_3", "weed_4")  # fmt: skip


@dataclass(frozen=True)
class StackConfig:
    """Ports and secrets of one home folder, chosen at the first start and kept."""

    stack_id: str
    ports: dict[str, int]
    secrets: dict[str, str]
    durable: bool = True


def load_config(home: Path, *, durable: bool = True) -> StackConfig:
    """Read the folder's config, or choose free ports and random secrets for a new one."""
    file = home / "stack-config.json"
    if file.exists():
        config = StackConfig(**json.loads(file.read_text()))
        missing = [name for name in PORTS if name not in config.ports]
        if missing:  # somebody took a busy port out, to have another chosen
            config.ports.update(choose_ports(missing, set(config.ports.values())))
            write_private(file, json.dumps(asdict(config), indent=2))
        return config
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    config = StackConfig(
        uuid.uuid4().hex, choose_ports(), {name: secrets.token_urlsafe(24) for name in SECRETS}, durable
    )
    write_private(file, json.dumps(asdict(config), indent=2))
    return config


def choose_ports(names: Sequence[str] = PORTS, taken: Collection[int] = ()) -> dict[str, int]:
    """Free ports of the loopback interface: the usual ones for what people open, others outside the ephemeral range."""
    chosen: dict[str, int] = {}
    for name in names:
        port = PUBLIC_PORTS.get(name)
        while port is None or port in taken or port in chosen.values() or not is_free(port):
            port = random.SystemRandom().randint(*PORT_RANGE)
        chosen[name] = port
    return chosen


def port_holder(port: int, stack_id: str) -> str | None:
    """None if a port is free or held by a leftover of this stack; else words for who holds it."""
    if is_free(port):
        return None
    inodes = _listening_inodes(port)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            held = {os.readlink(link) for link in (process / "fd").iterdir()}
        except OSError:
            continue
        if held & inodes:
            if int(process.name) in set(marked(stack_id)):
                return None
            return f", held by pid {process.name} ({(process / 'comm').read_text().strip()})"
    return ""


def _listening_inodes(port: int) -> set[str]:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read, in one step."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(text)
    scratch.replace(file)


def write_environment(home: Path, config: StackConfig) -> None:
    """Write `$COTRAIN_HOME/env`, from which every process of ours reads its settings."""
    ports, secret = config.ports, config.secrets
    values = {
        "STACK_ID": config.stack_id,
        "DATABASE_URL": f"postgresql://cotrain:{secret['database']}@127.0.0.1:{ports['postgres']}/cotrain",
        "S3_ENDPOINT": f"http://127.0.0.1:{ports['s3']}",
        "S3_ACCESS_KEY": secret["s3_access_key"],
        "S3_SECRET_KEY": secret["s3_secret_key"],
        "MLFLOW_URL": f"http://127.0.0.1:{ports['mlflow']}",
        "MLFLOW_PASSWORD": secret["mlflow"],
        "MLFLOW_CONSUMER_PASSWORD": secret["mlflow_consumer"],
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['prefect']}/api",
        "PREFECT_AUTH": f"cotrain:{secret['prefect']}",
        "PORTAL_URL": f"http://127.0.0.1:{ports['portal']}",
        "MODEL_SERVER_URL": f"http://127.0.0.1:{ports['model_server']}",
        "MODEL_SERVER_TOKEN": secret["model_server"],
        "OPERATOR_TOKEN": f"ct_{secret['operator']}",
        "SPLIT_SALT": secret["split_salt"],
    }
    write_private(home / "env", "".join(f"COTRAIN_{name}={value}\n" for name, value in values.items()))

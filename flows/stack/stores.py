"""The embedded stack's two stores: PostgreSQL and S3."""

import json
import signal
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from feedback.accounts import ensure_operator
from flows.stack.stack_config import WEED_PORT_NAMES, StackConfig, get_weed_socket, is_port_blocked
from infra.certificates import ensure_certificate
from infra.confinement import Confinement, build_confined_environment
from infra.database import make_session_factory, migrate_schema, open_engine
from infra.files import write_private
from infra.health import LivenessPolicy, check_answer
from infra.keeper import ManagedService
from infra.listeners import describe_user
from infra.object_store import open_object_store
from infra.postgres import Postgres
from infra.settings import Settings, StoreAccess

MLFLOW_BUCKET = "mlflow"
MIGRATIONS_FOLDER = Path(__file__).resolve().parents[2] / "feedback" / "migrations"


def make_postgres_service(config: StackConfig, settings: Settings, postgres: Postgres) -> ManagedService:
    def after() -> None:
        postgres.ensure_database("cotrain", config.secrets["database"])
        engine = open_engine(settings)
        migrate_schema(engine, MIGRATIONS_FOLDER)
        with make_session_factory(engine).begin() as session:
            ensure_operator(session, settings.operator_token.get_secret_value())
        engine.dispose()

    return ManagedService(
        name="postgres",
        command=postgres.command,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
        cwd=Path("/"),
        before=postgres.initialize,
        check=postgres.check,
        liveness=LivenessPolicy(postgres.check_answer),
        addresses=(postgres.address,),
        uids=(postgres.uid,),
        after=after,
        stop_signal=signal.SIGINT,
    )


# Of the store's heap, above which Go collects garbage more often; without it the heap may double with each collection.
STORE_HEAP_LIMIT = "1GiB"


def make_weed_service(home: Path, config: StackConfig, settings: Settings) -> ManagedService:
    weed = str(Path(sysconfig.get_path("scripts")) / "weed")
    data, work, configuration = home / "s3", home / "weed", home / "weed-settings"

    ports = tuple(config.ports[f"{name}{kind}"] for name in WEED_PORT_NAMES for kind in ("", "_grpc"))
    confinement = Confinement(
        read=(configuration,), write=(data, work), sockets=(Path("/tmp"),), bind=ports, connect=ports
    )
    environment = {**build_confined_environment(work), "GOMEMLIMIT": STORE_HEAP_LIMIT}

    def before() -> None:
        for folder in (data, work, configuration):
            folder.mkdir(exist_ok=True, mode=0o700)
        remove_weed_sockets(config)
        ensure_certificate(configuration / "tls.pem", "weed")
        write_private(configuration / "security.toml", format_weed_security(config, configuration / "tls.pem"))
        write_private(configuration / "identities.json", json.dumps(build_weed_identities(config, settings)))
        # A volume index damaged by a kill would hide its whole volume. Confined like the server, whose files it reads.
        command = confinement.command(weed, "-logtostderr=true", "fix", "-ignoreError", str(data))
        subprocess.run(command, env=environment, cwd=configuration, capture_output=True, check=True)

    flags = [f"-{name}.port={config.ports[name]}" for name in WEED_PORT_NAMES]
    flags += [f"-{name}.port.grpc={config.ports[f'{name}_grpc']}" for name in WEED_PORT_NAMES]
    flags += [f"-filer.localSocket={work}/filer.sock", f"-s3.localSocket={work}/s3.sock"]
    flags += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={configuration}/identities.json"]
    return ManagedService(
        name="s3",
        command=lambda: confinement.command(weed, "-logtostderr=true", "mini", f"-dir={data}", *flags),
        env=environment,
        cwd=configuration,  # where it looks for security.toml
        before=before,
        check=lambda: _ensure_buckets_work(config, settings),
        liveness=LivenessPolicy(lambda: check_answer(settings.s3_endpoint)),
        addresses=(settings.s3_endpoint,),
    )


def remove_weed_sockets(config: StackConfig) -> None:
    """Remove the sockets that weed always creates in /tmp and does not delete.

    Raises:
        PermissionError: if another user has put a file there since the keeper chose the ports.
    """
    for name in (f"{part}_grpc" for part in WEED_PORT_NAMES):
        port = config.ports[name]
        if is_port_blocked(name, port):
            entry = get_weed_socket(name, port)
            owner = describe_user(entry.lstat().st_uid)
            raise PermissionError(
                f"{entry}, where the store needs its socket, belongs to {owner}; remove it, or run `cotrain down` and "
                "`cotrain up`, which chooses another port"
            )
        get_weed_socket(name, port).unlink(missing_ok=True)


def format_weed_security(config: StackConfig, certificate: Path) -> str:
    """Format the store's security.toml, with which only its S3 interface accepts other clients, and only with keys.

    Without it, every user of this machine can read and delete objects at the filer, volume server and master.
    """
    jwt = zip(("signing", "signing.read", "filer_signing", "filer_signing.read"), range(1, 5), strict=True)
    lines = [f'[jwt.{name}]\nkey = "{config.secrets[f"weed_{n}"]}"\nexpires_after_seconds = 60' for name, n in jwt]
    pair = f'cert = "{certificate}"\nkey = "{certificate}"'
    lines.append(f'[grpc]\nca = "{certificate}"')
    lines += [f"[grpc.{part}]\n{pair}" for part in ("volume", "master", "filer", "s3", "admin", "worker", "client")]
    lines += [f'[https.{part}]\n{pair}\nca = "{certificate}"' for part in ("master", "volume", "filer", "admin")]
    lines.append(f'[https.client]\nenabled = true\n{pair}\nca = "{certificate}"')
    return "\n".join(lines) + "\n"


def build_weed_identities(config: StackConfig, settings: Settings) -> dict[str, Any]:
    """Build the store's accounts: the keeper's, which creates buckets, and one per bucket, limited to that bucket."""

    def identity(name: str, key: str, actions: list[str]) -> dict[str, Any]:
        pair = {"accessKey": config.secrets[f"{key}_access_key"], "secretKey": config.secrets[f"{key}_secret_key"]}
        return {"name": name, "credentials": [pair], "actions": actions}

    def user(name: str, key: str, bucket: str) -> dict[str, Any]:
        return identity(name, key, [f"{action}:{bucket}" for action in ("Read", "Write", "List", "Tagging")])

    keeper = identity("keeper", "s3_admin", ["Admin", "Read", "Write", "List", "Tagging"])
    return {
        "identities": [keeper, user("cotrain", "s3", settings.s3_bucket), user("mlflow", "mlflow_s3", MLFLOW_BUCKET)]
    }


def _ensure_buckets_work(config: StackConfig, settings: Settings) -> None:
    keeper = StoreAccess(
        s3_endpoint=settings.s3_endpoint,
        s3_access_key=config.secrets["s3_admin_access_key"],
        s3_secret_key=SecretStr(config.secrets["s3_admin_secret_key"]),
    )
    for bucket in (settings.s3_bucket, MLFLOW_BUCKET):
        store = open_object_store(keeper, bucket, attempts=1)
        store.ensure_bucket()
        store.check()

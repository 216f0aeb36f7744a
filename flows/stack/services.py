"""The services of the embedded stack, and the keeper's entry point."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from flows.duties import DISPATCHER_HEARTBEAT_FILE, WORKER_HEARTBEAT_FILE
from flows.stack.mlflow_service import make_mlflow_service
from flows.stack.stack_config import StackConfig, load_config, replace_blocked_ports, write_environment
from flows.stack.stores import make_postgres_service, make_weed_service, remove_weed_sockets
from flows.supervisor.pool_launcher import CLUSTER_CONFIG_VARIABLES, find_launcher_files, load_configured_pool
from infra.confinement import (
    SHARED_MEMORY_FOLDER,
    Confinement,
    build_confined_environment,
    find_accelerator_files,
    parse_port,
)
from infra.files import read_regular
from infra.health import LivenessPolicy, check_answer, check_health
from infra.keeper import Keeper, ManagedService
from infra.logs import configure_logging
from infra.postgres import Postgres
from infra.settings import (
    HOME_VARIABLE,
    DispatcherSettings,
    FlowSettings,
    ModelServerSettings,
    PortalSettings,
    PrefectAccess,
    Settings,
    WorkerSettings,
    get_home_folder,
    load_settings,
)
from infra.telemetry import NO_TELEMETRY_VARIABLES

log = logging.getLogger(__name__)

WORKER_HANG_TIMEOUT_S = 120.0
DISPATCHER_READY_TIMEOUT_S, DISPATCHER_HANG_TIMEOUT_S = 30.0, 300.0  # heartbeat age for not ready, and for a restart


def make_services(home: Path, config: StackConfig, settings: Settings) -> list[ManagedService]:
    """Describe the services of the embedded stack, in start order."""
    postgres = Postgres(
        home / "pg",
        config.ports["postgres"],
        config.secrets["postgres"],
        config.durable,
        tuple(config.retired.get("postgres", ())),
    )
    return [
        make_postgres_service(config, settings, postgres),
        make_weed_service(home, config, settings),
        make_mlflow_service(home, config, settings, postgres),
        _make_prefect_service(home, config, settings, postgres),
        _make_portal_service(home, settings),
        _make_model_server_service(home, settings),
        _make_dispatcher_service(home, settings),
        _make_worker_service(home, settings),
    ]


def build_prefect_environment(folder: Path, settings: PrefectAccess) -> dict[str, str]:
    """Build the environment of a process that uses Prefect's client, which keeps its files in the given folder."""
    return {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": settings.prefect_api_url,
        "PREFECT_API_AUTH_STRING": settings.prefect_auth.get_secret_value(),
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
        "PREFECT_CLIENT_MAX_RETRIES": "10",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,feedback,yuan,infra",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # the dispatcher uses the same code outside of runs
    }


def build_service_environment(home: Path, folder: Path) -> dict[str, str]:
    """Build the environment of one of our processes, which reads its settings from the home folder."""
    return build_confined_environment(folder, **NO_TELEMETRY_VARIABLES, **{HOME_VARIABLE: str(home)})


def _make_prefect_service(home: Path, config: StackConfig, settings: Settings, postgres: Postgres) -> ManagedService:
    # asyncpg has no require_auth option; infra/scram_only.py replaces it.
    url = postgres.url("prefect", "prefect", config.secrets["prefect_database"]).partition("?")[0]
    work, port = home / "prefect", config.ports["prefect"]
    env = build_confined_environment(work, **NO_TELEMETRY_VARIABLES) | {
        "PREFECT_HOME": str(work),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": url.replace("postgresql:", "postgresql+asyncpg:"),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_API_AUTH_STRING": settings.prefect_auth.get_secret_value(),
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(work / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "COTRAIN_PORTAL_URL": settings.portal_url,
    }

    def before() -> None:
        make_private_folders(work)
        postgres.ensure_database("prefect", config.secrets["prefect_database"])

    confinement = Confinement(write=(work,), connect=(port, config.ports["postgres"]), is_server=True)
    return ManagedService(
        name="prefect",
        command=lambda: confinement.command(sys.executable, "-m", "flows.prefect_gate"),
        env=env,
        cwd=work,
        before=before,
        check=lambda: _check_url(f"{settings.prefect_api_url}/ready"),
        liveness=LivenessPolicy(lambda: check_answer(f"{settings.prefect_api_url}/health")),
        listen=settings.prefect_api_url,
        needs=("postgres",),
    )


def _check_url(url: str, token: str | None = None) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    httpx.get(url, headers=headers, timeout=3).raise_for_status()


def make_private_folders(*folders: Path) -> None:
    """Make folders that only their owner can access."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def _make_own_service(
    home: Path,
    name: str,
    module: str,
    confinement: Confinement,
    check: Callable[[], None],
    needs: tuple[str, ...],
    env: dict[str, str] | None = None,
    before: Callable[[], None] = lambda: None,
    liveness: LivenessPolicy | None = None,
    listen: str | None = None,
) -> ManagedService:
    """Describe a service of our own code, with a working folder of the same name."""
    work = home / name

    def prepare() -> None:
        make_private_folders(work)
        before()

    return ManagedService(
        name=name,
        command=lambda: confinement.command(sys.executable, "-m", module),
        env={**build_service_environment(home, work), **(env or {})},
        cwd=work,
        before=prepare,
        check=check,
        needs=needs,
        liveness=liveness,
        listen=listen,
    )


def _make_portal_service(home: Path, settings: Settings) -> ManagedService:
    stores = (settings.database_url.get_secret_value(), settings.s3_endpoint, settings.model_server_url)
    confinement = Confinement(
        read=tuple(home / name for name in PortalSettings.files),
        write=(home / "portal",),
        connect=tuple(map(parse_port, stores)),
        is_server=True,
    )

    def check() -> None:
        _check_url(f"{settings.portal_url}/health")

    liveness = LivenessPolicy(
        lambda: check_answer(f"{settings.portal_url}/health")
    )  # a HEAD request does not query the database
    needs = ("postgres", "s3")
    return _make_own_service(
        home, "portal", "feedback.run", confinement, check, needs, liveness=liveness, listen=settings.portal_url
    )


def _make_model_server_service(home: Path, settings: Settings) -> ManagedService:
    cache = home / "serve"
    confinement = Confinement(
        read=tuple(home / name for name in ModelServerSettings.files),
        write=(home / "model-server", cache, *find_accelerator_files()),
        # MLflow's client fetches large files directly from the store, by presigned URLs.
        connect=(parse_port(settings.mlflow_url), parse_port(settings.s3_endpoint)),
        is_server=True,
    )

    def check() -> None:
        _check_url(f"{settings.model_server_url}/v1/models", settings.model_server_token.get_secret_value())

    liveness = LivenessPolicy(lambda: check_health(f"{settings.model_server_url}/health"))
    return _make_own_service(
        home,
        "model-server",
        "yuan.serve.run",
        confinement,
        check,
        ("mlflow",),
        before=lambda: make_private_folders(cache),
        liveness=liveness,
        listen=settings.model_server_url,
    )


def _make_dispatcher_service(home: Path, settings: Settings) -> ManagedService:
    work = home / "dispatcher"
    sign, pool = home / DISPATCHER_HEARTBEAT_FILE, find_pool_files(settings)
    servers = (settings.database_url.get_secret_value(), settings.mlflow_url, settings.prefect_api_url)
    confinement = Confinement(
        read=(*(home / name for name in DispatcherSettings.files), *pool),
        write=(work,),
        connect=None if pool else tuple(map(parse_port, servers)),
        scope_signals=False,  # it kills processes that exited flows left behind
    )

    def check() -> None:
        age = time.time() - float(json.loads(read_regular(sign))["time"])
        if age > DISPATCHER_READY_TIMEOUT_S:
            raise TimeoutError(f"no heartbeat for {age:.0f} s")

    def check_life() -> None:
        age = time.time() - sign.stat().st_mtime
        if age > DISPATCHER_HANG_TIMEOUT_S:
            raise TimeoutError(f"no heartbeat for {age:.0f} s")

    def before() -> None:
        sign.unlink(missing_ok=True)

    return _make_own_service(
        home,
        "dispatcher",
        "flows.dispatcher",
        confinement,
        check,
        ("prefect", "mlflow"),
        env={**build_prefect_environment(work, settings), **build_cluster_environment()},
        before=before,
        liveness=LivenessPolicy(check_life),
    )


def _make_worker_service(home: Path, settings: Settings) -> ManagedService:
    work, flow_log = home / "worker", home / "logs" / "flows.log"
    folders = tuple(home / name for name in ("runs", "eval", "work"))
    sign = home / WORKER_HEARTBEAT_FILE

    def check_life() -> None:
        age = time.time() - sign.stat().st_mtime
        if age > WORKER_HANG_TIMEOUT_S:
            raise TimeoutError(f"no heartbeat for {age:.0f} s")

    def check() -> None:
        user, _, password = settings.prefect_auth.get_secret_value().partition(":")
        url = f"{settings.prefect_api_url}/work_pools/cotrain/workers/filter"
        answer = httpx.post(url, json={}, auth=(user, password), timeout=3).raise_for_status()
        if not any(worker["status"] == "ONLINE" for worker in answer.json()):
            raise ConnectionError("no worker is online")

    def before() -> None:
        make_private_folders(work, *folders, flow_log.parent)
        flow_log.touch(0o600)
        sign.unlink(missing_ok=True)

    confinement = Confinement(
        read=(*(home / name for name in (*WorkerSettings.files, *FlowSettings.files)), *find_pool_files(settings)),
        write=(work, *folders, flow_log, Path(SHARED_MEMORY_FOLDER), *find_accelerator_files()),
        connect=None,  # ranks connect on ports that the system chooses
    )
    return ManagedService(
        name="worker",
        command=lambda: confinement.command(sys.executable, "-m", "flows.dispatcher.worker"),
        env={
            **build_service_environment(home, work),
            **build_prefect_environment(work, settings),
            **build_cluster_environment(),
            "PREFECT_WORKER_QUERY_SECONDS": "0.5",
        },
        cwd=work,
        before=before,
        check=check,
        liveness=LivenessPolicy(check_life),
        needs=("prefect",),
    )


def find_pool_files(settings: Settings) -> tuple[Path, ...]:
    """Return the pool's file and the files that its launcher reads; none for the default local pool."""
    if not settings.pool:
        return ()
    file = Path(settings.pool.rpartition(":")[0] or settings.pool).resolve()
    try:
        return (file, *find_launcher_files(load_configured_pool(settings).launcher))
    except (ValueError, OSError):  # reported when a round is planned
        return (file,)


def build_cluster_environment() -> dict[str, str]:
    """Build the variables by which clients of batch systems find their configuration."""
    kubeconfig = Path.home() / ".kube" / "config"  # named explicitly, since services have another home folder
    default = {"KUBECONFIG": str(kubeconfig)} if kubeconfig.exists() else {}
    return default | {name: os.environ[name] for name in CLUSTER_CONFIG_VARIABLES if name in os.environ}


def main() -> None:
    """Run the keeper on `$COTRAIN_HOME`: `python -m flows.stack`."""
    configure_logging()
    home = get_home_folder()
    config = replace_blocked_ports(home, load_config(home))
    (home / "logs").mkdir(exist_ok=True, mode=0o700)
    write_environment(home, config)
    settings = load_settings(Settings)
    try:
        Keeper(make_services(home, config, settings), home, config.stack_id).run()
    finally:
        with contextlib.suppress(PermissionError):
            remove_weed_sockets(config)

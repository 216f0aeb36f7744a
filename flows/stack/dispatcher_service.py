"""The embedded stack's dispatcher."""

from pathlib import Path

from flows.duties import DISPATCHER_HEARTBEAT_FILE, SERVICE_HEARTBEAT_TIMEOUT_S
from flows.recipe_files import CUSTOM_RECIPES_FOLDER
from flows.stack.platform_service import check_heartbeat_file, make_platform_service, make_private_folders
from flows.stack.pool_files import build_cluster_environment, find_pool_files
from flows.stack.prefect_service import build_prefect_environment
from infra.confinement import Confinement, parse_port
from infra.health import LivenessPolicy
from infra.keeper import ManagedService
from infra.settings import DispatcherSettings, Settings
from infra.version_cache import VERSIONS_FOLDER

DISPATCHER_HANG_TIMEOUT_S = 300.0  # heartbeat age for a restart


def make_dispatcher_service(home: Path, settings: Settings) -> ManagedService:
    """Describe the dispatcher, which connects to all other servers, the batch system included."""
    work, heartbeat_file = home / "dispatcher", home / DISPATCHER_HEARTBEAT_FILE
    pool_files = find_pool_files(settings)
    database_url, cache = settings.database_url.get_secret_value(), home / VERSIONS_FOLDER
    servers = (
        database_url,
        settings.s3_endpoint,
        settings.mlflow_url,
        settings.prefect_api_url,
        settings.model_server_url,
    )

    def before() -> None:
        make_private_folders(cache)
        heartbeat_file.unlink(missing_ok=True)

    return make_platform_service(
        home,
        name="dispatcher",
        module="flows.dispatcher",
        confinement=Confinement(
            read=(*(home / name for name in DispatcherSettings.files), home / CUSTOM_RECIPES_FOLDER, *pool_files),
            write=(work, cache),
            connect=None if pool_files else tuple(map(parse_port, servers)),
            scope_signals=False,  # it kills processes that exited flows left behind
        ),
        env={**build_prefect_environment(work, settings), **build_cluster_environment()},
        before=before,
        check=lambda: check_heartbeat_file(heartbeat_file, SERVICE_HEARTBEAT_TIMEOUT_S),
        liveness=LivenessPolicy(lambda: check_heartbeat_file(heartbeat_file, DISPATCHER_HANG_TIMEOUT_S)),
        needs=("prefect", "mlflow"),
    )

"""The embedded stack's worker, which runs the flows."""

from pathlib import Path

from flows.allowed_flows import WORK_POOL_NAME
from flows.duties import WORKER_HEARTBEAT_FILE
from flows.recipe_files import CUSTOM_RECIPES_FOLDER
from flows.stack.platform_service import check_heartbeat_file, make_platform_service, make_private_folders
from flows.stack.pool_files import build_cluster_environment, find_pool_files
from flows.stack.prefect_api import has_online_worker, open_prefect_client
from flows.stack.prefect_service import build_prefect_environment
from infra.confinement import SHARED_MEMORY_FOLDER, Confinement
from infra.health import LivenessPolicy
from infra.keeper import ManagedService
from infra.settings import FlowSettings, PrefectAccess, Settings, WorkerSettings

READINESS_TIMEOUT_S = 3.0
WORKER_NICENESS = 10  # people wait for the portal and the model server, and for no flow
WORKER_HANG_TIMEOUT_S = 120.0  # heartbeat age for a restart


def make_worker_service(home: Path, settings: Settings) -> ManagedService:
    """Describe the worker, whose flows write the run folders, and may connect to every address."""
    work, flow_log = home / "worker", home / "logs" / "flows.log"
    folders = tuple(home / name for name in ("runs", "eval", "work", "cache"))
    heartbeat_file = home / WORKER_HEARTBEAT_FILE

    def before() -> None:
        make_private_folders(*folders, flow_log.parent)
        flow_log.touch(0o600)
        heartbeat_file.unlink(missing_ok=True)

    return make_platform_service(
        home,
        name="worker",
        module="flows.dispatcher.worker",
        confinement=Confinement(
            read=(
                *(home / name for name in (*WorkerSettings.files, *FlowSettings.files)),
                home / CUSTOM_RECIPES_FOLDER,
                *find_pool_files(settings),
            ),
            write=(work, *folders, flow_log, Path(SHARED_MEMORY_FOLDER)),
            accelerators="descendants",
            connect=None,  # ranks connect on ports that the system chooses
            niceness=WORKER_NICENESS,
        ),
        env={
            **build_prefect_environment(work, settings),
            **build_cluster_environment(),
            "PREFECT_WORKER_QUERY_SECONDS": "0.5",
        },
        before=before,
        check=lambda: check_worker_is_online(settings),
        liveness=LivenessPolicy(lambda: check_heartbeat_file(heartbeat_file, WORKER_HANG_TIMEOUT_S)),
        needs=("prefect",),
    )


def check_worker_is_online(settings: PrefectAccess) -> None:
    """Raise unless Prefect counts a worker of the work pool as online.

    Raises:
        ConnectionError: if none is online.
        httpx.HTTPError: if Prefect does not answer.
    """
    with open_prefect_client(settings, READINESS_TIMEOUT_S) as http:
        if not has_online_worker(http):
            raise ConnectionError(f"no worker of the work pool {WORK_POOL_NAME} is online; see `cotrain logs worker`")

"""The embedded stack's model server."""

import shutil
from pathlib import Path

from flows.stack.platform_service import check_url, make_platform_service, make_private_folders
from flows.supervisor.pool_launcher import load_configured_pool
from infra.confinement import Confinement, parse_port
from infra.folder_cache import FILL_SUFFIX
from infra.health import LivenessPolicy, check_health
from infra.keeper import ManagedService
from infra.settings import ModelServerSettings, PoolSettings, Settings
from infra.version_cache import FORMER_CACHE_FOLDERS, VERSIONS_FOLDER


def make_model_server_service(home: Path, settings: Settings) -> ManagedService:
    """Describe the model server, which reads versions in the cache that the dispatcher and the flows fill.

    It sees no device. On a pool that shares devices with it, it gets them with a lease; see `yuan.serve.run`.
    """
    cache = home / VERSIONS_FOLDER
    token = settings.model_server_token.get_secret_value()
    return make_platform_service(
        home,
        name="model-server",
        module="yuan.serve.run",
        confinement=Confinement(
            read=(*(home / name for name in ModelServerSettings.files), cache),
            write=(home / "model-server",),
            connect=(parse_port(settings.mlflow_url),),
            is_server=True,
            accelerators="process" if has_leased_devices(settings) else "none",
        ),
        env={"COTRAIN_SERVING_DEVICES": "leased" if has_leased_devices(settings) else "host"},
        before=lambda: move_former_caches(home),
        check=lambda: check_url(f"{settings.model_server_url}/v1/models", token),
        liveness=LivenessPolicy(lambda: check_health(f"{settings.model_server_url}/health")),
        needs=("mlflow",),
        listen=settings.model_server_url,
    )


def has_leased_devices(settings: PoolSettings) -> bool:
    """Return True if the model server computes on leased devices of the pool; False if the pool is not valid."""
    try:
        return load_configured_pool(settings).uses_devices_for_serving
    except (ValueError, OSError):  # reported when a round is planned, and by `doctor`
        return False


def move_former_caches(home: Path) -> None:
    """Make the cache's folder, and remove the caches of version 0.3, each of one kind of process.

    Versions that the model server has served become interrupted fills of the cache, so that what is whole of them is
    not fetched again.
    """
    cache = home / VERSIONS_FOLDER
    make_private_folders(cache)
    for version in (home / "serve").glob("v*"):
        fill = cache / f".{version.name}{FILL_SUFFIX}"
        has_links = version.is_symlink() or any(path.is_symlink() for path in version.rglob("*"))
        if not has_links and not fill.exists() and not (cache / version.name).exists():
            version.rename(fill)
    for name in FORMER_CACHE_FOLDERS:
        shutil.rmtree(home / name, ignore_errors=True)

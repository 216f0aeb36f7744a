"""The files and variables by which services reach the pool's devices."""

import os
from pathlib import Path

from flows.supervisor.pool_launcher import CLUSTER_CONFIG_VARIABLES, find_launcher_files, load_configured_pool
from infra.settings import PoolSettings


def find_pool_files(settings: PoolSettings) -> tuple[Path, ...]:
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

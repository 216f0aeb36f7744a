"""The configured pool, the launcher that its file selects, and the sizes that a plan on it may choose."""

import os
from pathlib import Path
from typing import Any, Literal

from infra.gpus import list_gpu_models
from infra.launchers.job import Launcher
from infra.launchers.local import LocalLauncher
from infra.launchers.slurm import SlurmLauncher, SlurmOptions
from infra.machine import has_fast_bf16
from infra.settings import PoolSettings
from yuan.config import Precision
from yuan.plan.pool import CPU_POOL_NAME, Pool, is_fast_at_bf16
from yuan.plan.pool_file import load_pool, make_local_pool
from yuan.plan.search import SizeLimits

CLUSTER_CONFIG_VARIABLES = ("SLURM_CONF", "KUBECONFIG")  # name the configuration files of batch systems' clients


def make_launchers(settings: PoolSettings) -> dict[str, Launcher]:
    """Make the launchers of this installation's pools, keyed by the pool's name."""
    pool = load_configured_pool(settings)
    return {pool.name: make_launcher(pool)}


def load_configured_pool(settings: PoolSettings) -> Pool:
    """Load the pool that runs are planned for: the file named in the settings, else the devices of this machine.

    Raises:
        ValueError: if the file is invalid; the message names the place.
    """
    return load_pool(settings.pool) if settings.pool else make_local_pool(list_gpu_models())


def make_launcher(pool: Pool) -> Launcher:
    """Make the launcher that starts processes on a pool.

    Raises:
        ValueError: if [pool.launch] has a key that its launcher does not know, or lacks a required one.
        OSError: if the launcher's library is not installed.
    """
    options: dict[str, Any] = dict(pool.launch)
    try:
        if pool.launcher == "slurm":
            return SlurmLauncher(SlurmOptions(**options))
        if pool.launcher == "kubernetes":
            return _make_kubernetes_launcher(options)
    except TypeError as error:
        raise ValueError(
            f"[pool.launch] of pool {pool.name!r} for {pool.launcher}: {error}; correct the pool file"
        ) from None
    if options:
        raise ValueError(
            f"[pool.launch] of pool {pool.name!r}: a local launcher takes no options, got {options}; remove them"
        )
    return LocalLauncher(confined=True)


def _make_kubernetes_launcher(options: dict[str, Any]) -> Launcher:
    """Make a launcher with the credentials of the pod that this process runs in, else of the user's kubeconfig."""
    try:
        from kubernetes import client, config
    except ImportError:
        raise OSError("the kubernetes client is not installed; install cotrain[kubernetes]") from None
    from infra.launchers.kubernetes import KubernetesLauncher, KubernetesOptions

    launcher_options = KubernetesOptions(**options)
    try:
        config.load_incluster_config()
    except config.ConfigException:
        config.load_kube_config()
    return KubernetesLauncher(launcher_options, client.ApiClient())


def find_launcher_files(launcher: str) -> tuple[Path, ...]:
    """Return the files that a batch system's client reads on this machine."""
    if launcher == "slurm":
        config_file = os.environ.get("SLURM_CONF")
        config_folders = [Path(config_file).parent] if config_file else []
        return (Path("/etc/slurm"), Path("/etc/slurm-llnl"), *config_folders)
    if launcher == "kubernetes":
        config_file = os.environ.get("KUBECONFIG")
        config_path = Path(config_file) if config_file else Path.home() / ".kube"
        return (Path("/var/run/secrets/kubernetes.io"), config_path)
    return ()


def make_plan_limits(pool: Pool, micro_batch_size: int | None) -> SizeLimits:
    """Fix one stage per process on the default local pool; on other pools the planner chooses the grid.

    Args:
        micro_batch_size: the fixed size; None for the planner's choice.
    """
    stages = pool.num_devices if pool.name == CPU_POOL_NAME else None
    return SizeLimits(pipeline_size=stages, micro_batch_size=micro_batch_size)


def choose_precision(requested: Literal["auto", "bf16", "fp32"], pool: Pool) -> Precision:
    """Return the precision of a run on a pool: of "auto", bf16 if every device class of the pool is fast at it.

    The processor of this machine counts only for the default pool, which consists of processes on it.
    """
    if requested != "auto":
        return requested
    is_fast = has_fast_bf16() if pool.name == CPU_POOL_NAME else all(map(is_fast_at_bf16, pool.groups))
    return "bf16" if is_fast else "fp32"

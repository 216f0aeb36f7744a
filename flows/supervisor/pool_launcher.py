"""The pool that runs are planned for, its launcher by what its file says, and what a plan on it may choose."""

import os
from pathlib import Path
from typing import Any

from infra.launchers.job import Launcher
from infra.launchers.local import LocalLauncher
from infra.launchers.slurm import SlurmLauncher, SlurmOptions
from infra.settings import PoolSettings
from yuan.config import Recipe
from yuan.plan.pool import CPU_POOL_NAME, Pool, load_pool, make_cpu_pool
from yuan.plan.search import SizeLimits

CLUSTER_CONFIG_VARIABLES = ("SLURM_CONF", "KUBECONFIG")  # by which clients of batch systems find their configuration


def make_launchers(settings: PoolSettings) -> dict[str, Launcher]:
    """The launchers of this installation's pools, by the pool's name."""
    pool = load_configured_pool(settings)
    return {pool.name: make_launcher(pool)}


def load_configured_pool(settings: PoolSettings) -> Pool:
    """The pool that runs are planned for: the file that the settings name, else two processes of this machine.

    Raises:
        ValueError: if the file is wrong; the message says where.
    """
    return load_pool(settings.pool) if settings.pool else make_cpu_pool()


def make_launcher(pool: Pool) -> Launcher:
    """What starts processes on a pool.

    Raises:
        ValueError: if [pool.launch] has a key that its launcher does not know, or lacks one.
        OSError: if the launcher's library is not installed.
    """
    options: dict[str, Any] = dict(pool.launch)
    try:
        if pool.launcher == "slurm":
            return SlurmLauncher(SlurmOptions(**options))
        if pool.launcher == "kubernetes":
            return _make_kubernetes_launcher(options)
    except TypeError as error:
        raise ValueError(f"[pool.launch] of pool {pool.name!r} for {pool.launcher}: {error}") from None
    if options:
        raise ValueError(
            f"[pool.launch] of pool {pool.name!r}: processes of this machine take no options, got {options}"
        )
    return LocalLauncher(confined=True)


def _make_kubernetes_launcher(options: dict[str, Any]) -> Launcher:
    """With the credentials of the pod that this runs in, or else of the user's kubeconfig."""
    try:
        from kubernetes import client, config
    except ImportError:
        raise OSError("the kubernetes client is not installed; install cotrain[kubernetes]") from None
    from infra.launchers.kubernetes import KubernetesLauncher, KubernetesOptions

    wanted = KubernetesOptions(**options)
    try:
        config.load_incluster_config()
    except config.ConfigException:
        config.load_kube_config()
    return KubernetesLauncher(wanted, client.ApiClient())


def find_launcher_files(launcher: str) -> tuple[Path, ...]:
    """Return the files that a batch system's client reads on this machine."""
    if launcher == "slurm":
        own = os.environ.get("SLURM_CONF")
        return (Path("/etc/slurm"), Path("/etc/slurm-llnl"), *([Path(own).parent] if own else []))
    if launcher == "kubernetes":
        own = os.environ.get("KUBECONFIG")
        return (Path("/var/run/secrets/kubernetes.io"), Path(own) if own else Path.home() / ".kube")
    return ()


def make_plan_limits(pool: Pool, recipe: Recipe) -> SizeLimits:
    """On this machine's own pool every process is a stage; elsewhere the planner chooses the grid."""
    stages = pool.num_devices if pool.name == CPU_POOL_NAME else None
    return SizeLimits(pipeline_size=stages, micro_batch_size=recipe.micro_batch_size)

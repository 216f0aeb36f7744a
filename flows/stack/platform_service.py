"""Describe a service of the stack that runs code of this platform, and check it."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from infra.confinement import Confinement, build_confined_environment
from infra.health import LivenessPolicy
from infra.keeper import ManagedService, do_nothing
from infra.settings import HOME_VARIABLE
from infra.telemetry import NO_TELEMETRY_VARIABLES


def make_platform_service(
    home: Path,
    *,
    name: str,
    module: str,
    confinement: Confinement,
    check: Callable[[], None],
    liveness: LivenessPolicy,
    needs: tuple[str, ...],
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] = do_nothing,
    listen: str | None = None,
) -> ManagedService:
    """Describe a service that runs a module of this platform, with a working folder of the service's name.

    Args:
        module: run with `python -m`.
        env: variables in addition to those of every process of the platform.
        before, check, liveness, needs, listen: as in `ManagedService`.
    """
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


def build_service_environment(home: Path, folder: Path) -> dict[str, str]:
    """Build the environment of one of our processes, which reads its settings from the home folder."""
    return build_confined_environment(folder, **NO_TELEMETRY_VARIABLES, **{HOME_VARIABLE: str(home)})


def make_private_folders(*folders: Path) -> None:
    """Make folders that only their owner can access."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def check_url(url: str, token: str | None = None) -> None:
    """Raise unless a GET request of the URL, with the token if there is one, succeeds."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    httpx.get(url, headers=headers, timeout=3).raise_for_status()


def check_heartbeat_file(file: Path, timeout_s: float) -> None:
    """Raise unless the modification time of a heartbeat file is at most `timeout_s` ago.

    Raises:
        TimeoutError: if it is older.
        OSError: if there is no file.
    """
    age_s = time.time() - file.stat().st_mtime
    if age_s > timeout_s:
        raise TimeoutError(f"no heartbeat for {age_s:.0f} s, allowed are {timeout_s:.0f} s; see the service's log")

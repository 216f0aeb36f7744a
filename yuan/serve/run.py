"""Entry point of the model server: `python -m yuan.serve.run [ALIAS]`. It serves an alias's version and its updates.

It accepts connections once the version is loaded, or after 30 s; until the version is loaded, calls get an error. On
leased devices it serves only while it has a lease, and executes itself again when it gains or loses one.
"""

import fcntl
import logging
import os
import sys
import threading
from pathlib import Path

import torch
import uvicorn

from infra.http_server import choose_listen_options, make_server_options
from infra.launchers.job import make_job_name
from infra.launchers.local import JOB_VARIABLE
from infra.logs import configure_logging
from infra.machine import measure_available_memory_gib
from infra.processes import get_own_identity
from infra.settings import ModelServerSettings, load_settings
from infra.tracker import Tracker
from infra.version_cache import VersionCache, VersionNotCached
from yuan.device_faults import BUS_ORDER_VARIABLES, VISIBLE_DEVICES_VARIABLE
from yuan.generate.cache_slots import CacheBudget
from yuan.generate.placement import ModelPlacement
from yuan.model.accelerator import AcceleratorsMissing, check_accelerators
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, parse_digests
from yuan.serve.api import make_api
from yuan.serve.device_holder import DeviceHolder
from yuan.serve.follower import AliasFollower, LastVersion, OpenedVersion, VersionNotReady
from yuan.serve.grants import DeviceGrant
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.service import ModelService

log = logging.getLogger(__name__)

# Part of the 90 s in which the keeper expects a response; a model that takes longer continues to load meanwhile.
FIRST_LOAD_WAIT_S = 30.0
# Longer than the portal's, so that the portal never sends a request on a connection that the server is closing.
MODEL_SERVER_KEEP_ALIVE_S = 60
STOP_TIMEOUT_S = 5  # for connections that are still open when the process image is replaced
DEFAULT_ALIAS = "champion"
DEFAULT_CACHE_SHARE = 0.25  # of the memory that is available at the start; the weights are not loaded yet
LAST_VERSION_FILE = "model-server/last.json"  # below the home folder
GRANT_VARIABLE = "COTRAIN_DEVICE_GRANT"  # of a process image that was started for a grant
FIRST_INHERITED_DESCRIPTOR = 3


class ModelServer:
    """The server of one process image, which ends for a signal or for another grant of devices."""

    def __init__(self, settings: ModelServerSettings, alias: str) -> None:
        self._settings = settings
        self._alias = alias
        self._server: uvicorn.Server | None = None
        self.next_grant: DeviceGrant | None = None

    def run(self) -> None:
        """Serve until a stop signal arrives, or `next_grant` is set for the next process image."""
        settings, grant = self._settings, read_own_grant()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))  # one core is for HTTP
        cache_bytes = self._limit_cache(grant.cache_bytes)
        budget = CacheBudget(cache_bytes)
        service = ModelService(ModelServerMetrics(), budget)
        holder = None
        if settings.serving_devices == "leased":
            holder = DeviceHolder(service, get_own_identity(), grant, self._restart, self._limit_cache)
            threading.Thread(target=holder.watch, daemon=True, name="devices").start()
        if holder is not None and grant.lease_id is None:
            service.explain_absence(grant.message, grant.retry_after_s)
        elif (problem := find_device_problem(grant)) is not None:
            log.error("%s", problem)
            service.problem = problem
            service.explain_absence("the devices for serving do not work; tell the operator", None)
        else:
            log.info("the decoding cache has %.1f GiB", cache_bytes / 2**30)
            self._follow_alias(service, budget)

        app = make_api(settings.model_server_token.get_secret_value(), service, holder)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_keep_alive=MODEL_SERVER_KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_TIMEOUT_S if holder else None,
            **choose_listen_options(settings.model_server_url),
            **make_server_options(),
        )
        self._server = uvicorn.Server(config)
        if self.next_grant is None:
            self._server.run()

    def _limit_cache(self, granted_bytes: int) -> int:
        """Return the budget of the decoding cache: that of the grant, the operator's, or the smaller of the two."""
        own_bytes = int(self._settings.serving_cache_gib * 2**30)
        limits = [limit for limit in (own_bytes, granted_bytes) if limit]
        return min(limits) if limits else int(DEFAULT_CACHE_SHARE * measure_available_memory_gib() * 2**30)

    def _follow_alias(self, service: ModelService, budget: CacheBudget) -> None:
        settings, tracker = self._settings, Tracker(self._settings)
        versions = VersionCache(settings.home, settings.max_cache_bytes, tracker, MODEL_MANIFEST_FILE, parse_digests)

        def open_version(version: int) -> OpenedVersion:
            try:
                return versions.open(version)
            except VersionNotCached as error:  # in the stack, the dispatcher fetches it
                raise VersionNotReady(str(error)) from None

        placement = ModelPlacement(budget, lambda: int(measure_available_memory_gib() * 2**30))
        last_version = LastVersion(settings.home / LAST_VERSION_FILE)
        follower = AliasFollower(tracker.read_aliases, self._alias, open_version, last_version, service, placement)
        threading.Thread(target=follower.follow, daemon=True, name="follower").start()
        # The keeper's socket queues connections meanwhile, so none is refused while a version is loaded.
        follower.ready.wait(FIRST_LOAD_WAIT_S)

    def _restart(self, grant: DeviceGrant) -> None:
        self.next_grant = grant
        if self._server is not None:
            self._server.should_exit = True


def find_device_problem(grant: DeviceGrant) -> str | None:
    """Describe why this process cannot compute on the devices of its grant; None if it can."""
    try:
        check_accelerators(len(grant.devices) if grant.are_accelerators else 0)
    except AcceleratorsMissing as error:
        return str(error)
    return None


def read_own_grant() -> DeviceGrant:
    """Return the grant with which this process image was started; one without devices if there is none."""
    text = os.environ.get(GRANT_VARIABLE)
    return DeviceGrant.model_validate_json(text) if text else DeviceGrant()


def execute_again(grant: DeviceGrant) -> None:
    """Replace this process image by one with the devices of a grant, with the same pid and standard streams.

    The lease's job is named in environment and arguments, by which `infra.launchers.local` finds its processes.
    """
    environment, arguments = dict(os.environ), [text for text in sys.orig_argv if not is_job_mark(text)]
    environment |= {VISIBLE_DEVICES_VARIABLE: ",".join(map(str, grant.devices)), **BUS_ORDER_VARIABLES}
    environment[GRANT_VARIABLE] = grant.model_dump_json()
    environment.pop(JOB_VARIABLE, None)
    if grant.lease_id is not None:
        environment[JOB_VARIABLE] = make_job_name(grant.lease_id)
        arguments.append(f"{JOB_VARIABLE}={environment[JOB_VARIABLE]}")
    # The driver of an accelerator frees memory when its files are closed.
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) >= FIRST_INHERITED_DESCRIPTOR:
            try:
                fcntl.fcntl(int(entry.name), fcntl.F_SETFD, fcntl.FD_CLOEXEC)
            except OSError:  # closed meanwhile, as the one of this loop
                continue
    log.info("starting again %s", f"with lease {grant.lease_id}" if grant.lease_id else "without devices")
    logging.shutdown()
    os.execve(sys.executable, [sys.executable, *arguments[1:]], environment)


def is_job_mark(argument: str) -> bool:
    return argument.startswith(f"{JOB_VARIABLE}=")


def run_model_server(settings: ModelServerSettings, alias: str = DEFAULT_ALIAS) -> None:
    """Serve the version of an alias, and the versions that it is moved to, until a stop signal arrives."""
    configure_logging()
    # A process without a lease sees no device.
    os.environ[VISIBLE_DEVICES_VARIABLE] = ",".join(map(str, read_own_grant().devices))
    server = ModelServer(settings, alias)
    server.run()
    if server.next_grant is not None:
        execute_again(server.next_grant)


def main() -> None:
    run_model_server(load_settings(ModelServerSettings), *[text for text in sys.argv[1:2] if not is_job_mark(text)])


if __name__ == "__main__":
    main()

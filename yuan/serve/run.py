"""Entry point of the model server: `python -m yuan.serve.run [ALIAS]`. It serves an alias's version and its updates.

It accepts connections once the version is loaded, or after 30 s; until the version is loaded, calls get an error.
"""

import logging
import os
import sys
import threading

import torch
import uvicorn

from infra.http_server import choose_listen_options, make_server_options
from infra.logs import configure_logging
from infra.machine import measure_available_memory_gib
from infra.settings import ModelServerSettings, load_settings
from infra.tracker import Tracker
from infra.version_cache import VersionCache, VersionNotCached
from yuan.generate.cache_slots import CacheBudget
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, parse_digests
from yuan.serve.api import make_api
from yuan.serve.follower import AliasFollower, LastVersion, OpenedVersion, VersionNotReady
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.service import ModelService

log = logging.getLogger(__name__)

# Part of the 90 s in which the keeper expects a response; a model that takes longer continues to load meanwhile.
FIRST_LOAD_WAIT_S = 30.0
# Longer than the portal's, so that the portal never sends a request on a connection that the server is closing.
MODEL_SERVER_KEEP_ALIVE_S = 60
DEFAULT_ALIAS = "champion"
DEFAULT_CACHE_SHARE = 0.25  # of the memory that is available at the start; the weights are not loaded yet
LAST_VERSION_FILE = "model-server/last.json"  # below the home folder


def run_model_server(settings: ModelServerSettings, alias: str = DEFAULT_ALIAS) -> None:
    """Serve the version of an alias, and the versions that it is moved to, until a stop signal arrives."""
    configure_logging()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))  # one core is for HTTP
    tracker = Tracker(settings)
    cache_gib = settings.serving_cache_gib or DEFAULT_CACHE_SHARE * measure_available_memory_gib()
    log.info("the decoding cache has %.1f GiB", cache_gib)
    service = ModelService(ModelServerMetrics(), CacheBudget(int(cache_gib * 2**30)))
    versions = VersionCache(settings.home, settings.max_cache_bytes, tracker, MODEL_MANIFEST_FILE, parse_digests)

    def open_version(version: int) -> OpenedVersion:
        try:
            return versions.open(version)
        except VersionNotCached as error:  # in the stack, the dispatcher fetches it
            raise VersionNotReady(str(error)) from None

    last_version = LastVersion(settings.home / LAST_VERSION_FILE)
    follower = AliasFollower(tracker.read_aliases, alias, open_version, last_version, service)
    threading.Thread(target=follower.follow, daemon=True, name="follower").start()
    # The keeper's socket queues connections meanwhile, so none is refused while a version is loaded.
    follower.ready.wait(FIRST_LOAD_WAIT_S)
    app = make_api(settings.model_server_token.get_secret_value(), service)
    uvicorn.run(
        app,
        log_config=None,
        access_log=False,
        timeout_keep_alive=MODEL_SERVER_KEEP_ALIVE_S,
        **choose_listen_options(settings.model_server_url),
        **make_server_options(),
    )


def main() -> None:
    run_model_server(load_settings(ModelServerSettings), *sys.argv[1:2])


if __name__ == "__main__":
    main()

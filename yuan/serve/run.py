"""Entry of the model server: `python -m yuan.serve.run`. It serves what an alias points at, and follows it."""

import logging
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import torch
import uvicorn
from mlflow.exceptions import MlflowException

from infra.logs import configure_logging
from infra.settings import ModelServerSettings, load_settings
from infra.tracker import Tracker
from yuan.model.weights import load, load_tokenizer
from yuan.serve.api import make_api
from yuan.serve.metrics import Metrics
from yuan.serve.request import Served
from yuan.serve.service import Service

log = logging.getLogger(__name__)

FOLLOW_EVERY_S = 1.0
KEEP_VERSIONS = 3
KEEP_ALIVE_S = 60  # longer than the portal's, so that no request meets a connection that is just being closed


class Follower:
    """Keeps the model of an alias loaded; a version that cannot be loaded leaves the one before in service."""

    def __init__(self, tracker: Tracker, alias: str, cache: Path, service: Service) -> None:
        self._tracker, self._alias, self._cache, self._service = tracker, alias, cache, service

    def follow(self) -> None:
        """Look for a new version for ever."""
        while True:
            try:
                self._update()
            except (MlflowException, httpx.HTTPError, OSError, ValueError) as error:
                log.warning("the alias %s cannot be followed now: %s", self._alias, str(error)[:200])
            time.sleep(FOLLOW_EVERY_S)

    def _update(self) -> None:
        version = self._tracker.aliases().get(self._alias)
        served = self._service.served
        if version is None or (served and served.version == version):
            return
        folder = self._cache / f"v{version}"
        if not (folder / "model" / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            self._tracker.download(version, folder)
        self._service.use(Served(load(folder / "model"), load_tokenizer(folder / "model"), version))
        log.info("v%d is in service", version)
        for old in sorted(self._cache.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEEP_VERSIONS]:
            shutil.rmtree(old)


def main() -> None:
    configure_logging()
    settings = load_settings(ModelServerSettings)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))  # one core is for the calls
    cache = settings.home / "serve"
    cache.mkdir(parents=True, exist_ok=True)
    service = Service(Metrics())
    follower = Follower(Tracker(settings), sys.argv[1] if len(sys.argv) > 1 else "champion", cache, service)
    threading.Thread(target=follower.follow, daemon=True, name="follower").start()
    app = make_api(settings.model_server_token.get_secret_value(), service)
    address = urlsplit(settings.model_server_url)
    uvicorn.run(
        app,
        host=address.hostname or "127.0.0.1",
        port=address.port or 80,
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )


if __name__ == "__main__":
    main()

"""The model server's alias follower when the registry is down, has lost a version, or has a broken one."""

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from infra.folder_cache import FolderCache
from tests.waiting import wait_until
from tests.yuan.model_server import make_served_model
from yuan.config import ModelConfig
from yuan.generate.cache_slots import CacheBudget
from yuan.generate.limits import Sampling
from yuan.generate.placement import ModelPlacement
from yuan.model.transformer import Yuan
from yuan.model.weights import save, verify_folder, write_manifest
from yuan.serve.api import wait_for_swap
from yuan.serve.follower import NO_VERSION_MESSAGE, AliasFollower, LastVersion, VersionNotReady
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import GenerationRequest, NoModelInService
from yuan.serve.service import AbsenceReason, ModelService


class Registry:
    """Imitate a registry with aliases and model folders on disk, which can be down or lose versions."""

    def __init__(self, folder):
        self.folder, self.alias, self.is_away, self.downloads = folder, None, False, []

    def add(self, version):
        served = make_served_model(version, window=64)
        save(self.folder / str(version), served.model.config, served.model.state_dict(), served.tokenizer, {})

    def aliases(self):
        if self.is_away:
            raise ConnectionError(f"refused, object at {id(object())}")
        return {"champion": self.alias} if self.alias else {}

    def download(self, version, folder):
        self.downloads.append(version)
        if self.is_away:
            raise ConnectionError("refused")
        shutil.copytree(self.folder / str(version), folder, dirs_exist_ok=True)


@pytest.fixture
def registry(tmp_path):
    registry = Registry(tmp_path / "registry")
    registry.add(1)
    registry.alias = 1
    return registry


@pytest.fixture
def start_server(registry, tmp_path):
    """Return a function that starts a server on the same cache and returns its service and follower."""
    cache = FolderCache(tmp_path / "cache", 1)

    def open_version(version):
        def fetch(folder):
            registry.download(version, folder)
            return dict(verify_folder(folder).files)

        return cache.fill(f"v{version}", 1, fetch)

    def start(placement=None):
        service = ModelService(ModelServerMetrics())
        follower = AliasFollower(
            registry.aliases,
            "champion",
            open_version,
            LastVersion(tmp_path / "model-server" / "last.json"),
            service,
            placement,
        )
        follower.resume()
        follower.check_alias()
        return service, follower

    return start


def test_after_a_restart_without_the_registry_the_last_version_is_served(registry, start_server):
    start_server()
    registry.is_away = True
    service, follower = start_server()
    assert service.served.version == 1 and registry.downloads == [1]
    registry.add(2)
    registry.alias, registry.is_away = 2, False
    follower.check_alias()
    assert service.served.version == 2


@pytest.fixture
def crowded():
    """Return a placement on a machine without free memory, which holds one model and no second one."""
    return ModelPlacement(CacheBudget(2**20), measure_main_memory=lambda: 0)


def test_version_that_does_not_fit_beside_the_former_waits_for_its_requests_and_new_requests_wait_for_it(
    registry, start_server, crowded
):
    service, follower = start_server(crowded)
    pieces = []
    service.submit(
        lambda served: GenerationRequest(served, [[5]], Sampling(max_tokens=60), deliver=pieces.append, limit_s=60)
    )
    registry.add(2)
    registry.alias = 2
    swapping = threading.Thread(target=follower.check_alias)
    swapping.start()
    wait_until(lambda: service.is_swapping or service.served.version == 2)
    asyncio.run(wait_for_swap(service, time.monotonic() + 60))
    swapping.join()
    assert service.served.version == 2 and not service.is_swapping and pieces[-1].finish_reason is not None


def test_former_version_is_served_again_if_the_next_one_cannot_be_loaded(registry, start_server, crowded):
    service, follower = start_server(crowded)
    registry.add(2)
    config = registry.folder / "2" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 1'))
    write_manifest(registry.folder / "2", ["config.json", "model.safetensors", "tokenizer.model"], {})
    registry.alias = 2
    follower.check_alias()
    assert service.served.version == 1 and not service.is_swapping and "v2 cannot be served" in service.problem
    engine = service.engine
    for _ in range(3):
        follower.check_alias()
    assert service.engine is engine


@pytest.mark.parametrize("former", [1, None])
def test_problem_of_a_version_ends_when_the_alias_leaves_it(registry, start_server, former):
    service, follower = start_server()
    registry.add(2)
    (registry.folder / "2" / "config.json").write_text("{}")
    registry.alias = 2
    follower.check_alias()
    assert "v2 cannot be served" in service.problem
    registry.alias = former
    follower.check_alias()
    assert service.problem is None and service.served.version == 1


def test_service_that_ends_while_a_version_is_loaded_is_no_problem(registry, start_server, crowded, monkeypatch):
    service, follower = start_server(crowded)
    registry.add(2)
    registry.alias = 2
    load, loaded = crowded.load, []

    def load_and_stop(folder):
        loaded.append(folder)
        service.stop(AbsenceReason(message="the device is lent", retry_after_s=60))
        return load(folder)

    monkeypatch.setattr(crowded, "load", load_and_stop)
    follower.check_alias()
    assert len(loaded) == 1 and service.problem is None and get_refusal(service) == ("the device is lent", 60)


def test_model_that_no_device_holds_is_refused_with_the_sizes(registry, start_server, monkeypatch):
    placement = ModelPlacement(CacheBudget(2**30))
    monkeypatch.setattr(placement, "_measure_device", lambda device, is_alone: 2**20)
    service, _ = start_server(placement)
    assert service.served is None and "need 1.0 GiB of cpu, which has 0.0 GiB; give serving more" in service.problem


def test_version_deleted_from_the_registry_is_served_from_the_cache(registry, start_server):
    start_server()
    shutil.rmtree(registry.folder / "1")
    assert start_server()[0].served.version == 1
    registry.alias = None  # deleting a version drops its alias too
    assert start_server()[0].served.version == 1


def test_damaged_cache_folder_is_downloaded_again_and_not_served(registry, start_server, tmp_path):
    start_server()
    weights = tmp_path / "cache" / "v1" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert start_server()[0].served.version == 1 and registry.downloads == [1, 1]
    weights.write_bytes(b"x")
    registry.is_away = True
    assert start_server()[0].served is None


def test_failed_load_keeps_the_previous_version_and_registry_outage_is_logged_once(registry, start_server, caplog):
    service, follower = start_server()
    registry.add(2)
    (registry.folder / "2" / "config.json").write_text("{}")
    registry.alias = 2
    for _ in range(3):
        follower.check_alias()
    assert service.served.version == 1 and registry.downloads == [1, 2]  # nor is it fetched every second
    registry.is_away = True
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        for _ in range(3):
            follower.check_alias()
    assert [r.message.split(":")[0] for r in caplog.records] == ["the registry does not respond; v1 stays in service"]


def test_only_the_version_in_service_stays_in_a_cache_without_room(registry, start_server, tmp_path):
    _, follower = start_server()
    for version in (2, 3, 1, 4):
        registry.add(version)
        registry.alias = version
        follower.check_alias()
        assert (tmp_path / "cache" / f"v{version}").is_dir()
    FolderCache(tmp_path / "cache", 1).evict()
    assert {path.name for path in (tmp_path / "cache").glob("v*")} == {"v4"}


def test_version_that_another_process_fetches_is_served_as_soon_as_it_is_cached(registry, start_server, monkeypatch):
    service, follower = start_server()
    registry.add(2)
    registry.alias = 2
    download = registry.download

    def refuse(version, folder):
        raise VersionNotReady("v2 is not in the cache")

    monkeypatch.setattr(registry, "download", refuse)
    for _ in range(2):
        follower.check_alias()
    assert service.served.version == 1
    monkeypatch.setattr(registry, "download", download)
    follower.check_alias()
    assert service.served.version == 2


@pytest.fixture
def start_process(tmp_path):
    """Start the server's process as the keeper does, on an already listening socket; yield a client of it."""
    home, token, processes = tmp_path / "home", "token", []
    home.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as registry:
        urls = {"model_server_url": listener, "mlflow_url": registry}
        env = {f"COTRAIN_{key.upper()}": f"http://127.0.0.1:{server.getsockname()[1]}" for key, server in urls.items()}
        env |= {"COTRAIN_HOME": str(home), "COTRAIN_MODEL_SERVER_TOKEN": token, "COTRAIN_MLFLOW_PASSWORD": "x"}

        def start(*, is_registry_silent):
            if not is_registry_silent:
                registry.close()
            command = [sys.executable, "-m", "yuan.serve.run"]
            with (tmp_path / "log").open("wb") as log:
                process = subprocess.Popen(
                    command, env={**os.environ, **env}, stdin=listener, stdout=log, stderr=subprocess.STDOUT
                )
            processes.append(process)
            headers = {"Authorization": f"Bearer {token}"}
            return httpx.Client(base_url=env["COTRAIN_MODEL_SERVER_URL"], headers=headers, timeout=60)

        yield start
        for process in processes:
            process.kill()
            process.wait()


def test_request_during_startup_waits_for_the_last_served_version(start_process, tmp_path):
    """The server accepts calls before the model is loaded, and the registry does not respond."""
    small = make_served_model(1)
    config = ModelConfig(
        name="test", num_layers=4, hidden_size=1024, num_heads=4, vocab_size=small.model.config.vocab_size, seq_len=64
    )
    home = tmp_path / "home"

    def fetch(folder):
        save(folder, config, Yuan(config).state_dict(), small.tokenizer, {})
        return dict(verify_folder(folder).files)

    FolderCache(home / "cache" / "versions", 1).fill("v1", 1, fetch).close()
    LastVersion(home / "model-server" / "last.json").record(1)
    with start_process(is_registry_silent=True) as http:
        response = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert (response.status_code, response.json().get("model")) == (200, "yuan-v1")


def test_server_without_a_version_returns_503_with_the_reason(start_process):
    with start_process(is_registry_silent=False) as http:
        response = http.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 503 and response.headers["retry-after"] == "60"
    assert "the registry does not respond; retry in a minute" in response.json()["error"]["message"]


def get_refusal(service):
    """Return the error message and Retry-After that a caller gets while no model is in service."""
    with pytest.raises(NoModelInService) as caught:
        service.submit(lambda served: None)
    return str(caught.value), caught.value.retry_after_s


def test_error_message_matches_the_state_of_the_version(registry, start_server, monkeypatch):
    monkeypatch.setattr("yuan.serve.follower.LOAD_RETRY_S", 0.0)
    registry.alias = None
    service, follower = start_server()
    assert get_refusal(service) == (NO_VERSION_MESSAGE, None) and "promote" not in NO_VERSION_MESSAGE.replace(
        "promoted", ""
    )
    registry.alias = 1
    download, refusals = registry.download, []

    def fail_download(version, folder):
        refusals.append(get_refusal(service))
        raise ConnectionError("refused")

    registry.download = fail_download
    follower.check_alias()
    assert refusals == [("v1 is being loaded; retry in a few seconds", 5)]
    message, retry_after_s = get_refusal(service)
    assert "v1 cannot be loaded" in message and retry_after_s == 60
    registry.alias = None  # deleted from the registry, which drops its alias
    follower.check_alias()
    assert get_refusal(service) == (message, retry_after_s)
    registry.alias, registry.download = 1, download
    follower.check_alias()
    assert service.served.version == 1

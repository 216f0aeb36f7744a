"""The model server's follower: what it serves when the registry is away, forgets, or has something broken."""

import logging
import shutil

import pytest

from tests.yuan.serving import make_served
from yuan.model.weights import save
from yuan.serve.follower import Follower, Versions
from yuan.serve.metrics import Metrics
from yuan.serve.service import Service


class Registry:
    """Aliases and model folders on this disk; it can be away, and its versions deleted."""

    def __init__(self, folder):
        self.folder, self.alias, self.is_away, self.downloads = folder, None, False, []

    def add(self, version):
        served = make_served(version, window=64)
        save(self.folder / str(version), served.model.config, served.model.state_dict(), served.tokenizer, {})

    def aliases(self):
        if self.is_away:
            raise ConnectionError(f"refused, object at {id(object())}")
        return {"champion": self.alias} if self.alias else {}

    def download(self, version, folder):
        self.downloads.append(version)
        if self.is_away:
            raise ConnectionError("refused")
        shutil.copytree(self.folder / str(version), folder / "model")


@pytest.fixture
def registry(tmp_path):
    registry = Registry(tmp_path / "registry")
    registry.add(1)
    registry.alias = 1
    return registry


@pytest.fixture
def started(registry, tmp_path):
    """Start a server on the same cache, as often as wanted; its service and follower."""

    def start():
        service = Service(Metrics())
        follower = Follower(registry.aliases, "champion", Versions(tmp_path / "cache", registry.download), service)
        follower.resume()
        follower.look()
        return service, follower

    return start


def test_after_a_restart_without_the_registry_the_last_version_is_served(registry, started):
    started()
    registry.is_away = True
    service, follower = started()
    assert service.served.version == 1 and registry.downloads == [1]
    registry.add(2)
    registry.alias, registry.is_away = 2, False
    follower.look()
    assert service.served.version == 2


def test_a_version_that_the_registry_has_lost_is_served_from_its_folder(registry, started):
    started()
    shutil.rmtree(registry.folder / "1")
    assert started()[0].served.version == 1
    registry.alias = None  # deleting a version drops its alias too
    assert started()[0].served.version == 1


def test_a_damaged_folder_is_fetched_again_and_not_served(registry, started, tmp_path):
    started()
    weights = tmp_path / "cache" / "v1" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert started()[0].served.version == 1 and registry.downloads == [1, 1]
    weights.write_bytes(b"x")
    registry.is_away = True
    assert started()[0].served is None


def test_a_version_that_cannot_be_loaded_leaves_the_one_before_and_is_said_once(registry, started, caplog):
    service, follower = started()
    registry.add(2)
    (registry.folder / "2" / "config.json").write_text("{}")
    registry.alias = 2
    for _ in range(3):
        follower.look()
    assert service.served.version == 1 and registry.downloads == [1, 2]  # nor is it fetched every second
    registry.is_away = True
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        for _ in range(3):
            follower.look()
    assert [r.message.split(":")[0] for r in caplog.records] == ["the registry cannot be asked; v1 stays in service"]


def test_the_folder_of_the_version_in_service_is_kept_whatever_its_age(registry, started, tmp_path):
    _, follower = started()
    for version in (2, 3, 1, 4):
        registry.add(version)
        registry.alias = version
        follower.look()
    assert {path.name for path in (tmp_path / "cache").glob("v*")} == {"v1", "v3", "v4"}

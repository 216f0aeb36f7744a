"""Test that a volume index truncated by a kill is rebuilt at the next start, by a program confined like the server."""

import os

from flows.stack.services import make_services
from flows.stack.stack_config import load_or_make_config, write_environment
from infra.keeper import kill_stack_processes
from infra.object_store import open_object_store
from infra.settings import Settings
from tests.conftest import start


def test_truncated_volume_index_loses_no_object(tmp_path):
    config = load_or_make_config(tmp_path, durable=False)
    write_environment(tmp_path, config)
    settings = Settings(_env_file=tmp_path / "env", home=tmp_path)
    store = next(service for service in make_services(tmp_path, config, settings) if service.name == "s3")
    process = start(store, config.stack_id)
    try:
        objects = open_object_store(settings)
        stored = {f"kept/{n}": os.urandom(1000 + n) for n in range(20)}
        for key, data in stored.items():
            objects.put(key, data)
        kill_stack_processes(config.stack_id, spare={os.getpid()})
        process.wait()
        indices = [file for file in (tmp_path / "s3").rglob("*.idx") if file.stat().st_size]
        assert indices
        for file in indices:
            os.truncate(file, file.stat().st_size // 2 + 3)  # entries have 16 bytes, so the last one is incomplete
        process = start(store, config.stack_id)
        assert {key: open_object_store(settings).get(key) for key in stored} == stored
    finally:
        kill_stack_processes(config.stack_id, spare={os.getpid()})
        process.wait()

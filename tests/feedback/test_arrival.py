"""Uploaded files: streamed to disk, stored only when accepted, and limited by the account's quota."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from feedback.api.app import make_app
from feedback.tables import Dataset, IdempotencyKey
from flows.stack.services import make_services
from flows.stack.stack_config import load_config
from infra.database import make_session_factory
from infra.keeper import STACK_ID_VARIABLE
from tests.conftest import start
from tests.feedback.test_contributors import open_unfinished_upload
from tests.serving import serve_app

MIB = 2**20


def make_rows(num_bytes, mark=""):
    """Return a file of rows of about `num_bytes`, unique for each mark."""
    line = json.dumps({"prompt": mark, "answer": "x" * 15_000}).encode() + b"\n"
    return line * (num_bytes // len(line) + 1)


def push(client, data, headers, name="rows", **more):
    return client.post(f"/api/v1/datasets?name={name}", content=data, headers={**headers, **more})


@pytest.fixture
def portal_process(stores):
    """Start the portal as the stack does, confined; yield its process."""
    config = load_config(stores.home)
    (service,) = (service for service in make_services(stores.home, config, stores) if service.name == "portal")
    process = start(service, config.stack_id)
    yield process
    os.kill(process.pid, signal.SIGTERM)
    process.wait()


def measure_peak_mib(portal_process):
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{portal_process.pid}/status").read_text())[1]) / 1024


def test_memory_does_not_grow_with_concurrent_uploads(stores, portal_process, account, operator):
    assert (
        STACK_ID_VARIABLE in Path(f"/proc/{portal_process.pid}/environ").read_text()
    )  # the portal itself, not a parent process
    before = measure_peak_mib(portal_process)
    files = [make_rows(50 * MIB, str(n)) for n in range(4)]
    with httpx.Client(base_url=stores.portal_url, timeout=300) as client, ThreadPoolExecutor(4) as senders:
        responses = senders.map(lambda data, sender: push(client, data, sender), files, [account.headers, operator] * 2)
        assert [response.status_code for response in responses] == [201] * 4
    assert measure_peak_mib(portal_process) - before < 70


def test_incomplete_upload_has_no_directory_entry(stores, engine, objects, account):
    app, folder = make_app(stores, engine, objects), stores.home / "portal"
    names_before = set(os.listdir(folder))
    with serve_app(app) as url, open_unfinished_upload(url, account.headers):
        assert httpx.get(f"{url}/health", timeout=30).is_success
        assert set(os.listdir(folder)) == names_before


def test_a_refused_file_is_recorded_and_not_stored(portal, account, objects, engine):
    for data in (b'{"answer": "a"}\noops ' + os.urandom(8).hex().encode(), b"\n" * 3, b"1\n" * 500_001):
        assert push(portal, data, account.headers).status_code == 422
        record = portal.get("/api/v1/datasets", headers=account.headers).json()[-1]
        assert (record["state"], record["sha256"]) == ("rejected", hashlib.sha256(data).hexdigest())
        assert not objects.exists(f"uploads/{record['sha256']}")


def test_idempotency_key_of_an_upload_covers_method_path_query_and_body(portal, account, engine):
    data, key = make_rows(1), {"Idempotency-Key": "k"}
    first = push(portal, data, account.headers, **key)
    assert push(portal, data, account.headers, **key).json() == first.json()
    for name, body in (("rows", data + b"\n"), ("other", data)):
        assert push(portal, body, account.headers, name, **key).status_code == 409
    with make_session_factory(engine).begin() as session:
        claim = session.get_one(IdempotencyKey, (account.id, "k"))
    assert claim.request_digest == hashlib.sha256(b"POST\n/api/v1/datasets\nname=rows\n" + data).hexdigest()


FULL_DISK = """
import os, sys
from pathlib import Path
from fastapi.testclient import TestClient
from feedback.api.app import make_app
from infra.database import open_engine
from infra.object_store import open_object_store
from infra.settings import Settings

settings = Settings(_env_file=sys.argv[1], home=Path(sys.argv[2]))
rows = b'{"answer": "a"}\\n'
with TestClient(make_app(settings, open_engine(settings), open_object_store(settings))) as client:
    for data in (rows * 20_000, rows):
        answer = client.post("/api/v1/datasets?name=rows", content=data, headers={"Authorization": sys.argv[3]})
        print(answer.status_code, answer.text)
print(os.listdir(settings.home / "portal"))
"""


def test_full_disk_returns_503_and_frees_the_partial_file(stores, account, tmp_path):
    mounting = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if subprocess.run([*mounting, mount], capture_output=True).returncode != 0:
        pytest.skip("this machine does not allow a process to mount a small disk in its own namespace")
    script = [sys.executable, "-c", FULL_DISK, stores.home / "env", tmp_path, account.headers["Authorization"]]
    inside = [*mounting, f'{mount}; exec "$@"', "sh", *script]
    result = subprocess.run(inside, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    full, accepted, names = result.stdout.splitlines()
    assert full.startswith("503 ") and "the portal's disk has no room for the file now" in full
    assert accepted.startswith("201 ") and names == "[]"


@pytest.fixture
def limited_portal(stores, engine, objects, first_version):
    """Serve a portal with a storage limit of 100,000 bytes per account."""
    changes = {"max_account_bytes": 100_000}
    with TestClient(make_app(stores.model_copy(update=changes), engine, objects)) as client:
        yield client


def test_upload_beyond_the_storage_quota_is_refused(limited_portal, account, operator, engine):
    first, second, third = (make_rows(40_000, f"{account.id} {n}") for n in range(3))
    assert [push(limited_portal, data, account.headers).status_code for data in (first, second, first)] == [201] * 3
    response = push(limited_portal, third, account.headers)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "too_large")
    message = response.json()["error"]["message"]
    assert f"{len(first) + len(second):,} bytes and this one {len(third):,}, an account may have 100,000;" in message
    assert "ask the operator" in message
    assert push(limited_portal, third, operator).status_code == 201
    with make_session_factory(engine).begin() as session:
        assert len(session.scalars(select(Dataset).where(Dataset.contributor_id == account.id)).all()) == 3


def test_withdrawn_files_count_toward_the_quota_and_refused_files_do_not(limited_portal, account):
    large, bad = make_rows(60_000, account.id), make_rows(60_000, account.id) + b"oops"
    assert push(limited_portal, bad, account.headers).status_code == 422
    dataset = push(limited_portal, large, account.headers).json()
    limited_portal.post(f"/api/v1/datasets/{dataset['id']}/withdraw", json={"reason": "mine"}, headers=account.headers)
    assert push(limited_portal, make_rows(60_000, "other"), account.headers).status_code == 413
    assert push(limited_portal, large, account.headers).status_code == 201

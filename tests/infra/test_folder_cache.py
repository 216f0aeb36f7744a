"""The cache of folders: locks, eviction, kills at every phase, damage, and a disk without room."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from infra.folder_cache import FolderCache
from infra.polling import poll_until

KIB = 1024
# A process that fills or opens an entry, reports it, and holds it until it is killed.
HOLD = """
import hashlib, sys, time
from pathlib import Path
from infra.folder_cache import FolderCache
root, name, pause_at = sys.argv[1:]

def stop_at(place):
    if place == pause_at:
        print(place, flush=True)
        time.sleep(600)

def fetch(target):
    stop_at("begin")
    (target / "a").write_bytes(b"a" * 65536)
    stop_at("middle")
    (target / "b").write_bytes(b"b" * 65536)
    stop_at("end")
    return {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in ("a", "b")}

folder = FolderCache(Path(root), 10**9).fill(name, 131072, fetch)
stop_at("held")
"""


def make_fetch(content=b"x", num_bytes=64 * KIB, calls=None):
    """Return a function that writes one file, unless it is there already, and records its calls."""

    def fetch(target):
        if calls is not None:
            calls.append(sorted(file.name for file in target.iterdir()))
        data = content * num_bytes
        if not (target / "weights").exists() or (target / "weights").read_bytes() != data:
            (target / "weights").unlink(missing_ok=True)
            (target / "weights").write_bytes(data)
        return {"weights": hashlib.sha256(data).hexdigest()}

    return fetch


@pytest.fixture
def cache(tmp_path):
    return FolderCache(tmp_path / "cache", 200 * KIB)


def fill(cache, name, used_at=None, **options):
    cache.fill(name, 64 * KIB, make_fetch(**options)).close()
    if used_at is not None:
        os.utime(cache.root / name, (used_at, used_at))


def list_names(cache):
    return sorted(path.name for path in cache.root.iterdir() if path.name != "locks")


@pytest.fixture
def hold_elsewhere(cache):
    """Return a function that starts a process which stops at a place while it fills or uses an entry."""
    processes = []

    def hold(name, place):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(cache.root), name, place], stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline().decode().strip() == place
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_entry_is_fetched_once_and_then_used_in_place(cache):
    calls = []
    first = cache.fill("v1", 64 * KIB, make_fetch(calls=calls))
    second = cache.fill("v1", 64 * KIB, make_fetch(calls=calls))
    assert first.path == second.path == cache.root / "v1" / "model" and len(calls) == 1
    assert cache.open("v1").path == first.path and cache.open("v2") is None


def test_least_recently_used_entry_without_users_is_removed_beyond_the_limit(cache):
    now = time.time()
    for number, age in ((1, 300), (2, 200), (3, 100)):
        fill(cache, f"v{number}", now - age)
    with cache.open("v1"):
        fill(cache, "v4")
        assert list_names(cache) == ["v1", "v3", "v4"]


def test_entries_in_use_exceed_the_limit_rather_than_disappear(cache):
    held = []
    for number in range(5):
        held.append(cache.fill(f"v{number}", 64 * KIB, make_fetch()))
    assert all((folder.path / "weights").is_file() for folder in held)
    for folder in held:
        folder.close()
    fill(cache, "v9")
    assert len(list_names(cache)) <= 3


def test_last_copy_is_never_removed_for_room_and_is_removed_when_it_is_needed_no_longer(cache):
    checked_names = []
    last = FolderCache(cache.root, 200 * KIB, lambda name: checked_names.append(name) or name == "v1")
    now = time.time()
    fill(last, "v1", now - 300)
    fill(last, "v2", now - 200)
    fill(last, "v3", now - 100)
    assert checked_names == []  # the limit is not reached
    fill(last, "v4")
    assert list_names(cache) == ["v1", "v3", "v4"] and checked_names == ["v1", "v2"]
    assert FolderCache(cache.root, 0, lambda name: True).evict() == []
    with cache.open("v1"):
        assert not last.remove("v1")
    assert last.remove("v1") and not last.remove("v1") and list_names(cache) == ["v3", "v4"]


def test_entry_with_other_content_than_expected_is_replaced_and_an_expected_one_never_is(cache):
    def is_new(folder):
        return (folder / "weights").read_bytes()[:1] == b"y"

    fill(cache, "v1")
    assert cache.open("v1") is not None and cache.open("v1", is_new) is None
    with cache.fill("v1", 64 * KIB, make_fetch(b"y"), is_new) as folder:
        inode = (folder.path / "weights").stat().st_ino
        calls = []
        cache.fill("v1", 64 * KIB, make_fetch(b"y", calls=calls), is_new).close()
        assert calls == [] and (folder.path / "weights").stat().st_ino == inode
    with pytest.raises(OSError, match="changed while it was made"):
        cache.fill("v2", 64 * KIB, make_fetch(b"z"), is_new)


def test_entry_with_a_time_in_the_future_of_a_skewed_clock_is_not_kept_for_ever(cache):
    fill(cache, "v1", time.time() + 10**6)
    time.sleep(0.02)
    assert cache.list_entries()[0].used_at <= time.time()
    for number in (2, 3, 4):
        fill(cache, f"v{number}")
    assert len(list_names(cache)) == 3


def test_lock_of_a_killed_user_frees_itself(cache, hold_elsewhere):
    user = hold_elsewhere("v1", "held")
    small = FolderCache(cache.root, 0)
    assert small.evict() == [] and list_names(cache) == ["v1"]
    user.send_signal(signal.SIGKILL)
    user.wait()
    assert [entry.name for entry in small.evict()] == ["v1"] and list_names(cache) == []


@pytest.mark.parametrize("place", ["begin", "middle", "end"])
def test_fill_of_a_killed_process_is_resumed_and_never_seen_incomplete(cache, hold_elsewhere, place):
    filler = hold_elsewhere("v1", place)
    assert cache.open("v1") is None and FolderCache(cache.root, 0).evict() == []
    filler.send_signal(signal.SIGKILL)
    filler.wait()
    calls = []
    with cache.fill("v1", 64 * KIB, make_fetch(calls=calls)) as folder:
        assert [file.name for file in folder.path.iterdir()] == ["weights"]
    assert calls == [{"begin": [], "middle": ["a"], "end": ["a", "b"]}[place]]
    assert list_names(cache) == ["v1"]


def test_second_process_waits_for_the_one_that_fills_and_uses_its_entry(cache, hold_elsewhere):
    filler = hold_elsewhere("v1", "middle")
    waiter = subprocess.Popen([sys.executable, "-c", HOLD, str(cache.root), "v1", "none"])
    time.sleep(0.3)
    assert waiter.poll() is None
    filler.kill()
    assert waiter.wait(60) == 0 and cache.open("v1") is not None


def test_interrupted_fill_is_removed_for_room(cache, hold_elsewhere):
    filler = hold_elsewhere("v1", "end")
    filler.kill()
    filler.wait()
    FolderCache(cache.root, 0).evict()
    assert list_names(cache) == []


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "replace", "link", "record"])
def test_damaged_entry_is_replaced_while_a_user_keeps_its_open_files(cache, damage, tmp_path):
    fill(cache, "v1")
    weights = cache.root / "v1" / "model" / "weights"
    user = weights.open("rb")
    match damage:
        case "truncate":
            os.truncate(weights, 10)
        case "change":
            with weights.open("r+b") as file:
                file.write(b"y")
        case "remove":
            weights.unlink()
        case "replace":
            shutil.copy(weights, tmp_path / "copy")
            (tmp_path / "copy").replace(weights)
        case "link":
            weights.rename(tmp_path / "moved")
            weights.symlink_to(tmp_path / "moved")
        case "record":
            (cache.root / "v1" / "entry.json").write_text("{}")
    assert cache.open("v1") is None
    fill(cache, "v1")
    with cache.open("v1") as folder:
        assert (folder.path / "weights").read_bytes() == b"x" * 64 * KIB and not (folder.path / "weights").is_symlink()
    assert len(user.read()) == (10 if damage == "truncate" else 64 * KIB)
    user.close()


def test_reader_without_write_access_uses_and_protects_an_entry(cache):
    fill(cache, "v1")
    program = "import sys, time; from pathlib import Path; from infra.folder_cache import FolderCache;"
    program += "folder = FolderCache(Path(sys.argv[1]), 10).open('v1'); print(folder.path, flush=True); time.sleep(600)"
    from infra.confinement import Confinement

    command = Confinement(read=(cache.root,)).command(sys.executable, "-c", program, str(cache.root))
    reader = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert reader.stdout.readline().decode().strip() == str(cache.root / "v1" / "model")
        assert FolderCache(cache.root, 0).evict() == []
    finally:
        reader.kill()
        reader.wait()
        reader.stdout.close()
    assert poll_until(lambda: FolderCache(cache.root, 0).evict(), timeout_s=10, pause_s=0.05)


def test_entry_that_does_not_fit_on_the_disk_is_refused_with_its_bytes(cache):
    fill(cache, "v1")
    with pytest.raises(OSError, match=r"v2 in the cache needs [\d,]+ bytes, and the disk has [\d,]+ free"):
        cache.fill("v2", 9 * 10**15, make_fetch())
    assert cache.open("v2") is None


def test_failed_fetch_is_raised_and_the_next_one_starts_where_it_ended(cache):
    def fail(target):
        (target / "weights").write_bytes(b"x")
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError):
        cache.fill("v1", 64 * KIB, fail)
    calls = []
    fill(cache, "v1", calls=calls)
    assert calls == [["weights"]]
    assert json.loads((cache.root / "v1" / "entry.json").read_text())["files"]["weights"]["bytes"] == 64 * KIB

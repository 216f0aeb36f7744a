"""The cache of token files: complete or absent, read-only, verified, shared, and never changed through a run's copy."""

import os
import subprocess
import sys
import textwrap

import pytest

from flows.round.token_cache import CACHE_ENTRY_FILE, CacheDamageError, TokenCache
from yuan.data.packing import PackingStats
from yuan.data.shard_tokens import ShardReport
from yuan.train.file_digest import compute_digest

DIGEST = "a" * 64
SHARD = "5" * 64
REPORT = ShardReport(rows=1, excluded=0, reasons={}, training=PackingStats(), validation=PackingStats())


@pytest.fixture
def cache(tmp_path):
    return TokenCache(tmp_path / "cache")


def write(folder, content=b"tokens"):
    (folder / "training").mkdir()
    (folder / "training" / "tokens.bin").write_bytes(content)
    (folder / "report.json").write_bytes(REPORT.dump())


def test_entry_is_complete_and_read_only(cache):
    assert cache.find(DIGEST) is None
    entry = cache.add(DIGEST, SHARD, write)
    assert cache.find(DIGEST) == entry and entry.report == REPORT
    assert set(entry.files) == {"training/tokens.bin", "report.json"}
    assert all((entry.folder / name).stat().st_mode & 0o222 == 0 for name in entry.files)
    assert sorted(os.listdir(cache.folder)) == [DIGEST]


def test_failed_entry_leaves_nothing(cache):
    def fail(folder):
        write(folder)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        cache.add(DIGEST, SHARD, fail)
    assert cache.find(DIGEST) is None and os.listdir(cache.folder) == []


def test_entry_whose_eviction_was_killed_is_made_again(cache):
    entry = cache.add(DIGEST, SHARD, write)
    (entry.folder / CACHE_ENTRY_FILE).unlink()
    assert cache.find(DIGEST) is None
    (cache.folder / DIGEST).mkdir()
    assert cache.find(DIGEST) is None and cache.add(DIGEST, SHARD, write).files == entry.files


def test_second_process_that_makes_the_same_entry_uses_the_first(cache):
    def write_late(folder):
        first = cache.add(DIGEST, SHARD, write)
        write(folder)
        assert first.folder.is_dir()

    entry = cache.add(DIGEST, SHARD, write_late)
    assert cache.find(DIGEST) == entry and sorted(os.listdir(cache.folder)) == [DIGEST]


def test_copy_of_a_run_is_its_own(cache, tmp_path):
    """Ranks may change every file of the run's folder, through any link that is in it."""
    entry = cache.add(DIGEST, SHARD, write)
    digests = cache.export(entry, "training", tmp_path / "run" / "0" / "0")
    copy = tmp_path / "run" / "0" / "0" / "tokens.bin"
    assert digests == {"tokens.bin": compute_digest(copy)} and copy.read_bytes() == b"tokens"
    assert copy.stat().st_ino != (entry.folder / "training" / "tokens.bin").stat().st_ino
    copy.write_bytes(b"others")
    assert (entry.folder / "training" / "tokens.bin").read_bytes() == b"tokens"


@pytest.mark.parametrize("damage", ["shorter", "missing", "index", "report"])
def test_damaged_entry_is_removed_when_it_is_used(cache, damage):
    entry = cache.add(DIGEST, SHARD, write)
    name = {"index": "files.json", "report": "report.json"}.get(damage, "training/tokens.bin")
    file = entry.folder / name
    file.chmod(0o600)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"short")
    assert cache.find(DIGEST) is None and not entry.folder.exists()
    assert cache.add(DIGEST, SHARD, write).files == entry.files


def test_changed_tokens_are_found_if_all_files_are_verified(cache):
    entry = cache.add(DIGEST, SHARD, write)
    file = entry.folder / "training" / "tokens.bin"
    file.chmod(0o600)
    file.write_bytes(b"tokenz")
    assert cache.find(DIGEST) == entry
    assert cache.find(DIGEST, verify_tokens=True) is None and not entry.folder.exists()


def test_changed_byte_is_found_when_the_file_is_copied(cache, tmp_path):
    entry = cache.add(DIGEST, SHARD, write)
    file = entry.folder / "training" / "tokens.bin"
    file.chmod(0o600)
    file.write_bytes(b"tokenz")
    with pytest.raises(CacheDamageError, match="has the sha256"):
        cache.export(entry, "training", tmp_path / "copy")
    assert cache.find(DIGEST) is None


def test_entries_used_longest_ago_are_evicted(cache):
    entries = [cache.add(letter * 64, SHARD, lambda folder: write(folder, b"x" * 1000)) for letter in "abc"]
    for age, entry in enumerate(entries):
        os.utime(entry.folder / "files.json", (1000 - age, 1000 - age))
    cache.find("b" * 64)
    cache.evict(2 * entries[0].num_bytes)
    assert sorted(os.listdir(cache.folder)) == [".lock", "a" * 64, "b" * 64]
    cache.evict(0)
    assert os.listdir(cache.folder) == [".lock"]


def test_entry_goes_with_its_shard_and_stays_while_it_is_held(cache):
    entry, kept = cache.add(DIGEST, SHARD, write), cache.add("b" * 64, "6" * 64, write)
    assert cache.find_unneeded({"6" * 64, "7" * 64}) == [entry]
    with cache.hold():
        assert cache.remove([entry]) == 0 and cache.find(DIGEST) == entry
    assert cache.remove([entry]) == entry.num_bytes
    assert cache.find(DIGEST) is None and cache.find(kept.digest) == kept


def test_nothing_is_evicted_while_another_process_prepares_a_run(cache, tmp_path):
    cache.add(DIGEST, SHARD, write)
    (cache.folder / ".left-by-a-killed-process").mkdir()
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from flows.round.token_cache import TokenCache
        with TokenCache(Path(sys.argv[1])).hold():
            print("held", flush=True)
            sys.stdin.read()
        """
    )
    command = [sys.executable, "-c", program, str(cache.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert not (cache.folder / ".left-by-a-killed-process").exists()
        (cache.folder / ".scratch-of-the-holder").mkdir()
        cache.evict(0)
        with cache.hold():
            assert (cache.folder / ".scratch-of-the-holder").exists()
        assert cache.find(DIGEST) is not None
        holder.stdin.close()
    cache.evict(0)
    assert cache.find(DIGEST) is None

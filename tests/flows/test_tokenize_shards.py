"""Tokenizing a snapshot: only new shards, in parallel, restartable, with progress; order of data over rounds."""

import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from flows.recipe_files import load_recipe
from flows.round.prepare_data import make_sample_rules, sample_texts, write_run_data
from flows.round.row_records import RowRecords
from flows.round.run_model import RoundUnfit
from flows.round.token_cache import TokenCache
from flows.round.tokenize_shards import tokenize_snapshot
from infra.polling import poll_until
from tests.records import flip_byte
from yuan import tokenizer as tokenizers
from yuan.data.consumed_samples import ConsumedSamples, count_consumed
from yuan.data.row_shards import RowShard, ShardWriter, SnapshotManifest, SnapshotPart, decompress_shard
from yuan.data.rows import Row, dump_rows
from yuan.data.shard_tokens import is_validating
from yuan.data.token_workers import MAX_IN_PROCESS_BYTES
from yuan.data.window_rows import WindowRows
from yuan.recipe import validate_recipe
from yuan.train.run_folder import RunFolder


class StoredShards:
    """Shards of rows in a folder, and the names of those that were read."""

    def __init__(self, folder):
        self.folder = folder
        self.read = []

    def write(self, rows):
        with ShardWriter(self.folder) as writer:
            for row in rows:
                writer.add(dump_rows([row]))
            shard, path = writer.finish()
            (self.folder / shard.sha256).write_bytes(path.read_bytes())
        return shard

    def fetch(self, part, shard, target):
        self.read.append(shard.sha256)
        decompress_shard(self.folder / shard.sha256, target, shard)


@pytest.fixture
def stored(tmp_path):
    (tmp_path / "shards").mkdir()
    return StoredShards(tmp_path / "shards")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["abcdefghijklmnopqrstuvwxyz0123456789 :R"], vocab_size=330)


def make_rows(first, count=30):
    return [Row(prompt=f"Reverse: {n}", answer=str(n)[::-1]) for n in range(first, first + count)]


def make_recipe(**sections):
    tables = load_recipe(Path(), "demo").to_json()
    tables["data"] = {**tables["data"], "seq_len": 32}
    tables["length"] = {"steps": 4, "min_steps": 1, "max_epochs": 1000.0}
    for name, values in sections.items():
        tables[name] = {**tables.get(name, {}), **values}
    return validate_recipe(tables, "test")


class Preparation:
    """Prepare run folders as rounds do."""

    def __init__(self, tmp_path, stored, tokenizer, objects):
        self.records = RowRecords(objects)
        self.tmp_path, self.stored, self.tokenizer = tmp_path, stored, tokenizer
        self.cache = TokenCache(tmp_path / "cache")
        self.number = 0
        self.progress = []

    def prepare(self, parts, recipe, consumed=None):
        self.number += 1
        folder = RunFolder(self.tmp_path / f"run{self.number}")
        folder.path.mkdir()
        self.tokenizer.save(folder.path)
        manifest = SnapshotManifest(tuple(SnapshotPart(name, tuple(shards)) for name, shards in parts.items()))
        self.stored.read.clear()
        with self.cache.hold():
            tokenized = tokenize_snapshot(
                self.cache,
                manifest,
                self.stored.fetch,
                tokenizer_folder=folder.path,
                rules={name: make_sample_rules(recipe, name) for name in parts},
                num_workers=2,
                report=self.progress.append,
            )
            pad, consumed = self.tokenizer.pad, consumed or ConsumedSamples()
            data = write_run_data(
                folder, self.cache, tokenized, recipe, pad=pad, consumed=consumed, records=self.records
            )
        return folder, data


@pytest.fixture
def rounds(tmp_path, stored, tokenizer, objects):
    return Preparation(tmp_path, stored, tokenizer, objects)


def test_two_rounds_over_ten_shards_with_one_changed_tokenize_one(rounds, stored):
    shards = [stored.write(make_rows(100 * n)) for n in range(10)]
    recipe = make_recipe()
    first, _ = rounds.prepare({"base": shards}, recipe)
    assert sorted(stored.read) == sorted(shard.sha256 for shard in shards)
    assert (rounds.progress[-1].num_done, rounds.progress[-1].num_shards) == (10, 10)

    changed = [*shards[:4], stored.write(make_rows(5000)), *shards[5:]]
    second, _ = rounds.prepare({"base": changed}, recipe)
    assert stored.read == [changed[4].sha256]
    for number in (0, 9):
        name = f"data/0/{number}/tokens.bin"
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
    assert (first.path / "data/0/4/tokens.bin").read_bytes() != (second.path / "data/0/4/tokens.bin").read_bytes()


def test_share_validates_in_every_part_but_the_corrections(rounds, stored):
    shards = [stored.write(make_rows(100 * n, 60)) for n in range(4)]
    parts = {"corrections": shards[:1], "datasets": shards[1:3], "base": shards[3:]}
    recipe = make_recipe(validation={"share": 0.3, "every_steps": 2})
    folder, data = rounds.prepare(parts, recipe)
    assert [source.name for source in folder.open_corpus(0).sources] == list(parts)
    assert [source.name for source in folder.open_validation_corpus().sources] == ["datasets", "base"]
    assert data.counts["corrections"].samples == 60 and 60 < data.counts["datasets"].samples < 110
    whole, _ = rounds.prepare(parts, make_recipe())
    sources = [*folder.open_corpus(0).sources, *folder.open_validation_corpus().sources]
    assert sum(s.tokens for s in sources) == sum(s.tokens for s in whole.open_corpus(0).sources)


def test_part_whose_rows_all_validate_is_trained_on(rounds, stored):
    row = next(row for row in make_rows(0) if is_validating(row, 0.3))
    parts = {"datasets": [stored.write([row])], "base": [stored.write(make_rows(1000))]}
    folder, data = rounds.prepare(parts, make_recipe(validation={"share": 0.3, "every_steps": 2}))
    assert data.counts["datasets"].samples == 1
    assert [source.name for source in folder.open_validation_corpus().sources] == ["base"]


def test_rows_that_cannot_be_read_are_named_and_a_snapshot_of_them_is_refused(rounds, stored, tmp_path):
    recipe = make_recipe()
    good = stored.write(make_rows(0))
    with ShardWriter(stored.folder) as writer:
        writer.add(b'{"prompt": "?"}\n')
        bad, path = writer.finish()
        (stored.folder / bad.sha256).write_bytes(path.read_bytes())
    _, data = rounds.prepare({"datasets": [bad], "base": [good]}, recipe)
    assert data.num_excluded == 1 and list(data.exclusion_reasons) == [f"line 1 of shard {bad.sha256[:12]}"]
    assert list(data.counts) == ["base"]
    with pytest.raises(RoundUnfit, match="no row of the snapshot can be trained on"):
        rounds.prepare({"datasets": [bad]}, recipe)


def test_inputs_that_did_not_change_are_not_read_again(rounds, stored):
    folder, _ = rounds.prepare({"base": [stored.write(make_rows(0))]}, make_recipe())
    seal = (folder.path / "seal.json").read_text()
    folder.seal_inputs()  # reads every file
    assert (folder.path / "seal.json").read_text() == seal


def test_texts_for_a_tokenizer_are_those_of_all_rows(stored, tmp_path):
    shards = [stored.write(make_rows(100 * n)) for n in range(3)]
    manifest = SnapshotManifest((SnapshotPart("datasets", (*shards[:2],)), SnapshotPart("base", (shards[2],))))
    texts = list(sample_texts(manifest, stored.fetch, tmp_path))
    rows = itertools.chain.from_iterable(make_rows(100 * n) for n in range(3))
    assert texts == [f"{row.prompt}\n{row.answer}" for row in rows]


@pytest.mark.parametrize("weights", [None, {"datasets": 0.4, "base": 0.6}])
def test_nothing_is_read_twice_before_everything_was_read_once_over_three_rounds(rounds, stored, weights):
    """Shards are added, removed and changed between the rounds; the oracle counts the rows of every window read."""
    shards = [stored.write(make_rows(100 * n, 25 + n)) for n in range(9)]
    mixtures = [
        {"datasets": shards[:2], "base": shards[4:8]},
        {"datasets": shards[:3], "base": [*shards[5:8], shards[8]]},  # one added to each, one removed
        {"datasets": [shards[0], *shards[2:4]], "base": shards[4:9]},  # one removed, one added, one back
    ]
    recipe = make_recipe(**({"mixture": weights} if weights else {}))
    consumed, num_reads = ConsumedSamples(), {}
    for number, mixture in enumerate(mixtures):
        folder, _ = rounds.prepare(mixture, recipe, consumed)
        corpus = folder.open_corpus(number)
        num_positions = 37 + 20 * number
        sources, windows = corpus.mixture.locate_windows(np.arange(num_positions))
        for position in range(num_positions):
            source = corpus.sources[sources[position]]
            all_windows = [(source.name, s.digest, n) for s in source.shards for n in range(s.windows)]
            window = all_windows[windows[position]]
            counts = [num_reads.get(other, 0) for other in all_windows]
            assert num_reads.get(window, 0) == min(counts)
            num_reads[window] = num_reads.get(window, 0) + 1
        consumed = ConsumedSamples.parse(consumed.replace(count_consumed(corpus, num_positions)).dump())
    for shard in consumed.shards:
        expected = [num_reads.get((shard.source, shard.digest, n), 0) for n in range(shard.windows)]
        assert shard.history.count_reads(shard.windows).tolist() == expected
    assert len(consumed.shards) == 9


def list_windows(folder, corpus):
    """Return the rows, as line hashes, of each window of a corpus of one source."""
    windows = []
    for number in range(len(corpus.sources[0].shards)):
        rows = WindowRows.read(folder.data / "0" / str(number))
        windows += [set(hashes.tolist()) for hashes in np.split(rows.hashes, np.cumsum(rows.counts)[:-1])]
    return windows


def read_places(folder, seed, count):
    """Return the rows of each window of a run's corpus, and the numbers of the windows that its steps read."""
    corpus = folder.open_corpus(seed)
    return list_windows(folder, corpus), corpus.mixture.locate_windows(np.arange(count))[1].tolist(), corpus


def count_row_reads(windows, window_reads):
    """Return how often each row was read in all of its windows."""
    row_reads = {}
    for rows, count in zip(windows, window_reads, strict=True):
        for row in rows:
            row_reads[row] = min(row_reads.get(row, count), count)
    return row_reads


@pytest.mark.parametrize("num_read", [23, 64, 140, 205])
def test_changed_shard_is_read_again_only_where_it_has_an_unread_row(rounds, stored, num_read):
    """Ten shards; of one, a row is removed and a row is new. The oracle counts the readings of each row."""
    shards = [stored.write(make_rows(100 * n)) for n in range(10)]
    recipe = make_recipe()
    folder, _ = rounds.prepare({"base": shards}, recipe)
    windows, places, corpus = read_places(folder, 0, num_read)
    row_reads = count_row_reads(windows, np.bincount(places, minlength=len(windows)))
    consumed = ConsumedSamples().replace(count_consumed(corpus, num_read))

    changed = stored.write([*make_rows(400)[:12], *make_rows(5000, 1), *make_rows(400)[13:]])
    folder, _ = rounds.prepare({"base": [*shards[:4], changed, *shards[5:]]}, recipe, consumed)
    assert stored.read == [changed.sha256], "one shard is tokenized"
    windows, places, corpus = read_places(folder, 1, 3 * len(windows))
    num_reads = [min(row_reads.get(row, 0) for row in rows) for rows in windows]
    assert sum(row not in row_reads for rows in windows for row in rows) == 1
    for place in places:
        assert num_reads[place] == min(num_reads)
        num_reads[place] += 1
    if num_read == 205:  # everything was read once before
        (first,) = (place for place in places[:1])
        assert not windows[first] <= row_reads.keys(), "the window with the new row"


def test_rows_that_come_back_in_another_shard_count_as_read(rounds, stored):
    """As base rows do that each round draws anew: a shard of rows of two earlier ones, of which one was read."""
    shards = [stored.write(make_rows(100 * n)) for n in range(3)]
    recipe, consumed = make_recipe(), ConsumedSamples()
    for number, shard in enumerate(shards[:2]):
        corpus = rounds.prepare({"base": [shard]}, recipe, consumed)[0].open_corpus(number)
        consumed = consumed.replace(count_consumed(corpus, 2 * corpus.sources[0].windows * (number == 0)))
    drawn = stored.write([*make_rows(0, 12), *make_rows(112, 18)])
    folder, _ = rounds.prepare({"base": [drawn, shards[2]]}, recipe, consumed)
    corpus = folder.open_corpus(0)
    old = {hash_row(row) for row in make_rows(0, 12)}
    num_reads = [
        history.count_reads(shard.windows)
        for history, shard in zip(corpus.read_histories(0), corpus.sources[0].shards, strict=True)
    ]
    expected = [2 if rows <= old else 0 for rows in list_windows(folder, corpus)]
    assert 2 in expected and np.concatenate(num_reads).tolist() == expected


def hash_row(row):
    return int.from_bytes(hashlib.blake2b(dump_rows([row]).rstrip(), digest_size=8).digest(), "little")


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_rows_whose_record_is_missing_or_damaged_count_as_unread(rounds, stored, objects, caplog, content):
    recipe = make_recipe()
    corpus = rounds.prepare({"base": [stored.write(make_rows(0))]}, recipe)[0].open_corpus(0)
    consumed = ConsumedSamples().replace(count_consumed(corpus, corpus.sources[0].windows))
    key = f"window-rows/{consumed.shards[0].rows}"
    record = objects.get(key)
    objects.delete(key) if content is None else objects.put(key, content)
    folder, _ = rounds.prepare({"base": [stored.write(make_rows(1))]}, recipe, consumed)
    assert [history.mean_epochs for history in folder.open_corpus(0).read_histories(0)] == [0.0]
    assert ("is missing" if content is None else "is damaged, they count as unread") in caplog.text
    objects.put(key, record)
    folder, _ = rounds.prepare({"base": [stored.write(make_rows(1))]}, recipe, consumed)
    assert folder.open_corpus(0).read_histories(0)[0].mean_epochs > 0.5


def test_damaged_record_of_rows_is_stored_again_by_the_next_round_with_its_shard(rounds, stored, objects):
    parts = {"base": [stored.write(make_rows(0))]}
    rows = WindowRows.read(rounds.prepare(parts, make_recipe())[0].data / "0" / "0")
    key = f"window-rows/{rounds.records.store(rows)}"
    record = objects.get(key)
    objects.put(key, flip_byte(record, 20))
    rounds.prepare(parts, make_recipe())
    assert objects.get(key) == record


@pytest.mark.parametrize("has_record", [True, False])
def test_readings_of_a_shard_with_other_token_files_count(rounds, stored, has_record):
    """Count those of each row, or without a record, as of earlier releases, the completed epochs."""
    shards = [stored.write(make_rows(100 * n)) for n in range(2)]
    corpus = rounds.prepare({"base": shards}, make_recipe())[0].open_corpus(0)
    num_windows = corpus.sources[0].windows
    consumed = ConsumedSamples().replace(count_consumed(corpus, 3 * num_windows - 6))
    if not has_record:
        consumed = ConsumedSamples(tuple(dataclasses.replace(shard, rows="") for shard in consumed.shards))
    folder, _ = rounds.prepare({"base": shards}, make_recipe(data={"seq_len": 64}), consumed)
    histories = folder.open_corpus(0).read_histories(0)
    assert [history.epochs for history in histories] == [2, 2]
    assert any(history.further is not None for history in histories) == has_record


def test_epochs_of_earlier_rounds_count_for_a_recipe_that_continues(rounds, stored):
    shards = [stored.write(make_rows(100 * n)) for n in range(2)]
    recipe = make_recipe()
    corpus = rounds.prepare({"base": shards}, recipe)[0].open_corpus(0)
    consumed = ConsumedSamples().replace(count_consumed(corpus, 3 * corpus.sources[0].windows))
    length = {"epochs": 2.0, "min_steps": 1, "max_epochs": 4.0}
    sections = {"model": {"weights": "parent"}, "batch": {"global_batch_size": 1}}
    tables = make_recipe().to_json()
    tables["length"] = length
    for section, values in sections.items():
        tables[section] = {**tables[section], **values}

    del tables["batch"]["micro_batch_size"]

    def prepare(kind):
        tables["run"] = {**tables["run"], "kind": kind}
        return rounds.prepare({"base": shards}, validate_recipe(tables, "test"), consumed)

    assert prepare("finetune")[1].length.epochs == pytest.approx(2.0, abs=0.2)
    with pytest.raises(RoundUnfit, match=r"2\.\d times after 3\.0 times in earlier rounds, length.max_epochs is 4"):
        prepare("continue")


def test_skipped_data_does_not_count_as_read(rounds, stored):
    recipe = make_recipe()
    corpus = rounds.prepare({"base": [stored.write(make_rows(0))]}, recipe)[0].open_corpus(0)
    size = corpus.sources[0].windows
    windows = corpus.mixture.locate_windows(np.arange(size))[1]
    (shard,) = count_consumed(corpus, size - 2, left_out=[(0, 2)], not_applied=[(4, 5)])
    assert shard.history.epochs == 0
    assert np.flatnonzero(shard.history.further == 0).tolist() == sorted([windows[0], windows[1], windows[4]])


def dump_entry(entry):
    return json.dumps(entry).encode()


@pytest.mark.parametrize(
    "change",
    [
        {"windows": 0},
        {"epochs": -1},
        {"epochs": True},
        {"read": "////"},
        {"read": "!"},
        {"read": 1},
        {"source": 1},
        {"rows": 1},
    ],
)
def test_damaged_record_of_consumed_samples_is_refused(change):
    entry = {"source": "base", "digest": "d", "sha256": "s", "windows": 10, "epochs": 1, "read": "gAA="}
    content = b'{"schema": 1, "shards": [%s]}'
    parsed = ConsumedSamples.parse(content % dump_entry(entry))
    assert parsed.shards[0].history.further.sum() == 1 and ConsumedSamples.parse(parsed.dump()).dump() == parsed.dump()
    with pytest.raises(ValueError, match="of a shard"):
        ConsumedSamples.parse(content % dump_entry({**entry, **change}))


def test_missing_shard_is_an_error(rounds, stored):
    lost = RowShard("0" * 64, 1, 10, 10)
    with pytest.raises(FileNotFoundError):
        rounds.prepare({"base": [lost, stored.write(make_rows(0))]}, make_recipe())


def read_entries(cache_folder):
    files = {path.relative_to(cache_folder): path for path in cache_folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name.name not in (".lock", "files.json")}


@pytest.mark.slow
def test_killed_preparation_repeats_one_shard_of_each_worker_and_gives_the_same_files(stored, tokenizer, tmp_path):
    rows = [[Row(answer=f"{shard} {n} " + "abcdefgh" * 100) for n in range(1800)] for shard in range(8)]
    shards = [stored.write(shard_rows) for shard_rows in rows]
    assert all(shard.num_bytes > MAX_IN_PROCESS_BYTES for shard in shards)
    manifest = SnapshotManifest((SnapshotPart("base", tuple(shards)),))
    (stored.folder / "manifest.json").write_text(json.dumps(manifest.to_json()))
    tokenizer.save(stored.folder)

    def start(cache):
        command = [sys.executable, "-m", "tests.flows.tokenize_program", str(stored.folder), str(cache)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start(tmp_path / "killed") as process:
        workers = set()
        while int(process.stdout.readline().split()[0]) < 2:
            workers |= {child.pid for child in psutil.Process(process.pid).children()}
        workers |= {child.pid for child in psutil.Process(process.pid).children()}
        process.kill()
    assert len(workers) == 2
    assert poll_until(lambda: not any(map(psutil.pid_exists, workers)), timeout_s=30, pause_s=0.05)
    num_complete = sum(path.is_dir() and not path.name.startswith(".") for path in (tmp_path / "killed").iterdir())
    assert 2 <= num_complete < 8

    with start(tmp_path / "killed") as process:
        reports = [tuple(map(int, line.split())) for line in process.stdout]
    assert process.returncode == 0 and reports[-1] == (8 - num_complete, 8 - num_complete)
    with start(tmp_path / "plain") as process:
        process.communicate()
    assert read_entries(tmp_path / "killed") == read_entries(tmp_path / "plain")

"""Row shards and snapshot manifests: identity, verification, and bounded memory."""

import dataclasses
import hashlib
import io
import json
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from yuan.data.row_shards import (
    SNAPSHOT_PARTS,
    RowShard,
    ShardDamageError,
    ShardWriter,
    SnapshotManifest,
    SnapshotPart,
    decompress_shard,
    read_shard_chunks,
)

LINES = st.lists(st.text(max_size=20).map(lambda text: json.dumps(text).encode() + b"\n"), min_size=1, max_size=20)
COUNTS = st.integers(1, 2**50)
SHARDS = st.builds(RowShard, st.binary(min_size=32, max_size=32).map(bytes.hex), COUNTS, COUNTS, COUNTS)


@st.composite
def manifests(draw):
    names = draw(st.lists(st.sampled_from(SNAPSHOT_PARTS), min_size=1, unique=True))
    parts = [
        SnapshotPart(name, tuple(draw(st.lists(SHARDS, min_size=1, max_size=9))))
        for name in SNAPSHOT_PARTS
        if name in names
    ]
    return SnapshotManifest(tuple(parts))


def write_shard(lines):
    """Return a shard of these lines and its stored bytes."""
    with ShardWriter() as writer:
        for line in lines:
            writer.add(line)
        shard, path = writer.finish()
        stored = path.read_bytes()
    assert not path.exists()
    return shard, stored


@given(LINES)
def test_shard_is_named_by_its_uncompressed_lines_and_expands_to_them(lines):
    shard, stored = write_shard(lines)
    data = b"".join(lines)
    assert shard == RowShard(hashlib.sha256(data).hexdigest(), len(lines), len(data), len(stored))
    recompressed = zstandard.compress(data, level=19)
    for form in (stored, recompressed):
        assert b"".join(read_shard_chunks(io.BytesIO(form), shard)) == data


@given(LINES, st.data())
def test_any_changed_byte_of_a_stored_shard_is_refused_or_leaves_its_lines(lines, data):
    shard, stored = write_shard(lines)
    place = data.draw(st.integers(0, len(stored) - 1))
    damaged = bytearray(stored)
    damaged[place] ^= data.draw(st.integers(1, 255))
    for form in (bytes(damaged), stored[:place]):
        try:
            chunks = list(read_shard_chunks(io.BytesIO(form), shard))
        except ShardDamageError:
            continue
        assert b"".join(chunks) == b"".join(lines)  # such as a changed flag that zstd does not use


@given(manifests())
def test_manifest_survives_its_stored_form(manifest):
    assert SnapshotManifest.parse(manifest.dump()) == manifest
    assert manifest.num_rows == sum(shard.num_rows for part in manifest.parts for shard in part.shards)


@given(manifests(), st.data())
def test_root_covers_every_shard_count_and_order_and_not_the_compressed_size(manifest, data):
    number = data.draw(st.integers(0, len(manifest.parts) - 1))
    part = manifest.parts[number]
    place = data.draw(st.integers(0, len(part.shards) - 1))

    def replace_shards(shards):
        parts = list(manifest.parts)
        parts[number] = SnapshotPart(part.name, tuple(shards))
        return SnapshotManifest(tuple(parts))

    def replace_field(name, value):
        shards = list(part.shards)
        shards[place] = dataclasses.replace(shards[place], **{name: value})
        return replace_shards(shards)

    shard = part.shards[place]
    assert replace_field("num_stored_bytes", shard.num_stored_bytes + 1).root == manifest.root
    others = [
        replace_field("num_rows", shard.num_rows + 1),
        replace_field("num_bytes", shard.num_bytes + 1),
        replace_field("sha256", hashlib.sha256(shard.sha256.encode()).hexdigest()),
        replace_shards([*part.shards, shard]),
        replace_shards([part.shards[0], *part.shards]),
    ]
    if [shard.sha256 for shard in part.shards] != [shard.sha256 for shard in part.shards[::-1]]:
        others.append(replace_shards(part.shards[::-1]))
    assert manifest.root not in {other.root for other in others}

    damaged = replace_field("num_rows", shard.num_rows + 1).to_json() | {"root": manifest.root}
    with pytest.raises(ValueError, match="root is not that of its shards"):
        SnapshotManifest.from_json(damaged)


def test_part_of_one_shard_differs_from_the_same_shard_in_another_part():
    shard = RowShard("0" * 64, 1, 2, 3)
    roots = {SnapshotManifest((SnapshotPart(name, (shard,)),)).root for name in SNAPSHOT_PARTS}
    assert len(roots) == 3


SHARD = {"sha256": "a" * 64, "num_rows": 1, "num_bytes": 2, "num_stored_bytes": 3}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"schema": 1}',
        b'{"schema": 2, "parts": {}}',
        b'{"schema": 2, "parts": [3]}',
        b'{"schema": 2, "parts": []}',
        *(
            json.dumps({"schema": 2, "parts": parts}).encode()
            for parts in (
                [{"name": "datasets", "shards": []}],
                [{"name": "other", "shards": [SHARD]}],
                [{"name": ["base"], "shards": [SHARD]}],
                [{"name": "base", "shards": [SHARD]}, {"name": "datasets", "shards": [SHARD]}],
                [{"name": "base", "shards": [SHARD]}, {"name": "base", "shards": [SHARD]}],
                [{"name": "base", "shards": [None]}],
                [{"name": "base", "shards": [SHARD | {"num_rows": 0}]}],
                [{"name": "base", "shards": [SHARD | {"num_rows": True}]}],
                [{"name": "base", "shards": [SHARD | {"num_rows": 1.0}]}],
                [{"name": "base", "shards": [SHARD | {"sha256": "../x"}]}],
                [{"name": "base", "shards": [SHARD | {"key": "x"}]}],
                [{"name": "base", "shards": [SHARD]}],  # without a root
            )
        ),
    ],
)
def test_malformed_manifest_is_refused(data):
    with pytest.raises(ValueError, match=r"^(its|it|a|the|one of|must|.*shard) "):
        SnapshotManifest.parse(data)


def test_decompression_stops_at_the_bytes_of_the_manifest(tmp_path):
    bomb = zstandard.compress(b"\n" * 2**28)  # 256 MiB in some kilobytes
    tracemalloc.start()
    with pytest.raises(ShardDamageError, match="more than its 1,000 bytes"):
        decompress_shard(io.BytesIO(bomb), tmp_path / "rows", RowShard("0" * 64, 1000, 1000, len(bomb)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20 and list(tmp_path.iterdir()) == []


def test_shard_that_needs_a_larger_window_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    data = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    stored = data.compress(b"\n" * 2**10) + data.flush()
    with pytest.raises(ShardDamageError, match="cannot be decompressed"):
        list(read_shard_chunks(io.BytesIO(stored), RowShard("0" * 64, 1, 2**10, 1)))


def test_counts_that_are_not_those_of_the_lines_are_refused(tmp_path):
    shard, stored = write_shard([b"1\n", b"22\n"])
    (tmp_path / "stored").write_bytes(stored)
    decompress_shard(tmp_path / "stored", tmp_path / "rows", shard)
    assert (tmp_path / "rows").read_bytes() == b"1\n22\n"
    for changes in ({"num_rows": 3}, {"num_bytes": 6}, {"sha256": "0" * 64}):
        with pytest.raises(ShardDamageError):
            decompress_shard(tmp_path / "stored", tmp_path / "other", dataclasses.replace(shard, **changes))
    assert not (tmp_path / "other").exists()

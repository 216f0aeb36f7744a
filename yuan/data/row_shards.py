"""Row shards: compressed files of rows under the sha256 of their lines, and the manifest of a snapshot made of them."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import zstandard

from yuan.data.text import parse_json

SNAPSHOT_SCHEMA = 2  # schema 1 was one JSONL object without a manifest
SNAPSHOT_PARTS = ("corrections", "datasets", "base")  # in the order of a snapshot's rows
SHARD_TARGET_BYTES = 128 * 2**20  # of uncompressed lines
SHARD_COMPRESSION_LEVEL = 3  # zstd's default; a higher one costs several times the time for a tenth of the bytes
MAX_SHARD_WINDOW_BYTES = 8 * 2**20  # memory that reading a shard may need for zstd's window; level 3 uses 2 MiB
SHARD_CHUNK_BYTES = 2**20
SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")


class ShardDamageError(ValueError):
    """The stored bytes of a row shard are not those that its manifest names."""


@dataclass(frozen=True)
class RowShard:
    """A stored file of rows.

    Attributes:
        sha256: of the uncompressed lines, so it does not depend on the version or level of zstd.
        num_rows: number of lines; each ends with a newline.
        num_bytes: of the uncompressed lines.
        num_stored_bytes: of the compressed file when it was written; not part of the identity.
    """

    sha256: str
    num_rows: int
    num_bytes: int
    num_stored_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a manifest."""
        return {
            "sha256": self.sha256,
            "num_rows": self.num_rows,
            "num_bytes": self.num_bytes,
            "num_stored_bytes": self.num_stored_bytes,
        }

    @classmethod
    def from_json(cls, data: Any) -> "RowShard":
        """Read an entry of a manifest.

        Raises:
            ValueError: if it is not one.
        """
        names = ("num_rows", "num_bytes", "num_stored_bytes")
        if not isinstance(data, dict) or data.keys() != {"sha256", *names}:
            raise ValueError("a shard has other fields than sha256, num_rows, num_bytes and num_stored_bytes")
        sha256 = data["sha256"]
        if not isinstance(sha256, str) or not SHA256_PATTERN.fullmatch(sha256):
            raise ValueError("a shard has a sha256 that is none")
        if not all(type(data[name]) is int and data[name] > 0 for name in names):
            raise ValueError(f"shard {sha256[:12]} has a count that is not a positive integer")
        return cls(**data)


@dataclass(frozen=True)
class SnapshotPart:
    """The shards of one part of a snapshot, in the order of its rows; there is at least one.

    Attributes:
        name: one of `SNAPSHOT_PARTS`.
    """

    name: str
    shards: tuple[RowShard, ...]

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


@dataclass(frozen=True)
class SnapshotManifest:
    """Name the shards of a snapshot; the snapshot's id is `root`.

    Attributes:
        parts: those that have rows, in the order of `SNAPSHOT_PARTS`.

    Raises:
        ValueError: if a part is unknown, out of order or without shards.
    """

    parts: tuple[SnapshotPart, ...]

    def __post_init__(self) -> None:
        names = tuple(part.name for part in self.parts)
        if names != tuple(name for name in SNAPSHOT_PARTS if name in names):
            raise ValueError(f"the parts must be some of {', '.join(SNAPSHOT_PARTS)}, once each and in this order")
        if not self.parts or not all(part.shards for part in self.parts):
            raise ValueError("a snapshot and each of its parts must have a shard")

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def root(self) -> str:
        """Return the Merkle root: a tree of shards for each part, and a list of the parts with their counts.

        The hash of a shard covers its part, sha256, rows and bytes, but not its stored bytes.
        """
        parts = []
        for part in self.parts:
            leaves = [_hash(0, [part.name, shard.sha256, shard.num_rows, shard.num_bytes]) for shard in part.shards]
            parts.append([part.name, len(part.shards), part.num_rows, part.num_bytes, _merge_hashes(leaves).hex()])
        return _hash(2, [SNAPSHOT_SCHEMA, *parts]).hex()

    def to_json(self) -> dict[str, Any]:
        """Return the stored form."""
        parts = [{"name": part.name, "shards": [shard.to_json() for shard in part.shards]} for part in self.parts]
        return {"schema": SNAPSHOT_SCHEMA, "root": self.root, "parts": parts}

    def dump(self) -> bytes:
        """Serialize the stored form; equal manifests give equal bytes."""
        return json.dumps(self.to_json(), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_json(cls, data: Any) -> "SnapshotManifest":
        """Read the stored form, and check that its root is that of its shards.

        Raises:
            ValueError: if it is damaged, or of another schema.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SNAPSHOT_SCHEMA:
            raise ValueError(f"it is no snapshot manifest of schema {SNAPSHOT_SCHEMA}")
        entries = data.get("parts")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("it has no list of parts")
        parts = []
        for entry in entries:
            name, shards = entry.get("name"), entry.get("shards")
            if not isinstance(name, str) or not isinstance(shards, list):
                raise ValueError("one of its parts has no name or no list of shards")
            parts.append(SnapshotPart(name, tuple(map(RowShard.from_json, shards))))
        manifest = cls(tuple(parts))
        if manifest.root != data.get("root"):
            raise ValueError("its root is not that of its shards")
        return manifest

    @classmethod
    def parse(cls, data: bytes) -> "SnapshotManifest":
        """Parse the stored bytes.

        Raises:
            ValueError: if they are damaged, or of another schema.
        """
        return cls.from_json(parse_json(data))


def _hash(kind: int, fields: list[Any]) -> bytes:
    """Hash fields; the kind (leaf, node, root) keeps one of them from being taken for another."""
    return hashlib.sha256(bytes([kind]) + json.dumps(fields, separators=(",", ":")).encode()).digest()


def _merge_hashes(hashes: list[bytes]) -> bytes:
    """Return the root of a binary hash tree; the last one of an odd number moves up as it is."""
    while len(hashes) > 1:
        pairs = [_hash(1, [a.hex(), b.hex()]) for a, b in zip(hashes[::2], hashes[1::2], strict=False)]
        hashes = pairs + hashes[len(pairs) * 2 :]
    return hashes[0]


class ShardWriter:
    """Write the lines of a shard into a compressed temporary file, with bounded memory.

    At the end of the `with` block the file is removed, so store it before.

    Args:
        folder: where the file is created; the default is the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix="shard-", suffix=".zst")
        self.path = Path(name)
        self._file = os.fdopen(descriptor, "wb")
        compressor = zstandard.ZstdCompressor(level=SHARD_COMPRESSION_LEVEL, write_checksum=True)
        self._compressed = compressor.stream_writer(self._file, closefd=False)
        self._digest = hashlib.sha256()
        self.num_rows = self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def add(self, line: bytes) -> None:
        """Add one row's line, which ends with its only newline."""
        assert line.find(b"\n") == len(line) - 1, "one line"
        self.add_lines(line)

    def add_lines(self, lines: bytes) -> None:
        """Add the lines of any number of rows, each of which ends with its only newline."""
        self._compressed.write(lines)
        self._digest.update(lines)
        self.num_rows += lines.count(b"\n")
        self.num_bytes += len(lines)

    def finish(self) -> tuple[RowShard, Path]:
        """Complete the file, and return the shard and the file's path."""
        self._compressed.flush(zstandard.FLUSH_FRAME)
        self._file.flush()
        shard = RowShard(self._digest.hexdigest(), self.num_rows, self.num_bytes, self.path.stat().st_size)
        return shard, self.path


def read_shard_chunks(stored: BinaryIO, shard: RowShard) -> Iterator[bytes]:
    """Yield the uncompressed bytes of a stored shard in chunks of at most 1 MiB; never more than `num_bytes` in all.

    What was yielded is verified only after the last chunk, so keep no result of it before.

    Raises:
        ShardDamageError: if the stored bytes are not those of the shard.
    """
    digest = hashlib.sha256()
    num_bytes = num_rows = 0
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_SHARD_WINDOW_BYTES)
    try:
        with decompressor.stream_reader(stored, closefd=False) as stream:
            while chunk := stream.read(SHARD_CHUNK_BYTES):
                num_bytes += len(chunk)
                num_rows += chunk.count(b"\n")
                if num_bytes > shard.num_bytes:
                    raise ShardDamageError(f"it has more than its {shard.num_bytes:,} bytes")
                digest.update(chunk)
                yield chunk
    except zstandard.ZstdError as error:
        raise ShardDamageError(f"it cannot be decompressed ({error})") from None
    if digest.hexdigest() != shard.sha256:
        raise ShardDamageError(f"its {num_bytes:,} bytes have another sha256, {digest.hexdigest()[:12]}")
    if (num_bytes, num_rows) != (shard.num_bytes, shard.num_rows):
        raise ShardDamageError(
            f"it has {num_rows:,} rows of {num_bytes:,} bytes, and its manifest says {shard.num_rows:,} of "
            f"{shard.num_bytes:,}"
        )


def decompress_shard(stored: Path | BinaryIO, target: Path, shard: RowShard) -> None:
    """Expand a stored shard into a file of lines, with bounded memory; the file exists only if it is verified.

    Raises:
        ShardDamageError: if the stored bytes are not those of the shard.
    """
    if isinstance(stored, Path):
        with stored.open("rb") as stream:
            return decompress_shard(stream, target, shard)
    _write_verified(read_shard_chunks(stored, shard), target)


def _write_verified(chunks: Iterable[bytes], target: Path) -> None:
    """Write chunks to a file that has its name only once the last one was yielded without an error."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.writelines(chunks)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)

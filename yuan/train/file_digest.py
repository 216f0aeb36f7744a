"""Digests of files: size and sha256, as the manifest of a checkpoint and the seal of a run store them."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from yuan.safe_files import hash_stream, open_file


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size and sha256 of a file."""

    num_bytes: int
    sha256: str

    def to_json(self) -> dict[str, int | str]:
        return {"bytes": self.num_bytes, "sha256": self.sha256}

    @classmethod
    def from_json(cls, data: object) -> "FileDigest":
        """Read a stored digest.

        Raises:
            ValueError: if size or sha256 is missing or wrong.
        """
        entry = data if isinstance(data, Mapping) else {}
        num_bytes, sha256 = entry.get("bytes"), entry.get("sha256")
        if not isinstance(num_bytes, int) or num_bytes < 0 or not isinstance(sha256, str) or not sha256:
            raise ValueError(f"a file needs a size in bytes and a sha256, got {num_bytes!r} and {sha256!r}")
        return cls(num_bytes=num_bytes, sha256=sha256)


@dataclass(frozen=True, kw_only=True)
class SealedFile:
    """The digest of a file, and the inode and times that the file had when it was verified.

    Attributes:
        identity: inode, and times in nanoseconds of the last changes of content and inode; none if it is not known.
            The last one cannot be set, so an edit that restores the first ones is noticed as well.
    """

    digest: FileDigest
    identity: tuple[int, ...] = ()

    def to_json(self) -> dict[str, object]:
        identity = {"identity": list(self.identity)} if self.identity else {}
        return {**self.digest.to_json(), **identity}

    @classmethod
    def from_json(cls, data: object) -> "SealedFile":
        """Read a stored entry; one of an earlier release has no identity.

        Raises:
            ValueError: if it is damaged.
        """
        digest = FileDigest.from_json(data)
        identity = data.get("identity", []) if isinstance(data, Mapping) else []
        if not isinstance(identity, list) or not all(type(number) is int for number in identity):
            raise ValueError("the identity of a file must be numbers")
        return cls(digest=digest, identity=tuple(identity))


def seal_file(file: Path, digest: FileDigest | None = None) -> SealedFile:
    """Return the seal of a file.

    Args:
        digest: of its content, if it is known; else the file is read.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
    """
    identity = read_identity(file.parent, file.name)[1]
    return SealedFile(digest=digest or compute_digest(file), identity=identity)


def read_identity(folder: Path, name: str) -> tuple[int, tuple[int, ...]]:
    """Return the size of a file below a trusted folder, and what `SealedFile.identity` has of it.

    Raises:
        OSError: if it does not exist, or is not a regular file.
    """
    descriptor = open_file(folder, name)
    try:
        facts = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return facts.st_size, (facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns)


def digest_content(content: bytes) -> FileDigest:
    """Return the digest of a file with this content."""
    return FileDigest(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def compute_digest(file: Path) -> FileDigest:
    """Read a file and return its digest.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
    """
    with os.fdopen(open_file(file.parent, file.name), "rb") as stream:
        return FileDigest(num_bytes=os.fstat(stream.fileno()).st_size, sha256=hash_stream(stream))


def find_file_size(folder: Path, name: str) -> int | None:
    """Return the size of a regular file below a trusted folder in bytes; None if there is none."""
    try:
        descriptor = open_file(folder, name)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as stream:
        return os.fstat(stream.fileno()).st_size


def find_difference(folder: Path, name: str, expected: FileDigest) -> str | None:
    """Describe how a file below a trusted folder differs from its digest; a file of another size is not read."""
    try:
        with os.fdopen(open_file(folder, name), "rb") as stream:
            num_bytes = os.fstat(stream.fileno()).st_size
            if num_bytes != expected.num_bytes:
                return f"has {num_bytes} bytes, not {expected.num_bytes}"
            sha256 = hash_stream(stream)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if sha256 == expected.sha256 else "has another sha256"

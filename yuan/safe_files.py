"""Open, read and replace files below a folder that the caller trusts, while others create entries in it.

A compromised rank can create links to other files, FIFOs that block a reader, and files of unlimited size. So no link
is followed, in any component of a path; no open blocks; and every read has a limit.
"""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

MAX_FILE_NAME_BYTES = 255  # of Linux file systems (NAME_MAX)
MAX_SMALL_FILE_BYTES = 16 * 2**20  # limit for a status, an exit note or a manifest
LFS_POINTER_START = b"version https://git-lfs"  # what a clone has for a large file without Git LFS
LFS_POINTER_REASON = "is only a pointer of Git LFS, not the file; fetch the file with `git lfs pull`"
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class NotRegularFileError(OSError):
    """The path is a link, a FIFO, a folder or a file that is too large, where a regular file was expected."""

    def __init__(self, path: Path, why: str = "is not a regular file") -> None:
        super().__init__(errno.EINVAL, why, str(path))


@contextmanager
def open_folder(root: Path, name: str = ".") -> Iterator[int]:
    """Open a folder below a trusted one, for use as `dir_fd`.

    Raises:
        FileNotFoundError: if it does not exist.
        NotRegularFileError: if it, or a parent folder below `root`, is a link or not a folder.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in Path(name).parts:
            if part in ("..", "/"):
                raise NotRegularFileError(root / name, "is outside of its folder")
            try:
                inner = os.open(part, FOLDER_FLAGS, dir_fd=descriptor)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise NotRegularFileError(root / name, "has a link or a file as a parent folder") from None
                raise
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def is_plain_file_name(name: object) -> bool:
    """Return True if a name is that of a file in the same folder: without separators, and not `..`.

    >>> is_plain_file_name("model.safetensors"), is_plain_file_name("../x"), is_plain_file_name("..")
    (True, False, False)
    """
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\"):
        return False
    return len(name.encode()) <= MAX_FILE_NAME_BYTES


def open_file(root: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """Open a regular file below a trusted folder and return its descriptor.

    Raises:
        FileNotFoundError: if it does not exist.
        NotRegularFileError: if it is anything else, or a parent folder is a link.
    """
    with open_folder(root, str(Path(name).parent)) as folder:
        try:
            descriptor = os.open(
                Path(name).name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=folder
            )
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # ENXIO: a FIFO without a reader
                raise NotRegularFileError(root / name) from None
            raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularFileError(root / name)
    return descriptor


def is_file(root: Path, name: str) -> bool:
    """Check that a name below a trusted folder is a regular file that can be opened."""
    try:
        os.close(open_file(root, name))
    except OSError:
        return False
    return True


def read_file(root: Path, name: str, limit: int = MAX_SMALL_FILE_BYTES) -> bytes:
    """Read a small file.

    Raises:
        FileNotFoundError: if it does not exist.
        NotRegularFileError: if it is not a regular file, or larger than the limit.
    """
    with os.fdopen(open_file(root, name), "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise NotRegularFileError(root / name, f"has more than {limit} bytes")
    return data


def has_input_file(path: Path) -> bool:
    """Return True if a file that a person has put there exists; a download cache is made of links, so these count.

    Raises:
        ValueError: if something is there that cannot be a file to read: a folder, a FIFO, a link without a target.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise ValueError(f"{path} is a link to a file that does not exist; fetch the model again") from None
        return False
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); correct it") from None
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{path} must be a file, got a {'folder' if stat.S_ISDIR(mode) else 'special file'}; remove it"
        )
    return True


def read_input_file(path: Path, limit: int = MAX_SMALL_FILE_BYTES) -> bytes:
    """Read a small file that a person has put there; links are followed.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is not a file, cannot be read, is larger than the limit, or is only a pointer of Git LFS.
    """
    if not has_input_file(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); correct its permissions") from None
    if len(data) > limit:
        raise ValueError(f"{path} must have at most {limit} bytes; fetch the model again")
    if data.startswith(LFS_POINTER_START):
        raise ValueError(f"{path} {LFS_POINTER_REASON}")
    return data


def read_regular_file(path: Path, limit: int) -> bytes:
    """Read a file that a person names, anywhere; links are followed, and no FIFO or device blocks or is read.

    Raises:
        OSError: if it does not exist or cannot be read.
        NotRegularFileError: if it is not a regular file, or larger than the limit.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise NotRegularFileError(path)
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise NotRegularFileError(path, f"has more than {limit:,} bytes")
    return data


def read_file_end(root: Path, name: str, limit: int) -> bytes:
    """Read the last bytes of a file of any size.

    Raises:
        OSError: if it does not exist, or is not a regular file.
    """
    with os.fdopen(open_file(root, name), "rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - limit))
        return stream.read(limit)


def open_to_append(root: Path, name: str) -> int:
    """Open a file for appending and reading; remove an entry that is not a regular file or has further hard links."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    try:
        descriptor = open_file(root, name, flags)
        if os.fstat(descriptor).st_nlink == 1:
            return descriptor
        os.close(descriptor)
    except NotRegularFileError:
        pass
    remove_entry(root, name)
    return open_file(root, name, flags | os.O_EXCL)


def replace_file_below(root: Path, name: str, data: bytes) -> None:
    """Replace a file below a trusted folder atomically: a reader never sees a partial file, no link is followed."""
    scratch = f".{Path(name).name}.{os.getpid()}"
    inner = str(Path(name).parent / scratch)
    remove_entry(root, inner)
    with os.fdopen(open_file(root, inner, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as out:
        out.write(data)
    with open_folder(root, str(Path(name).parent)) as folder:
        try:
            os.replace(scratch, Path(name).name, src_dir_fd=folder, dst_dir_fd=folder)
        except IsADirectoryError:
            shutil.rmtree(Path(name).name, dir_fd=folder)
            os.replace(scratch, Path(name).name, src_dir_fd=folder, dst_dir_fd=folder)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yield an empty scratch folder beside the target; it replaces the target if the block completes.

    If the block fails, the scratch folder remains, and the next call removes it.
    """
    scratch = target.with_name(f".{target.name}")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    remove_entry(scratch.parent, scratch.name)
    scratch.mkdir()
    yield scratch
    move_folder(scratch, target.parent, target.name)


def move_folder(scratch: Path, root: Path, name: str) -> None:
    """Move a folder to a name below a trusted one, and remove what is there; no link is followed."""
    remove_entry(root, name)
    with open_folder(root, str(Path(name).parent)) as folder:
        os.rename(scratch, Path(name).name, dst_dir_fd=folder)


def remove_entry(root: Path, name: str) -> None:
    """Remove a file, a link itself, or a folder with its contents; do nothing if it does not exist.

    Raises:
        NotRegularFileError: if a parent folder is a link.
    """
    with open_folder(root, str(Path(name).parent)) as folder:
        try:
            os.unlink(Path(name).name, dir_fd=folder)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):
            shutil.rmtree(Path(name).name, dir_fd=folder)


def hash_stream(stream: BufferedReader) -> str:
    """Return the sha256 of the rest of an open file, which is read in blocks."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


def list_names(root: Path, name: str) -> list[str]:
    """List a folder below a trusted one, sorted; return [] if it is missing, a link, no folder, or unreadable."""
    try:
        with open_folder(root, name) as folder:
            return sorted(os.listdir(folder))
    except OSError:
        return []

"""Messages about files of weights that cannot be read."""

import pickle
from pathlib import Path

from yuan.data.text import make_printable
from yuan.safe_files import LFS_POINTER_REASON, LFS_POINTER_START

MAX_TENSOR_NAME_CHARS = 100  # in a message


def format_tensor_name(name: str) -> str:
    return make_printable(name, MAX_TENSOR_NAME_CHARS)


class DamageReporter:
    """Convert the errors that a damaged file raises, which are of every type, into one ValueError that names it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception):
            return
        if isinstance(error, OSError):
            raise ValueError(f"{self._path} cannot be read ({error.strerror or error}); correct it") from None
        if _is_lfs_pointer(self._path):
            raise ValueError(f"{self._path} {LFS_POINTER_REASON}") from None
        is_pickle = isinstance(error, pickle.UnpicklingError)  # torch's text advises to load it without protection
        reason = "it is no pickle of tensors" if is_pickle else make_printable(str(error).partition("\n")[0])
        reason = reason or type(error).__name__
        raise ValueError(f"{self._path} is damaged ({reason}); fetch the model again") from None


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(LFS_POINTER_START)) == LFS_POINTER_START

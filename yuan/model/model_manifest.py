"""The manifest of a model folder: its files with their sha256, and what the weights are; does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yuan.data.text import parse_json
from yuan.safe_files import is_plain_file_name

MODEL_MANIFEST_FILE = "manifest.json"
MODEL_MANIFEST_SCHEMA = 1


@dataclass(frozen=True)
class ModelManifest:
    """Content of a model folder; the file is written last, so that it marks the folder as complete.

    Attributes:
        files: sha256 by file name, without folders.
        about: further fields as they are stored, such as the run, the snapshot and the step of the weights.
        schema: None if the manifest states none.
    """

    files: Mapping[str, str]
    about: Mapping[str, Any]
    schema: int | None = MODEL_MANIFEST_SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are stored."""
        schema = {} if self.schema is None else {"schema": self.schema}
        return {**schema, "files": dict(self.files), **self.about}

    @classmethod
    def from_json(cls, fields: Any) -> "ModelManifest":
        """Read the fields of a manifest.

        Raises:
            ValueError: if it is not an object whose `files` maps file names, without folders, to sha256 sums.

        >>> ModelManifest.from_json({"files": {"config.json": 5}})
        Traceback (most recent call last):
        ValueError: it has no `files` with a sha256 for each name; fetch the model again
        """
        files = fields.get("files") if isinstance(fields, dict) else None
        is_valid = isinstance(files, dict) and all(
            isinstance(digest, str) and is_plain_file_name(name) for name, digest in files.items()
        )
        if not files or not is_valid:
            raise ValueError("it has no `files` with a sha256 for each name; fetch the model again")
        about = {name: value for name, value in fields.items() if name not in ("schema", "files")}
        return cls(files, about, fields.get("schema"))

    @classmethod
    def parse(cls, text: str | bytes) -> "ModelManifest":
        """Parse the text of a manifest.

        Raises:
            ValueError: if it is not JSON with finite numbers and storable texts, or has no valid `files`.
        """
        return cls.from_json(parse_json(text))


def parse_digests(text: bytes) -> Mapping[str, str]:
    """Return the sha256 of each file that a manifest lists.

    Raises:
        ValueError: as `ModelManifest.parse`.
    """
    return ModelManifest.parse(text).files

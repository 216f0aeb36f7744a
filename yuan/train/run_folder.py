"""The run folder: what goes in, what comes out, and which files hold it (design: a run is a folder)."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuan.config import ModelConfig, Recipe
from yuan.data.corpus import Corpus, list_corpus_files, write_corpus
from yuan.data.samples import Sample
from yuan.plan.plan_record import PipelinePlan
from yuan.train.checkpoint_manifest import (
    CHECKPOINT_MANIFEST_FILE,
    compute_digest,
    find_difference,
    list_committed_checkpoints,
    read_sealed_manifest,
)
from yuan.train.run_files import NotRegularFileError, is_file, open_file, open_to_append, read_file, replace_file

RUN_KINDS = ("pretrain", "continue", "finetune")
RUN_SPEC_FILE, SEAL_FILE, TOKENIZER_FILE = "run.json", "seal.json", "tokenizer.model"
METRICS_FILE, EVENTS_FILE, PLAN_PICTURE_FILE = "metrics.jsonl", "events.jsonl", "plan.svg"
LOG_READ_BYTES, MAX_LOG_READS = 16 * 2**20, 256  # of a log: read at once, and how often for the whole of it
PREVIOUS_SPEC_KEY = "run.json before"  # in the seal: what run.json was until it was replaced


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """run.json, read and checked.

    `snapshot` and `parent` are ids for people and lineage; the bytes lie beside run.json in data/, tokenizer.model and,
    if there is a parent, parent/.
    """

    kind: str
    model: ModelConfig
    snapshot: str
    plan: PipelinePlan
    recipe: Recipe
    seed: int
    parent: str | None
    schema: int = 1

    def __post_init__(self) -> None:
        if self.kind not in RUN_KINDS:
            raise ValueError(f"kind must be one of {RUN_KINDS}, got {self.kind!r}")
        if (self.kind == "pretrain") != (self.parent is None):
            raise ValueError(f"a pretrain run has no parent and the others have one, got {self.kind}, {self.parent}")
        if self.plan.bounds[-1] != self.model.num_layers:
            raise ValueError(
                f"the plan lays out {self.plan.bounds[-1]} layers and the model has {self.model.num_layers}; plan again"
            )
        if not self.plan.feasible:
            raise ValueError(f"the plan is not feasible: {self.plan.explanation}")
        planned = (self.plan.sequence_length, self.plan.global_batch_size, self.plan.micro_batch_size)
        asked = (self.recipe.seq_len, self.recipe.global_batch_size, self.recipe.micro_batch_size)
        if planned != asked:
            raise ValueError(f"plan and recipe differ in (seq_len, global, micro batch): {planned} and {asked}")

    @property
    def order(self) -> dict[str, Any]:
        """What decides which window is trained when; no plan has a part in it."""
        recipe = self.recipe
        return {
            "snapshot": self.snapshot,
            "seed": self.seed,
            "global_batch_size": recipe.global_batch_size,
            "seq_len": recipe.seq_len,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": self.schema,
            "kind": self.kind,
            "model": self.model.to_json(),
            "snapshot": self.snapshot,
            "plan": self.plan.to_json(),
            "recipe": self.recipe.to_json(),
            "seed": self.seed,
            "parent": self.parent,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RunSpec":
        """Rebuild a run from run.json.

        Raises:
            ValueError: if a field is missing, unknown or contradicts another.
        """
        try:
            if data["schema"] != cls.schema:
                raise ValueError(
                    f"run.json has schema {data['schema']}, this version reads {cls.schema}; prepare a new run"
                )
            parts = {
                "model": ModelConfig.from_json(data["model"]),
                "plan": PipelinePlan.from_json(data["plan"]),
                "recipe": Recipe.from_json(data["recipe"]),
            }
            return cls(**{**data, **parts})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a run.json of schema 1: {error}") from None


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one training run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def parent(self) -> Path:
        return self.path / "parent"

    @property
    def data(self) -> Path:
        return self.path / "data"

    def read_spec(self) -> RunSpec:
        """Read run.json.

        Raises:
            ValueError: if it is missing, not as it was written, or contradicts itself.
        """
        try:
            text = read_file(self.path, RUN_SPEC_FILE)
        except FileNotFoundError:
            raise ValueError(f"{self.path} has no {RUN_SPEC_FILE}; lay the run out first") from None
        except NotRegularFileError as error:
            raise ValueError(f"{self.path / RUN_SPEC_FILE} {error.strerror}; lay out a new run") from None
        known = [
            entry.get("sha256")
            for name, entry in self._read_seal().items()
            if name in (RUN_SPEC_FILE, PREVIOUS_SPEC_KEY)
        ]
        if hashlib.sha256(text).hexdigest() not in known:
            raise ValueError(
                f"{self.path / RUN_SPEC_FILE} is not as it was laid out: somebody edited it; put it back, or lay out "
                "a new run with the settings that are wanted"
            )
        return RunSpec.from_json(json.loads(text))

    def prepare(
        self,
        spec: RunSpec,
        sources: Mapping[str, Iterable[Sample]],
        *,
        pad: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Lay out a run's inputs beside its tokenizer; run.json comes last, so that a folder that has it is whole.

        Args:
            sources: the samples of each source; see `write_corpus`.
            pad: the token that fills windows up.
        """
        self.write_inputs(spec, sources, pad=pad, weights=weights)
        self.write_spec(spec)

    def write_inputs(
        self,
        spec: RunSpec,
        sources: Mapping[str, Iterable[Sample]],
        *,
        pad: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Lay out a run's inputs like `write`, and leave it to the caller to make the folder whole by `write_spec`."""
        write_corpus(self.data, sources, seq_len=spec.recipe.seq_len, pad=pad, weights=weights)
        files = [*list_corpus_files(self.data), self.path / TOKENIZER_FILE]
        self._write_seal({str(file.relative_to(self.path)): compute_digest(file) for file in files})

    def write_spec(self, spec: RunSpec) -> None:
        """Replace run.json, for another plan; the seal knows both, so a kill between the two writes does no harm."""
        text = json.dumps(spec.to_json(), indent=2)
        digest = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        before = (
            {PREVIOUS_SPEC_KEY: compute_digest(self.path / RUN_SPEC_FILE)}
            if (self.path / RUN_SPEC_FILE).exists()
            else {}
        )
        self._write_seal({**self._read_seal(), **before, RUN_SPEC_FILE: digest})
        write_json(self.path / RUN_SPEC_FILE, spec.to_json())

    def check_inputs(self) -> RunSpec:
        """Read every input and compare it with what was laid out; for those who are about to take devices.

        Raises:
            ValueError: naming each file that is missing or another.
        """
        spec = self.read_spec()
        wrong = []
        for name, expected in self._read_seal().items():
            if name in (RUN_SPEC_FILE, PREVIOUS_SPEC_KEY):  # compared above
                continue
            bad = find_difference(self.path, name, expected)
            if bad:
                wrong.append(f"{name} {bad if bad.startswith('cannot') else 'is not as it was laid out'}")
        wrong += self._find_foreign_checkpoints(spec)
        # May be a link that the operator made to a model folder; nothing of it is read here.
        if spec.parent is not None and not (self.parent / "manifest.json").is_file():
            wrong.append(f"parent/ has no manifest of {spec.parent}")
        if wrong:
            raise ValueError(f"the run folder {self.path} has changed: {'; '.join(wrong)}; lay out a new run")
        return spec

    def _find_foreign_checkpoints(self, spec: RunSpec) -> list[str]:
        """Checkpoints of another model or another order of data; a damaged manifest is for the ranks to pass over."""
        wrong = []
        for path in list_committed_checkpoints(self.checkpoints):
            manifest = read_sealed_manifest(path / CHECKPOINT_MANIFEST_FILE)
            if manifest is None:
                continue
            if manifest["model"] != spec.model.to_json():
                wrong.append(f"checkpoint {path.name} is of the model {manifest['model']}")
            elif any(manifest["order"].get(key) != value for key, value in spec.order.items()):
                wrong.append(f"checkpoint {path.name} is of another order of data, {manifest['order']}")
        return wrong

    def open_corpus(self, seed: int) -> Corpus:
        return Corpus(self.data, seed)

    def _read_seal(self) -> dict[str, Any]:
        try:
            return dict(json.loads(read_file(self.path, SEAL_FILE)))
        except (FileNotFoundError, NotRegularFileError, ValueError):
            return {}

    def _write_seal(self, files: Mapping[str, Any]) -> None:
        write_json(self.path / SEAL_FILE, dict(files))

    def read_status(self) -> dict[str, Any]:
        """The newest status.json; empty before the first step, and if it is no file of ours."""
        try:
            return dict(json.loads(read_file(self.path, "status.json")))
        except (FileNotFoundError, NotRegularFileError, ValueError):
            return {}

    @property
    def is_exported(self) -> bool:
        """Whether the weights are exported."""
        return is_file(self.path, "export/manifest.json")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl; who asks again and again reads `LogTail`."""
        return LogTail(self.path / METRICS_FILE).read_all()

    def read_events(self) -> list[dict[str, Any]]:
        """Every whole line of events.jsonl."""
        return LogTail(self.path / EVENTS_FILE).read_all()

    def replace_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Put these in place of all metrics, in one step."""
        replace_file(self.path, METRICS_FILE, "".join(f"{json.dumps(row)}\n" for row in rows).encode())

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a log; after one that a full disk has torn, on a line of its own."""
        with os.fdopen(open_to_append(self.path, name), "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            else:
                torn = False
            file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


class LogTail:
    """The records of a log that have come since one asked last; from the start again once the file was replaced."""

    def __init__(self, file: Path) -> None:
        self._file, self._inode, self._offset = file, 0, 0
        self.has_more = False  # whether the last reading ended before the file did

    def read(self) -> list[dict[str, Any]]:
        """Of the lines that have ended, those that are records; a torn one is left out.

        At most `LOG_READ_BYTES` are read at once, and the following ones the next time.
        """
        try:
            with os.fdopen(open_file(self._file.parent, self._file.name), "rb") as stream:
                found = os.fstat(stream.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._inode, self._offset = found.st_ino, 0
                stream.seek(self._offset)
                new = stream.read(LOG_READ_BYTES)
        except (FileNotFoundError, NotRegularFileError):
            self.has_more = False
            return []
        self.has_more = len(new) == LOG_READ_BYTES
        whole = new[: new.rfind(b"\n") + 1]
        if self.has_more and not whole:  # no line of ours is as long
            whole = new
        self._offset += len(whole)
        return [row for line in whole.split(b"\n") if (row := _parse_record(line))]

    def read_all(self) -> list[dict[str, Any]]:
        """Read to the end; of a log of more than 4 GiB, which no run writes, the rest is left out."""
        found = self.read()
        for _ in range(MAX_LOG_READS - 1):
            if not self.has_more:
                break
            found += self.read()
        return found


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return None


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a JSON file in one step, so that a reader never sees half of it."""
    replace_file(path.parent, path.name, json.dumps(data, indent=2).encode())

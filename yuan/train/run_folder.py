"""The run folder: inputs, outputs, and the files that hold them (design: a run is a folder)."""

import json
import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuan.config import RUN_SPEC_FILE
from yuan.data.corpus import Corpus, list_corpus_files, write_corpus
from yuan.data.samples import Sample
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, ModelManifest
from yuan.safe_files import NotRegularFileError, is_file, open_to_append, read_file, replace_file_below
from yuan.tokenizer import TOKENIZER_MODEL_FILE
from yuan.train.checkpoint_manifest import (
    CHECKPOINT_MANIFEST_FILE,
    MAX_CHECKPOINT_MANIFEST_BYTES,
    CheckpointManifest,
    format_checkpoint_name,
    list_committed_checkpoints,
    parse_sealed_manifest,
    parse_step,
    read_manifest,
)
from yuan.train.events import RunEvent, parse_event
from yuan.train.file_digest import (
    FileDigest,
    SealedFile,
    compute_digest,
    digest_content,
    find_difference,
    find_file_size,
    read_identity,
    seal_file,
)
from yuan.train.log_tail import LogTail
from yuan.train.metrics_row import MetricsRow, parse_metrics_rows
from yuan.train.rank_json import get_count, parse_rank_object
from yuan.train.run_spec import ParentState, RunSpec
from yuan.train.run_status import RunStatus

SEAL_FILE = "seal.json"
PLAN_FILE = "plan.json"
PLAN_PICTURE_FILE = "plan.svg"
STATUS_FILE = "status.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
MAX_EVENTS = 100_000  # that are kept in memory, of an endless log of a compromised rank
TRAIN_LOG_FILE = "train.log"  # the ranks' output
PREVIOUS_SPEC_KEY = "run.json before"  # in the seal: digest of the run.json that was replaced last


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one training run's folder."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step, whether it exists or not."""
        return self.checkpoints / format_checkpoint_name(step)

    def newest_step(self) -> int:
        """Return the step of the newest committed checkpoint; 0 if there is none."""
        return max(map(parse_step, list_committed_checkpoints(self.checkpoints)), default=0)

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def parent(self) -> Path:
        return self.path / "parent"

    @property
    def parent_state(self) -> Path:
        """Return the folder of the checkpoint of the parent's run; a run that starts from its weights has none."""
        return self.path / "parent_state"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def validation(self) -> Path:
        """Return the folder of the windows that validate; a run without validation has none."""
        return self.path / "validation"

    def read_spec(self) -> RunSpec:
        """Read run.json.

        Raises:
            ValueError: if it is missing, differs from its seal, or contradicts itself.
        """
        try:
            text = read_file(self.path, RUN_SPEC_FILE)
        except FileNotFoundError:
            raise ValueError(f"{self.path} has no {RUN_SPEC_FILE}; prepare the run first") from None
        except NotRegularFileError as error:
            raise ValueError(f"{self.path / RUN_SPEC_FILE} {error.strerror}; prepare a new run") from None
        seal = self._read_seal()
        accepted = [seal[name].digest for name in (RUN_SPEC_FILE, PREVIOUS_SPEC_KEY) if name in seal]
        if digest_content(text) not in accepted:
            raise ValueError(
                f"{self.path / RUN_SPEC_FILE} differs from its seal: it was edited manually; restore it, or prepare "
                "a new run with the new settings"
            )
        return RunSpec.from_json(parse_rank_object(text))

    def prepare(
        self,
        spec: RunSpec,
        sources: Mapping[str, Iterable[Sample]],
        *,
        pad: int,
        weights: Mapping[str, float] | None = None,
        validation: Mapping[str, Iterable[Sample]] | None = None,
    ) -> None:
        """Write a run's inputs beside its tokenizer; run.json is written last, so a folder that has it is complete.

        Args:
            sources: the samples of each source; see `write_corpus`.
            pad: id of the padding token that fills windows.
            validation: the samples of each source that validate; None if the run does not validate.
        """
        write_corpus(self.data, sources, seq_len=spec.train_config.seq_len, pad=pad, weights=weights)
        if validation is not None:
            write_corpus(self.validation, validation, seq_len=spec.train_config.seq_len, pad=pad)
        self.seal_inputs()
        self.write_spec(spec)

    def seal_inputs(self, digests: Mapping[Path, FileDigest] | None = None) -> None:
        """Record the digests of corpus and tokenizer; the caller completes the folder with `write_spec`.

        Args:
            digests: of files that were verified as they were written; the others are read.
        """
        corpora = [folder for folder in (self.data, self.validation) if folder.is_dir()]
        files = [*(file for folder in corpora for file in list_corpus_files(folder)), self.path / TOKENIZER_MODEL_FILE]
        digests = digests or {}
        self._write_seal({str(file.relative_to(self.path)): seal_file(file, digests.get(file)) for file in files})

    def write_spec(self, spec: RunSpec) -> None:
        """Replace run.json, for another plan; the seal accepts both, so a kill between the two writes does no harm."""
        file, content = self.path / RUN_SPEC_FILE, json.dumps(spec.to_json(), indent=2).encode()
        seal = self._read_seal()
        if file.exists():
            seal[PREVIOUS_SPEC_KEY] = SealedFile(digest=compute_digest(file))
        seal[RUN_SPEC_FILE] = SealedFile(digest=digest_content(content))
        self._write_seal(seal)
        replace_file_below(self.path, RUN_SPEC_FILE, content)

    def check_inputs(self) -> RunSpec:
        """Compare every input with the seal; call this before devices are allocated.

        A file whose size, inode and times are those of its last verification is not read again.

        Raises:
            ValueError: if files are missing or differ; the message names each of them.
        """
        spec = self.read_spec()
        problems = []
        seal = self._read_seal()
        verified = {}
        for name, sealed in seal.items():
            if name in (RUN_SPEC_FILE, PREVIOUS_SPEC_KEY):  # verified by read_spec
                continue
            identity = self._read_identity(name, sealed.digest.num_bytes)
            if identity and identity == sealed.identity:
                continue
            difference = find_difference(self.path, name, sealed.digest)
            if difference:
                problems.append(f"{name} {difference if difference.startswith('cannot') else 'differs from its seal'}")
            else:
                verified[name] = SealedFile(digest=sealed.digest, identity=identity)
        if verified:
            self._write_seal({**seal, **verified})
        problems += self._find_foreign_checkpoints(spec)
        # The operator may have linked parent/ to a model folder; nothing of it is read here.
        if spec.parent is not None and not (self.parent / MODEL_MANIFEST_FILE).is_file():
            problems.append(f"parent/ has no manifest of {spec.parent}")
        if spec.parent_state is not None and not any(list_committed_checkpoints(self.checkpoints)):
            problems += self._find_parent_state_problems(spec.parent_state)
        if problems:
            raise ValueError(f"the run folder {self.path} has changed: {'; '.join(problems)}; prepare a new run")
        return spec

    def _read_identity(self, name: str, num_bytes: int) -> tuple[int, ...]:
        """Return the identity of an input of a size; empty if it has another size or cannot be opened."""
        try:
            size, identity = read_identity(self.path, name)
        except OSError:
            return ()
        return identity if size == num_bytes else ()

    def read_parent_manifest(self, state: ParentState) -> CheckpointManifest:
        """Read the manifest of the checkpoint in parent_state/.

        Raises:
            ValueError: if it is missing, or not the one that run.json names.
        """
        name = format_checkpoint_name(state.step)
        try:
            content = read_file(self.parent_state, f"{name}/{CHECKPOINT_MANIFEST_FILE}", MAX_CHECKPOINT_MANIFEST_BYTES)
        except OSError as error:
            raise ValueError(f"the manifest of parent_state/{name} cannot be read: {error.strerror}") from None
        manifest = parse_sealed_manifest(content)
        if manifest is None or digest_content(content).sha256 != state.manifest_sha256:
            raise ValueError(f"the manifest of parent_state/{name} differs from run.json")
        return manifest

    def _find_parent_state_problems(self, state: ParentState) -> list[str]:
        """List what of the parent's state is missing, by size; the ranks compare the content."""
        try:
            manifest = self.read_parent_manifest(state)
        except ValueError as error:
            return [str(error)]
        name = format_checkpoint_name(state.step)
        return [
            f"parent_state/{name}/{file} is missing or has another size"
            for file, digest in manifest.list_files(with_moments=state.with_moments).items()
            if find_file_size(self.parent_state, f"{name}/{file}") != digest.num_bytes
        ]

    def _find_foreign_checkpoints(self, spec: RunSpec) -> list[str]:
        """List checkpoints of another model or data order; the ranks themselves skip damaged manifests."""
        problems = []
        for path in list_committed_checkpoints(self.checkpoints):
            manifest = read_manifest(path)
            if manifest is None:
                continue
            if manifest.model != spec.model.to_json():
                problems.append(f"checkpoint {path.name} is of the model {manifest.model}")
            elif any(manifest.order.get(key) != value for key, value in spec.order.items()):
                problems.append(f"checkpoint {path.name} is of another order of data, {manifest.order}")
        return problems

    def open_corpus(self, seed: int) -> Corpus:
        return Corpus(self.data, seed)

    def open_validation_corpus(self) -> Corpus:
        """Return the windows that validate; their order does not matter, and is that of one seed."""
        return Corpus(self.validation, seed=0)

    def _read_seal(self) -> dict[str, SealedFile]:
        """Return the digests of the inputs by file name; none if the seal is missing or not valid."""
        try:
            stored = parse_rank_object(read_file(self.path, SEAL_FILE))
            return {name: SealedFile.from_json(entry) for name, entry in stored.items()}
        except (FileNotFoundError, NotRegularFileError, ValueError, TypeError):
            return {}

    def _write_seal(self, files: Mapping[str, SealedFile]) -> None:
        write_json(self.path / SEAL_FILE, {name: sealed.to_json() for name, sealed in files.items()})

    def read_status(self) -> RunStatus | None:
        """Read status.json; return None before the first step, and if the file is not valid."""
        try:
            return RunStatus.from_json(parse_rank_object(read_file(self.path, STATUS_FILE)))
        except (FileNotFoundError, NotRegularFileError, ValueError, TypeError):
            return None

    def write_status(self, status: RunStatus) -> None:
        """Replace status.json."""
        write_json(self.path / STATUS_FILE, status.to_json())

    @property
    def is_finished(self) -> bool:
        """Return True if the run is complete: its weights are exported."""
        return is_file(self.path, f"export/{MODEL_MANIFEST_FILE}")

    def read_exported_step(self) -> int | None:
        """Return the step of the checkpoint whose weights are exported; None if there are none."""
        try:
            manifest = ModelManifest.parse(read_file(self.path, f"export/{MODEL_MANIFEST_FILE}"))
        except (OSError, ValueError):
            return None
        return get_count(manifest.about, "step")

    def read_metrics(self) -> list[MetricsRow]:
        """Read all rows of metrics.jsonl; lines that are not valid rows are ignored. Use `LogTail` to poll."""
        return parse_metrics_rows(LogTail(self.path / METRICS_FILE).read_all())

    def read_events(self) -> list[RunEvent]:
        """Read the last MAX_EVENTS events of the run; lines of events.jsonl that are not valid events are ignored."""
        records = LogTail(self.path / EVENTS_FILE).read_all()
        events = (event for record in records if (event := parse_event(record)) is not None)
        return list(deque(events, maxlen=MAX_EVENTS))

    def append_event(self, event: RunEvent) -> None:
        """Append an event to events.jsonl."""
        self.append(EVENTS_FILE, event.to_json())

    def append_metrics(self, row: MetricsRow) -> None:
        """Append a step's metrics to metrics.jsonl."""
        self.append(METRICS_FILE, row.to_json())

    def replace_metrics(self, rows: Iterable[MetricsRow]) -> None:
        """Replace all metrics atomically."""
        lines = "".join(f"{json.dumps(row.to_json())}\n" for row in rows)
        replace_file_below(self.path, METRICS_FILE, lines.encode())

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append a line to a log; after a partial line, which a full disk leaves, begin a new line."""
        with os.fdopen(open_to_append(self.path, name), "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                is_partial = file.read(1) != b"\n"
            else:
                is_partial = False
            file.write(b"\n" * is_partial + json.dumps(record).encode() + b"\n")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a JSON file atomically, so that a reader never sees a partial file."""
    replace_file_below(path.parent, path.name, json.dumps(data, indent=2).encode())

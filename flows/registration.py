"""Register weights that no round trained as a version, in steps that a killed registration resumes."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from feedback import registrations, rounds
from feedback.accounts import OPERATOR_ACCOUNT_NAME
from feedback.contracts import SmokeTest, WeightsProvenance
from feedback.items import make_storable_text
from feedback.promotion import find_champion
from flows.context import Context
from flows.registration_record import REGISTRATION_LOCK_FILE, REGISTRATIONS_FOLDER, RegistrationRecorder
from flows.round.evaluate import evaluate_version, make_evaluation_folder, read_log_tail
from flows.round.evaluation_devices import LeasedRunner, WaitingCallback
from flows.round.evaluation_process import EVAL_LOG_FILE, EvaluationProcess, EvaluationProgress
from flows.round.promote import publish_outcome
from flows.round.versions import (
    describe_manifest_differences,
    make_provenance_tags,
    make_weights_run_name,
    open_version,
    read_provenance,
)
from infra.machine import MIN_FREE_DISK_BYTES
from infra.process_group import hold_file_lock
from yuan.config import Precision
from yuan.eval.results import EvalResult
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, ModelManifest
from yuan.recipe import DEFAULT_EVALUATION

log = logging.getLogger(__name__)

HASH_CHUNK_BYTES = 4 * 2**20
ITEMSIZES: dict[Precision, int] = {"bf16": 2, "fp32": 4}
MEMORY_FACTOR, MEMORY_MARGIN_GIB = 1.15, 1.0  # of the evaluation's process, over the bytes of the weights
NO_ROOM_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SMOKE_CASE_ID = "smoke test"
SMOKE_CASE = {"id": SMOKE_CASE_ID, "prompt": "1+1=", "expected": "2", "checker": {"type": "exact", "value": "2"}}
MAX_SMOKE_ANSWER_CHARACTERS = 200


class RegistrationStep(StrEnum):
    """Steps of a registration, in their order; it waits for devices before the smoke test and the evaluation."""

    READ = "read"
    CONVERT = "convert"
    UPLOAD = "upload"
    WAIT_FOR_DEVICES = "wait for devices"
    SMOKE_TEST = "smoke test"
    EVALUATE = "evaluate"
    PROMOTE = "promote"


class ReportRegistration(Protocol):
    """Take the progress of a step in bytes; a `total_bytes` of 0 is not known."""

    def __call__(self, step: RegistrationStep, done_bytes: int = 0, total_bytes: int = 0) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RegistrationRequest:
    """An operator's request to register weights.

    Attributes:
        folder: the published layout or a model folder.
        dtype: of the version.
        is_champion: the version becomes the champion, of which there is none yet.
        memory_gib: memory that the smoke test and the evaluation may use.
    """

    folder: Path
    dtype: Precision
    is_champion: bool
    source: str | None
    licence: str | None
    memory_gib: float


@dataclass(frozen=True)
class RegistrationResult:
    """A registered version.

    Attributes:
        was_registered: an earlier registration had completed the version before.
        num_cases: cases that it was evaluated on by this registration.
    """

    version: int
    was_registered: bool
    provenance: WeightsProvenance
    smoke_test: SmokeTest
    num_cases: int
    is_champion: bool


@dataclass(frozen=True)
class SourceFile:
    """A file of the weights as it was read; `state` changes with its content."""

    path: Path
    state: tuple[int, ...]
    sha256: str


def find_recorded_versions(context: Context, folder: Path) -> list[int]:
    """Return the versions of which a model folder is a copy, to be restored; none for other weights and folders."""
    try:
        manifest = ModelManifest.parse((folder / MODEL_MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return []
    with context.sessions() as session:
        records = rounds.find_copied_versions(session, manifest, folder.resolve().parent.name)
        return [record.version for record in records]


def register_weights(context: Context, request: RegistrationRequest, report: ReportRegistration) -> RegistrationResult:
    """Convert weights, upload them, record the version, let it answer a prompt and evaluate it on existing cases.

    Every step can be repeated: a registration that was killed continues with the step it was in. The version is
    recorded once its files are complete in the registry, under the digest of the files that were read, so the same
    weights are registered once.

    Raises:
        ValueError: if the weights are not those of a Yuan 2.0 with a tokenizer that fits, a file changes meanwhile, the
            disk is full, or the version may not become the champion.
        RuntimeError: if it gives no answer, or its evaluation fails; it stays registered.
    """
    work_parent = context.settings.home / REGISTRATIONS_FOLDER
    work_parent.mkdir(mode=0o700, exist_ok=True)
    with hold_file_lock(work_parent / REGISTRATION_LOCK_FILE):
        recorder = RegistrationRecorder(context.settings.home, request.folder)

        def report_and_record(step: RegistrationStep, done_bytes: int = 0, total_bytes: int = 0) -> None:
            recorder.record(step, done_bytes, total_bytes)
            report(step, done_bytes, total_bytes)

        try:
            return Registration(context, request, report_and_record).run()
        finally:
            recorder.end()


class Registration:
    """One registration, at the step that its records and files show.

    Attributes:
        key: digest of the files and dtype, by which another registration of the same weights finds this one.
        folder: the converted model is its folder `model`, until the smoke test has passed.
    """

    def __init__(self, context: Context, request: RegistrationRequest, report: ReportRegistration) -> None:
        from yuan.model.convert import check_weights  # torch takes seconds to import

        self._context, self._request, self._report = context, request, report
        self._weights = check_weights(request.folder)
        self._files = read_source_files(request.folder, self._weights.files, report)
        digest = compute_digest(self._files)
        self.key = f"{digest}-{request.dtype}"
        self.folder = context.settings.home / REGISTRATIONS_FOLDER / self.key
        self._num_bytes = ITEMSIZES[request.dtype] * self._weights.num_parameters

        with context.sessions() as session:
            record = registrations.find_registered_version(session, self.key)
            self._recorded_version = None if record is None else record.version
            self._provenance = (None if record is None else read_provenance(record)) or WeightsProvenance(
                source=request.source,
                licence=request.licence,
                digest=digest,
                folder=str(request.folder.resolve()),
                dtype=request.dtype,
                stored_dtype=self._weights.dtype,
            )

    def run(self) -> RegistrationResult:
        """Run the steps that are not complete."""
        if self._request.is_champion:
            self._check_champion()
        version, was_registered = self._ensure_registered()
        smoke_test = self._ensure_smoke_test(version)
        shutil.rmtree(self.folder, ignore_errors=True)

        num_cases = 0
        if smoke_test.answer is not None:
            self._begin(RegistrationStep.EVALUATE)
            num_cases = evaluate_version(self._context, version, report=self._report_evaluation).cases
        if self._request.is_champion:
            self._begin(RegistrationStep.PROMOTE)
            with self._context.sessions.begin() as session:
                registrations.make_first_champion(session, version, OPERATOR_ACCOUNT_NAME)
                rounds.notify_dispatcher(session)
            publish_outcome(self._context)
        with self._context.sessions() as session:
            is_champion = find_champion(session) == version
        return RegistrationResult(version, was_registered, self._provenance, smoke_test, num_cases, is_champion)

    def _report_evaluation(self, progress: EvaluationProgress) -> None:
        is_waiting = progress.num_leases_ahead is not None
        self._report(RegistrationStep.WAIT_FOR_DEVICES if is_waiting else RegistrationStep.EVALUATE)

    def _begin(self, step: RegistrationStep) -> None:
        """Record that a step begins."""
        with self._context.sessions.begin() as session:
            registrations.audit_step(session, OPERATOR_ACCOUNT_NAME, self.key, step)
        self._report(step)

    def _check_champion(self) -> None:
        """Check, before anything is written, that the version may become the champion, or is it already."""
        with self._context.sessions() as session:
            if self._recorded_version is None or find_champion(session) != self._recorded_version:
                registrations.check_champion_is_free(session)

    def _ensure_registered(self) -> tuple[int, bool]:
        """Return the version, whose files are complete in the registry, and whether they were before."""
        version = self._recorded_version
        if version is not None and self._find_missing_files(version) == []:
            return version, True
        self._begin(RegistrationStep.CONVERT)
        manifest = self._ensure_converted()
        self._begin(RegistrationStep.UPLOAD)
        return self._upload(manifest), False

    def _find_missing_files(self, version: int) -> list[str] | None:
        """Return the names of a version's files that the registry lacks; None if it lacks the version."""
        with self._context.sessions() as session:
            names = list(ModelManifest.from_json(rounds.find_version(session, version).manifest).files)
        if not self._context.tracker.has_version(version):
            return None
        return self._context.tracker.find_missing_files(version, [*names, MODEL_MANIFEST_FILE])

    def _ensure_converted(self) -> ModelManifest:
        """Convert the weights, unless an earlier attempt has, and return the manifest."""
        from yuan.model.convert import copy_model, import_hf
        from yuan.model.weights import verify_folder

        model = self.folder / "model"
        if (model / MODEL_MANIFEST_FILE).is_file():
            with contextlib.suppress(ValueError):  # damaged since: convert again
                return verify_folder(model)
        shutil.rmtree(model, ignore_errors=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self._check_disk()

        done_bytes = 0

        def count_bytes(num_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += num_bytes
            self._report(RegistrationStep.CONVERT, done_bytes, self._num_bytes)

        # A folder that was renamed since the version was recorded gives the recorded files.
        import_named = functools.partial(import_hf, default_name=Path(self._provenance.folder).name)
        convert = copy_model if self._weights.kind == "model" else import_named
        about = {"provenance": self._provenance.model_dump(exclude={"folder"})}
        try:
            manifest = convert(
                self._request.folder, model, dtype=self._request.dtype, about=about, on_bytes=count_bytes
            )
            check_unchanged(self._files)
        except BaseException as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in NO_ROOM_ERRNOS:
                raise ValueError(
                    f"{model} cannot be written: {os.strerror(error.errno)}; make room there for "
                    f"{self._num_bytes:,} bytes and run the command again"
                ) from None
            raise
        return manifest

    def _check_disk(self) -> None:
        """Check that the converted weights have room.

        Raises:
            ValueError: if they do not.
        """
        free = shutil.disk_usage(self.folder).free - MIN_FREE_DISK_BYTES
        if free < self._num_bytes:
            raise ValueError(
                f"the converted weights take {self._num_bytes:,} bytes, and {max(free, 0):,} are free for them on the "
                f"disk of {self.folder.parent}; make room there and run the command again"
            )

    def _upload(self, manifest: ModelManifest) -> int:
        """Upload the converted weights and record the version; return its number.

        A version that the registry has lost is uploaded again under its number.

        Raises:
            ValueError: if the weights differ from those of the recorded version.
        """
        tracker, model, version = self._context.tracker, self.folder / "model", self._recorded_version
        self._check_same_files(manifest)
        tags = make_provenance_tags(self._provenance)
        mlflow_run_id = tracker.start_run(make_weights_run_name(self.key), tags)
        count_bytes = self._make_upload_counter(model)
        version = tracker.register_version(mlflow_run_id, model, tags, version, count_bytes)
        if tracker.find_missing_files(version, [*manifest.files, MODEL_MANIFEST_FILE]):
            tracker.upload_version(version, model, self._make_upload_counter(model))
        tracker.end_run(mlflow_run_id)
        with self._context.sessions.begin() as session:
            registrations.add_registered_version(
                session, version, manifest, self.key, self._provenance, OPERATOR_ACCOUNT_NAME
            )
        log.info("registered v%d from %s", version, self._request.folder)
        return version

    def _make_upload_counter(self, model: Path) -> Callable[[int], None]:
        """Return a function that takes the number of bytes that were sent since its last call."""
        total_bytes = sum(file.stat().st_size for file in model.iterdir())
        done_bytes = 0

        def count_bytes(num_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += num_bytes
            self._report(RegistrationStep.UPLOAD, done_bytes, total_bytes)

        return count_bytes

    def _check_same_files(self, manifest: ModelManifest) -> None:
        if self._recorded_version is None:
            return
        with self._context.sessions() as session:
            recorded = ModelManifest.from_json(rounds.find_version(session, self._recorded_version).manifest)
        if differences := describe_manifest_differences(manifest, recorded):
            raise ValueError(
                f"{self._request.folder} gives other files than v{self._recorded_version} had: {differences}; restore "
                f"it from a copy with `cotrain register DIR --version {self._recorded_version}`"
            )

    def _ensure_smoke_test(self, version: int) -> SmokeTest:
        """Let a version answer one prompt, unless it has answered before, and store the result.

        Raises:
            RuntimeError: if it cannot answer, though there is memory for it.
        """
        with self._context.sessions() as session:
            stored = rounds.find_version(session, version).smoke_test
        smoke_test = SmokeTest.model_validate(stored or {})
        if smoke_test.answer is not None:
            return smoke_test
        self._begin(RegistrationStep.SMOKE_TEST)
        needed_gib = MEMORY_FACTOR * self._num_bytes / 2**30 + MEMORY_MARGIN_GIB
        if needed_gib > self._request.memory_gib:
            smoke_test = SmokeTest(
                reason=f"it needs about {needed_gib:.1f} GiB of memory, and {self._request.memory_gib:.1f} GiB are free"
            )
            self._store_smoke_test(version, smoke_test)
            return smoke_test

        smoke_test = generate_smoke_answer(
            self._context, version, lambda num_ahead: self._report(RegistrationStep.WAIT_FOR_DEVICES)
        )
        self._store_smoke_test(version, smoke_test)
        if smoke_test.answer is None:
            raise RuntimeError(
                f"v{version} is registered, and gives no answer: {smoke_test.reason}; it cannot become the champion; "
                f"remove the cause and run the command again"
            )
        return smoke_test

    def _store_smoke_test(self, version: int, smoke_test: SmokeTest) -> None:
        with self._context.sessions.begin() as session:
            registrations.record_smoke_test(session, version, smoke_test)


def generate_smoke_answer(context: Context, version: int, report_waiting: WaitingCallback) -> SmokeTest:
    """Let a version answer one prompt in the confined process of evaluations, with its files from the registry."""
    with open_version(context, version, use_export=False) as model, make_evaluation_folder(version, None) as folder:
        try:
            results: list[EvalResult] = []
            cases = {SMOKE_CASE_ID: json.dumps(SMOKE_CASE).encode()}
            runner = LeasedRunner(context, f"smoke test of v{version}", report_waiting=report_waiting)
            EvaluationProcess(runner, folder, model.path, cases, DEFAULT_EVALUATION, results.extend).run()
            (result,) = results
        except (RuntimeError, ValueError) as error:
            log_tail = read_log_tail(folder / EVAL_LOG_FILE)
            return SmokeTest(reason=make_storable_text(f"{error}; its log ends with: {log_tail}"))
    if result.reason is not None:
        return SmokeTest(reason=make_storable_text(result.reason))
    return SmokeTest(answer=make_storable_text(result.answer, MAX_SMOKE_ANSWER_CHARACTERS))


def read_source_files(folder: Path, names: Iterable[str], report: ReportRegistration) -> list[SourceFile]:
    """Read and hash the files of the weights; links, as those of a download cache, are followed."""
    total_bytes = sum((folder / name).stat().st_size for name in names)
    files, done_bytes = [], 0
    for name in sorted(names):
        digest = hashlib.sha256()
        with (folder / name).open("rb") as stream:
            state = read_file_state(os.fstat(stream.fileno()))
            while chunk := stream.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
                done_bytes += len(chunk)
                report(RegistrationStep.READ, done_bytes, total_bytes)
        files.append(SourceFile(folder / name, state, digest.hexdigest()))
    check_unchanged(files)
    return files


def read_file_state(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def check_unchanged(files: Iterable[SourceFile]) -> None:
    """Check that files are as they were when they were hashed.

    Raises:
        ValueError: if one was changed, replaced or removed since.
    """
    for file in files:
        try:
            is_same = read_file_state(file.path.stat()) == file.state
        except OSError:
            is_same = False
        if not is_same:
            raise ValueError(
                f"{file.path} was changed while it was read, so nothing is registered; wait until nothing writes there "
                "and run the command again"
            )


def compute_digest(files: Iterable[SourceFile]) -> str:
    """Return the sha256 over the lines `SHA256  NAME` of the files, as `sha256sum` prints them, sorted by name."""
    lines = "".join(f"{file.sha256}  {file.path.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()

"""Model folders of versions: copy them from a run, fetch them, and re-register those that the registry lost."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from sqlalchemy.orm import Session

from feedback import rounds
from feedback.contracts import WeightsProvenance
from feedback.tables import ModelVersion
from flows.context import Context
from infra.artifact_transfer import ArtifactSource
from infra.files import copy_descriptor
from infra.folder_cache import CONTENT_FOLDER, CachedFolder, measure_folder
from infra.tracker import DIGEST_TAG, LICENCE_TAG, ROUND_TAG, RUN_TAG, SOURCE_TAG, VersionLost
from infra.version_cache import VERSIONS_FOLDER
from yuan.data.text import make_printable
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, ModelManifest
from yuan.safe_files import open_file, read_file
from yuan.train.checkpoint_manifest import list_committed_checkpoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestoredVersion:
    """A version that is complete in the registry; `was_missing`: it, or some of its files, had to be restored."""

    version: int
    was_missing: bool


def restore_version(context: Context, folder: Path, version: int | None = None) -> RestoredVersion:
    """Restore a version, or its files, that was deleted from the registry, from a copy of its model folder.

    A version that is complete in the registry is not changed.

    Args:
        folder: `runs/RUN/export`, or any other copy, such as the model server's.
        version: None: identify it by its run or its manifest.

    Raises:
        VersionNotRegistered: if there never was such a version.
        ValueError: if the folder is incomplete, or not that of the version; the message lists the differences.
    """
    folder = folder.resolve()  # links in the operator's path are followed, but none inside the folder
    try:
        manifest = ModelManifest.parse(read_file(folder, MODEL_MANIFEST_FILE))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a model folder: {MODEL_MANIFEST_FILE}: {error}; give runs/RUN/export or another copy"
        ) from None

    with context.sessions.begin() as session:
        rounds.lock_registrations(session)
        record = rounds.identify_version(session, manifest, version, folder.parent.name)
        mlflow_run_id = find_mlflow_run_id(context, session, record)
        recorded_manifest = ModelManifest.from_json(record.manifest)
        differences = describe_manifest_differences(manifest, recorded_manifest)
        if differences:
            raise ValueError(f"{folder} is not what v{record.version} was: {differences}; give another copy")

        is_registered = context.tracker.has_version(record.version)
        file_names = [*recorded_manifest.files, MODEL_MANIFEST_FILE]
        if is_registered and not context.tracker.find_missing_files(record.version, file_names):
            return RestoredVersion(record.version, was_missing=False)

        tags = make_version_tags(record)
        sources = list_manifest_sources(folder, recorded_manifest)
        if is_registered:
            context.tracker.upload_files(record.version, sources)
        else:
            context.tracker.register_files(mlflow_run_id, sources, tags, record.version)
    log.info("registered v%d again from %s", record.version, folder)
    return RestoredVersion(record.version, was_missing=True)


def find_mlflow_run_id(context: Context, session: Session, record: ModelVersion) -> str:
    """Return the id of MLflow's run that has a version's files; created for weights from elsewhere if it is lost."""
    if record.round_id is not None:
        return str(rounds.get_or_create_training_run(session, record.round_id).mlflow_run_id)
    assert record.registration_key is not None, "a version is of a round or was registered"
    return context.tracker.start_run(make_weights_run_name(record.registration_key), {})


def make_weights_run_name(registration_key: str) -> str:
    """Return the name of MLflow's run that holds the files of weights from elsewhere."""
    return f"weights-{registration_key}"


def make_version_tags(record: ModelVersion) -> dict[str, str]:
    """Return the tags of a version in MLflow: its round and run, or the provenance of its weights."""
    provenance = read_provenance(record)
    if provenance is not None:
        return make_provenance_tags(provenance)
    return {ROUND_TAG: str(record.round_id), RUN_TAG: str(record.run_id)}


def read_provenance(record: ModelVersion) -> WeightsProvenance | None:
    """Return the provenance of a version; None if a round trained it."""
    return None if record.provenance is None else WeightsProvenance.model_validate(record.provenance)


def make_provenance_tags(provenance: WeightsProvenance) -> dict[str, str]:
    """Return the tags of a version of weights from elsewhere; what the operator did not name has none."""
    tags = {SOURCE_TAG: provenance.source, LICENCE_TAG: provenance.licence, DIGEST_TAG: provenance.digest}
    return {name: value for name, value in tags.items() if value is not None}


def open_version(context: Context, version: int, *, use_export: bool = True) -> CachedFolder:
    """Return a version's model folder in the cache, locked for use; fetch it if it is not there.

    Args:
        use_export: copy a version that the registry has lost from its run's export.

    Raises:
        VersionNotRegistered: if there never was such a version.
        VersionLost: if the registry has lost it and the export is not as recorded; the message says what to do.
        OSError: if the disk has too little room; the message has the bytes.
    """
    with context.sessions() as session:
        record = rounds.find_version(session, version)
        run_id = record.run_id
        recorded_manifest = ModelManifest.from_json(record.manifest)
        provenance = read_provenance(record)
    try:
        return context.versions.open(version, recorded_manifest.files)
    except VersionLost:
        if not use_export:
            raise
    return _open_lost_version(context, version, run_id, provenance, recorded_manifest)


def _open_lost_version(
    context: Context,
    version: int,
    run_id: str | None,
    provenance: WeightsProvenance | None,
    recorded: ModelManifest,
) -> CachedFolder:
    """Copy a version that the registry has lost from its run's export into the cache, and verify every byte.

    Raises:
        VersionLost: if the export is not as recorded; the message says what to do.
    """
    fix = describe_registration(context.settings.home, version, run_id, provenance)
    if run_id is None:
        raise VersionLost(f"v{version} is missing from the registry; {fix}, then start another round")
    export = context.runs / run_id / "export"

    def fetch(target: Path) -> dict[str, str]:
        for file in target.iterdir():
            file.unlink()
        copy_manifest_files(export, target, recorded)
        return {**recorded.files, MODEL_MANIFEST_FILE: ""}

    try:
        folder = context.versions.fill(version, measure_folder(export), fetch, recorded.files)
    except ValueError as error:
        log.warning("v%d is missing from the registry, and its run's export is not usable: %s", version, error)
        raise VersionLost(f"v{version} is missing from the registry; {fix}, then start another round") from None
    log.warning("v%d is missing from the registry, and its run's export is used; %s", version, fix)
    return folder


@contextlib.contextmanager
def make_scratch_folder(folder: Path) -> Iterator[Path]:
    """Make a temporary folder for a copy of weights, on the disk of the home folder.

    Its name is fixed, so that the next attempt removes the folder of a killed attempt.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_export_manifest(run: Path) -> ModelManifest:
    """Read the manifest of a run's exported weights.

    Raises:
        ValueError: if it is missing or not valid.
    """
    try:
        return ModelManifest.parse(read_file(run, f"export/{MODEL_MANIFEST_FILE}"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the weights of {run} cannot be registered: {error}; "
            f"write them again: python -m yuan.train.checkpoint.export {run}"
        ) from None


def list_manifest_sources(folder: Path, manifest: ModelManifest) -> list[ArtifactSource]:
    """List the files of a manifest, and the manifest, as sources of an upload, which sends no other bytes.

    The folder may be one that services write, so no link is followed, not even in place of the folder.
    """

    def make_source(name: str, sha256: str) -> ArtifactSource:
        def open_source() -> BinaryIO:
            try:
                stream = os.fdopen(open_file(folder.parent, f"{folder.name}/{name}"), "rb")
                if os.fstat(stream.fileno()).st_size > shutil.disk_usage(folder).total:
                    stream.close()
                    raise OSError("it has holes: it is larger than its disk")
                return stream
            except OSError as error:
                raise ValueError(f"{name} of {folder} cannot be read: {error.strerror or error}") from None

        return ArtifactSource(name, open_source, sha256)

    content = json.dumps(manifest.to_json()).encode()
    sources = [make_source(name, sha256) for name, sha256 in manifest.files.items()]
    return [*sources, ArtifactSource(MODEL_MANIFEST_FILE, lambda: BytesIO(content))]


def copy_manifest_files(folder: Path, target: Path, manifest: ModelManifest) -> None:
    """Copy only the files that a manifest lists, from a folder that services can write, and write the manifest.

    The copy is published in the registry, so no link is followed, not even in place of the folder, and the sha256 of
    every file is verified.

    Raises:
        ValueError: if a file differs from the manifest or cannot be copied.
    """
    for name, expected_sha256 in manifest.files.items():
        if Path(name).name != name or name == "..":
            raise ValueError(f"a manifest must list files of one folder, got {make_printable(name)}; give another copy")
        try:
            source = open_file(folder.parent, f"{folder.name}/{name}")
            num_bytes = os.fstat(source).st_size
            if num_bytes > shutil.disk_usage(target).free:  # it may be sparse
                os.close(source)
                raise OSError(f"it has {num_bytes} bytes, and the disk has less room; free space")
            sha256 = copy_descriptor(source, target / name)
        except OSError as error:
            raise ValueError(f"{name} of {folder} cannot be copied: {error.strerror or error}") from None
        if sha256 != expected_sha256:
            raise ValueError(
                f"{name} of {folder} has the sha256 {sha256}, recorded is {expected_sha256}; give another copy"
            )
    (target / MODEL_MANIFEST_FILE).write_text(json.dumps(manifest.to_json()))


def describe_registration(
    home: Path, version: int, run_id: str | None, provenance: WeightsProvenance | None = None
) -> str:
    """Describe the command that restores a lost version, from the first copy that exists on this machine.

    Args:
        run_id: None for a version of weights from elsewhere, which has a provenance.
    """
    run = None if run_id is None else home / "runs" / run_id
    cached = home / VERSIONS_FOLDER / f"v{version}" / CONTENT_FOLDER
    for copy in [cached] if run is None else [run / "export", cached]:
        if (copy / MODEL_MANIFEST_FILE).exists():
            return f"register it again: cotrain register {copy} --version {version}"
    if run is None:
        assert provenance is not None, "a version is of a run or was registered"
        return f"register its weights again: cotrain register {provenance.folder} --dtype {provenance.dtype}"
    if any(list_committed_checkpoints(run / "checkpoints")):
        return (
            f"write its weights again, `python -m yuan.train.checkpoint.export {run}`, and register them: "
            f"cotrain register {run / 'export'}"
        )
    return (
        f"no copy of it is left below {home}; take one of a consumer or a backup: "
        f"cotrain register DIR --version {version}"
    )


def describe_manifest_differences(manifest: ModelManifest, recorded: ModelManifest) -> str:
    """Describe the differences between a folder's manifest and the recorded one; empty if there are none.

    >>> recorded = ModelManifest({"a": "1", "b": "3"}, {"step": 6})
    >>> describe_manifest_differences(ModelManifest({"a": "1", "b": "2"}, {"step": 5}), recorded)
    'b has the sha256 2, recorded is 3; step is 5, recorded is 6'
    """
    differences = []
    for name in sorted(manifest.files.keys() | recorded.files.keys()):
        sha256, recorded_sha256 = manifest.files.get(name), recorded.files.get(name)
        if sha256 != recorded_sha256:
            differences.append(
                f"{name} has the sha256 {sha256 or 'of no file'}, recorded is {recorded_sha256 or 'no such file'}"
            )

    fields = {**manifest.about, "schema": manifest.schema}
    recorded_fields = {**recorded.about, "schema": recorded.schema}
    for field in sorted(fields.keys() | recorded_fields.keys()):
        value, recorded_value = fields.get(field), recorded_fields.get(field)
        if value != recorded_value:
            differences.append(f"{field} is {value}, recorded is {recorded_value}")
    return "; ".join(differences)

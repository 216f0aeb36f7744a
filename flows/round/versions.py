"""Model folders of versions: copy them from a run, fetch them, and re-register those that the registry lost."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from feedback import rounds
from feedback.contracts import WeightsProvenance
from feedback.tables import ModelVersion
from flows.context import Context
from infra.files import copy_descriptor
from infra.tracker import DIGEST_TAG, LICENCE_TAG, ROUND_TAG, RUN_TAG, SOURCE_TAG, VersionLost
from yuan.data.text import make_printable
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, ModelManifest
from yuan.safe_files import open_file, read_file
from yuan.train.checkpoint_manifest import list_committed_checkpoints

log = logging.getLogger(__name__)

VERSION_COPY_FOLDERS = ("serve", "generate")  # folders of copies: the model server's, and the command line's


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
        with make_scratch_folder(context.settings.home / f".register-v{record.version}") as scratch:
            copy_manifest_files(folder, scratch, recorded_manifest)
            if is_registered:
                context.tracker.upload_version(record.version, scratch)
            else:
                context.tracker.register_version(mlflow_run_id, scratch, tags, record.version)
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


def require_registered(context: Context, version: int) -> None:
    """Check that a version can be fetched from the registry.

    Raises:
        VersionNotRegistered: if there never was such a version.
        VersionLost: if it, or its files, are lost from the registry.
    """
    with context.sessions() as session:
        rounds.find_version(session, version)
    context.tracker.require_files(version, (MODEL_MANIFEST_FILE,))


def fetch_version(context: Context, version: int, target: Path) -> Path:
    """Fetch a version's model folder and return its path; a lost version is copied from its run's export.

    Args:
        target: parent folder of the model folder; created if missing.

    Raises:
        VersionLost: if the registry has lost it and the export is not as recorded; the message says what to do.
    """
    try:
        return context.tracker.download(version, target, (MODEL_MANIFEST_FILE,))
    except VersionLost:
        return copy_lost_version(context, version, target)


def copy_lost_version(context: Context, version: int, target: Path) -> Path:
    """Copy a version that the registry has lost from its run's export, and verify every byte.

    Raises:
        VersionLost: if the export is not as recorded; the message says what to do.
    """
    with context.sessions() as session:
        record = rounds.find_version(session, version)
        run_id = record.run_id
        recorded_manifest = ModelManifest.from_json(record.manifest)
        provenance = read_provenance(record)
    fix = describe_registration(context.settings.home, version, run_id, provenance)
    if run_id is None:
        raise VersionLost(f"v{version} is missing from the registry; {fix}, then start another round")

    copy = target / "model"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    try:
        copy_manifest_files(context.runs / run_id / "export", copy, recorded_manifest)
    except ValueError as error:
        log.warning("v%d is missing from the registry, and its run's export is not usable: %s", version, error)
        raise VersionLost(f"v{version} is missing from the registry; {fix}, then start another round") from None
    log.warning("v%d is missing from the registry, and its run's export is used; %s", version, fix)
    return copy


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


def copy_export(run: Path, target: Path) -> ModelManifest:
    """Copy the files that the manifest of a run's exported weights lists, and return the manifest.

    Raises:
        ValueError: if the files differ from the manifest, or are not regular files in the run's own folder.
    """
    try:
        manifest = ModelManifest.parse(read_file(run, f"export/{MODEL_MANIFEST_FILE}"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the weights of {run} cannot be registered: {error}; "
            f"write them again: python -m yuan.train.checkpoint.export {run}"
        ) from None
    copy_manifest_files(run / "export", target, manifest)
    return manifest


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
    copies = [home / name / f"v{version}" / "model" for name in VERSION_COPY_FOLDERS]
    for copy in copies if run is None else [run / "export", *copies]:
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

"""Model folders of versions: copy them from a run, fetch them, and re-register those that the registry lost."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from feedback import rounds
from flows.context import Context
from infra.files import copy_descriptor
from infra.tracker import VersionLost
from yuan.data.text import make_printable
from yuan.safe_files import open_file, read_file

log = logging.getLogger(__name__)

VERSION_COPY_FOLDERS = ("serve", "generate")  # folders of copies: the model server's, and the command line's


def register_again(context: Context, folder: Path, wanted: int | None = None) -> tuple[int, bool]:
    """Restore a version, or its files, that was deleted from the registry, from a copy of its model folder.

    Args:
        folder: `runs/RUN/export`, or any other copy, such as the model server's.
        wanted: the version's number; None: identify it by its run or its manifest.

    Returns:
        The version, and whether it, or its files, had to be restored; a complete version is not changed.

    Raises:
        ValueError: if the folder is incomplete, or not that of the version; the message lists the differences.
    """
    from yuan.model.weights import parse_manifest

    folder = folder.resolve()  # links in the operator's path are followed, but none inside the folder
    try:
        manifest = parse_manifest(read_file(folder, "manifest.json"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a model folder: manifest.json: {error}") from None
    with context.sessions.begin() as session:
        rounds.lock_registrations(session)
        known = rounds.identify_version(session, manifest, wanted, folder.parent.name)
        mlflow_run = str(rounds.get_or_create_training_run(session, known.round_id).mlflow_run_id)
        differing = describe_manifest_differences(manifest, known.manifest)
        if differing:
            raise ValueError(f"{folder} is not what v{known.version} was: {differing}; give another copy")
        is_there = context.tracker.has_version(known.version)
        if is_there and not context.tracker.find_missing_files(
            known.version, [*known.manifest["files"], "manifest.json"]
        ):
            return known.version, False
        tags = {"cotrain.round": known.round_id, "cotrain.run": known.run_id}
        with make_scratch_folder(context.settings.home / f".register-v{known.version}") as scratch:
            copy_manifest_files(folder, scratch, known.manifest)
            if is_there:
                context.tracker.upload_version(known.version, scratch)
            else:
                context.tracker.register_version(mlflow_run, scratch, tags, known.version)
    log.info("registered v%d again from %s", known.version, folder)
    return known.version, True


def require_registered(context: Context, version: int) -> None:
    """Check that a version can be fetched from the registry.

    Raises:
        NeverRegistered: if there never was such a version.
        VersionLost: if it, or its files, are lost from the registry.
    """
    with context.sessions() as session:
        rounds.find_version(session, version)
    context.tracker.require_version(version)


def fetch_version(context: Context, version: int, target: Path) -> Path:
    """Fetch a version's model folder and return its path; a lost version is copied from its run's export.

    Args:
        target: parent folder of the model folder; created if missing.

    Raises:
        VersionLost: if the registry has lost it and the export is not as recorded; the message says what to do.
    """
    try:
        return context.tracker.download(version, target)
    except VersionLost:
        return copy_lost_version(context, version, target)


def copy_lost_version(context: Context, version: int, target: Path) -> Path:
    """Copy a version that the registry has lost from its run's export, and verify every byte.

    Raises:
        VersionLost: if the export is not as recorded; the message says what to do.
    """
    with context.sessions() as session:
        known = rounds.find_version(session, version)
        session.expunge(known)
    how, copy = describe_registration(context.settings.home, version, known.run_id), target / "model"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    try:
        copy_manifest_files(context.runs / known.run_id / "export", copy, known.manifest)
    except ValueError as error:
        log.warning("v%d is gone from the registry, and its run's export is not usable: %s", version, error)
        raise VersionLost(f"v{version} is gone from the registry; {how}, then start another round") from None
    log.warning("v%d is gone from the registry, and its run's export is used; %s", version, how)
    return copy


@contextlib.contextmanager
def make_scratch_folder(folder: Path) -> Iterator[Path]:
    """Make a temporary folder for a copy of weights, on the disk of the home folder.

    Its name is fixed, so that the next attempt removes the folder of a killed attempt.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_export(run: Path, target: Path) -> dict[str, Any]:
    """Copy the files that the manifest of a run's exported weights lists, and return the manifest.

    Raises:
        ValueError: if the files differ from the manifest, or are not regular files in the run's own folder.
    """
    try:
        manifest = dict(json.loads(read_file(run, "export/manifest.json")))
        copy_manifest_files(run / "export", target, manifest)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the weights of {run} cannot be registered: {error}") from None
    return manifest


def copy_manifest_files(folder: Path, target: Path, recorded: Mapping[str, Any]) -> None:
    """Copy only the files that a recorded manifest lists, from a folder that services can write.

    The copy is published in the registry, so no link is followed, not even in place of the folder, and the sha256 of
    every file is verified.

    Raises:
        ValueError: if a file differs from the recorded one.
    """
    for name, expected in recorded["files"].items():
        if Path(name).name != name or name == "..":
            raise ValueError(f"a manifest must list files of one folder, got {make_printable(name)}")
        try:
            source = open_file(folder.parent, f"{folder.name}/{name}")
            if (size := os.fstat(source).st_size) > shutil.disk_usage(target).free:  # it may be sparse
                os.close(source)
                raise OSError(f"it has {size} bytes, and the disk has less room")
            sha256 = copy_descriptor(source, target / name)
        except OSError as error:
            raise ValueError(f"{name} of {folder} cannot be copied: {error.strerror or error}") from None
        if sha256 != expected:
            raise ValueError(f"{name} of {folder} has the sha256 {sha256}, recorded is {expected}; give another copy")
    (target / "manifest.json").write_text(json.dumps(recorded))


def describe_registration(home: Path, version: int, run_id: str) -> str:
    """Describe the command that restores a lost version, from the first copy that exists on this machine."""
    run = home / "runs" / run_id
    places = (run / "export", *(home / name / f"v{version}" / "model" for name in VERSION_COPY_FOLDERS))
    copies = [place / "manifest.json" for place in places]
    for manifest in copies:
        if manifest.exists():
            return f"register it again: cotrain register {manifest.parent} --version {version}"
    if any((run / "checkpoints").glob("step-*/manifest.json")):
        return (
            f"write its weights again, `python -m yuan.train.checkpoint.export {run}`, and register them: "
            f"cotrain register {run / 'export'}"
        )
    return (
        f"no copy of it is left below {home}; take one of a consumer or a backup: "
        f"cotrain register DIR --version {version}"
    )


def describe_manifest_differences(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """Describe the differences between two manifests; empty if there are none.

    >>> recorded = {"files": {"a": "1", "b": "3"}, "step": 6}
    >>> describe_manifest_differences({"files": {"a": "1", "b": "2"}, "step": 5}, recorded)
    'b has the sha256 2, recorded is 3; step is 5, recorded is 6'
    """
    files, others = (dict(part) for part in (found["files"], recorded["files"]))
    differences = [
        f"{name} has the sha256 {files.get(name, 'of no file')}, recorded is {others.get(name, 'no such file')}"
        for name in sorted(files | others)
        if files.get(name) != others.get(name)
    ]
    rest = sorted((found.keys() | recorded.keys()) - {"files"})
    differences += [
        f"{key} is {found.get(key)}, recorded is {recorded.get(key)}"
        for key in rest
        if found.get(key) != recorded.get(key)
    ]
    return "; ".join(differences)

"""Checkpoints of a run in the object store: sent while it trains, fetched when the disk that had them is gone."""

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError

from infra.objects import Objects
from yuan.train.folder import EVENTS, RunFolder
from yuan.train.manifest import MANIFEST, digest_of

log = logging.getLogger(__name__)

PREFIX = "checkpoints"
LOOK_EVERY_S = 2.0


@contextlib.contextmanager
def uploading(objects: Objects, run_id: str, folder: RunFolder) -> Iterator[None]:
    """Send every checkpoint that becomes real while the block runs, the last one before it ends."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(LOOK_EVERY_S):
            _send_quietly(objects, run_id, folder)

    thread = threading.Thread(target=work, daemon=True, name="uploads")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    _send_quietly(objects, run_id, folder)


def send(objects: Objects, run_id: str, folder: RunFolder) -> list[str]:
    """Make the store's checkpoints those of the folder; the manifest goes last, and is removed first.

    A checkpoint that the run prunes meanwhile is left out. Returns the names of those sent now.
    """
    there = _manifests(objects, run_id)
    here = {path.parent.name: path.parent for path in folder.checkpoints.glob(f"step-*/{MANIFEST}")}
    sent = []
    for name in sorted(here):
        try:
            manifest = (here[name] / MANIFEST).read_bytes()
            if name in there and objects.get(f"{PREFIX}/{run_id}/{name}/{MANIFEST}") == manifest:
                continue
            if name in there:  # of a trajectory that a roll back has left
                _remove(objects, run_id, name)
            for file in sorted(here[name].iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
                objects.put_file(f"{PREFIX}/{run_id}/{name}/{file.name}", file)
            if (here[name] / MANIFEST).read_bytes() != manifest:  # another one took its place meanwhile
                _remove(objects, run_id, name)
                continue
        except FileNotFoundError:
            continue
        sent.append(name)
    newest = max(here, default="")
    for name in there - here.keys():
        if name < newest:  # the run goes on beyond it and has pruned it
            _remove(objects, run_id, name)
    return sent


def fetch(objects: Objects, run_id: str, folder: RunFolder) -> str | None:
    """Bring back the newest whole checkpoint if the folder has none; its name."""
    if any(folder.checkpoints.glob(f"step-*/{MANIFEST}")):
        return None
    for name in sorted(_manifests(objects, run_id), reverse=True):
        target, prefix = folder.checkpoints / name, f"{PREFIX}/{run_id}/{name}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        manifest = objects.get(f"{prefix}/{MANIFEST}")
        files = {Path(file).name: expected for file, expected in json.loads(manifest)["files"].items()}
        for file in files:
            objects.get_file(f"{prefix}/{file}", target / file)
        if all(digest_of(target / file) == expected for file, expected in files.items()):
            (target / MANIFEST).write_bytes(manifest)
            return name
        log.warning("checkpoint %s of run %s is damaged in the store; trying the one before", name, run_id)
        shutil.rmtree(target)
    return None


def _manifests(objects: Objects, run_id: str) -> set[str]:
    keys = objects.keys(f"{PREFIX}/{run_id}/")
    return {key.split("/")[-2] for key in keys if key.endswith(f"/{MANIFEST}")}


def _remove(objects: Objects, run_id: str, name: str) -> None:
    objects.delete(f"{PREFIX}/{run_id}/{name}/{MANIFEST}")
    for key in objects.keys(f"{PREFIX}/{run_id}/{name}/"):
        objects.delete(key)


def _send_quietly(objects: Objects, run_id: str, folder: RunFolder) -> None:
    """Training does not wait for the store; what could not be sent is sent the next time."""
    try:
        for name in send(objects, run_id, folder):
            folder.append(EVENTS, {"event": "checkpoint stored", "step": int(name.removeprefix("step-"))})
            log.info("stored checkpoint %s of run %s", name, run_id)
    except (BotoCoreError, ClientError, OSError) as error:
        log.warning("checkpoints of run %s are not stored yet: %s", run_id, str(error)[:200])

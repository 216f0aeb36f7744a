"""Masters and moments of versions: keep those of a new version in the object store, and start a run from its parent's.

A version is stored in the dtype that is served. Training continues best from what that dtype rounds away: the fp32
master weights and, in a run of the kind `continue`, both moments of the optimizer.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from feedback import training_states
from feedback.tables import TrainingState
from feedback.training_states import NEVER_STORED_REASON, KeptCheckpoint
from flows.context import Context
from flows.round.run_model import RoundUnfit
from flows.supervisor.checkpoint_sync import sync_checkpoints
from flows.supervisor.stored_checkpoints import download_files, parse_stored_manifest, read_stored_manifest
from yuan.config import ModelConfig
from yuan.recipe import Recipe
from yuan.train.checkpoint_manifest import CHECKPOINT_MANIFEST_FILE, CheckpointManifest, format_checkpoint_name
from yuan.train.file_digest import digest_content
from yuan.train.run_folder import RunFolder
from yuan.train.run_spec import ParentState

log = logging.getLogger(__name__)

STATE_KEEPER = "round"
KINDS_WITH_MOMENTS = ("pretrain", "continue")  # after which a run of the kind `continue` may go on
DTYPE_NAMES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
MAX_WEIGHTS_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class StartPoint:
    """The start of a run's training.

    Attributes:
        state: the parent's checkpoint in the run folder; None: the parent's weights, or new ones.
        description: in words, for the round's record.
    """

    state: ParentState | None
    description: str


class MastersUnusable(Exception):
    """The masters of a version are not kept, or not usable; the message follows the word "masters"."""


def keep_masters(context: Context, run_id: str, step: int) -> None:
    """Keep the checkpoint of a run whose weights its version has; it is uploaded if it is not in the store yet.

    A checkpoint that is damaged is recorded as such: the next round starts from the version's weights.
    """
    folder, name = RunFolder(context.runs / run_id), format_checkpoint_name(step)
    sync_checkpoints(context.objects, run_id, folder, is_due=lambda local_name: local_name == name)
    content = read_stored_manifest(context.objects, run_id, name)
    if content is None:
        with context.sessions.begin() as session:
            reason = f"{NEVER_STORED_REASON}: the checkpoint of step {step} is damaged, or missing"
            training_states.end_training_state(session, run_id, reason, STATE_KEEPER)
        return
    spec = folder.read_spec()
    kind = spec.kind if spec.recipe is None else spec.recipe.run.kind
    kept = describe_kept(content, name, with_moments=kind in KINDS_WITH_MOMENTS)
    with context.sessions.begin() as session:
        training_states.record_training_state(session, run_id, kept)


def describe_kept(content: bytes, name: str, *, with_moments: bool) -> KeptCheckpoint:
    """Describe what is kept of a stored checkpoint, from its manifest.

    Raises:
        ValueError: if the manifest is damaged.
    """
    manifest = parse_stored_manifest(content, name)
    files = manifest.list_files(with_moments=with_moments)
    return KeptCheckpoint(
        step=manifest.step,
        manifest_sha256=digest_content(content).sha256,
        num_bytes=sum(digest.num_bytes for digest in files.values()),
        has_moments=files.keys() == manifest.files.keys(),
    )


def check_optimizer_state(context: Context, recipe: Recipe, parent_version: int | None) -> None:
    """Check, before anything is fetched, that the parent has the moments that a recipe needs.

    Raises:
        RoundUnfit: if it has none; the message says what to change.
    """
    if recipe.optimizer.state != "parent" or parent_version is None:
        return
    try:
        _find_state(context, parent_version, with_moments=True)
    except MastersUnusable as error:
        raise _make_refusal(parent_version, error) from None


def prepare_start(
    context: Context, folder: RunFolder, recipe: Recipe, config: ModelConfig, parent_version: int | None
) -> StartPoint:
    """Fetch the parent's masters into the run folder, and its moments if the recipe needs them.

    Without masters that are complete, training starts from the parent's weights; a damaged state is recorded.

    Raises:
        RoundUnfit: if the recipe needs the parent's moments and they are not usable.
        OSError: if the disk has too little room.
    """
    if parent_version is None:
        return StartPoint(None, "new weights")
    with_moments = recipe.optimizer.state == "parent"
    try:
        state = _fetch_state(context, folder, config, parent_version, with_moments=with_moments)
    except MastersUnusable as error:
        if with_moments:
            raise _make_refusal(parent_version, error) from None
        return StartPoint(None, f"{read_weights_dtype(folder.parent)} weights of v{parent_version}: masters {error}")
    parts = "masters and moments" if with_moments else "masters"
    return StartPoint(state, f"fp32 {parts} of v{parent_version}")


def _make_refusal(version: int, error: MastersUnusable) -> RoundUnfit:
    return RoundUnfit(
        f"optimizer.state = parent needs the moments of v{version}, and its masters {error}; weights that were "
        "registered, or fine-tuned, have no moments: use optimizer.state = fresh"
    )


def _find_state(context: Context, version: int, *, with_moments: bool) -> TrainingState:
    """Return the record of a version's state.

    Raises:
        MastersUnusable: if nothing is kept, or no moments and they are needed.
    """
    with context.sessions() as session:
        state = training_states.find_training_state(session, version)
    if state is None:
        raise MastersUnusable(NEVER_STORED_REASON)
    if state.end_reason is not None:
        raise MastersUnusable(state.end_reason)
    if with_moments and not state.has_moments:
        raise MastersUnusable("are kept without moments")
    return state


def _fetch_state(
    context: Context, folder: RunFolder, config: ModelConfig, version: int, *, with_moments: bool
) -> ParentState:
    """Download a version's state into `parent_state/` of a run folder; a killed download is continued.

    Raises:
        MastersUnusable: if it is not kept, or differs from its record, which is then ended.
        OSError: if the disk has too little room.
    """
    state = _find_state(context, version, with_moments=with_moments)
    assert state.step is not None and state.manifest_sha256 is not None, "of a state that is kept"
    name = format_checkpoint_name(state.step)
    # Beside the run folder, which a restarted preparation empties.
    scratch = folder.path.parent / f".parent-state-{folder.path.name}"
    try:
        content = read_stored_manifest(context.objects, state.run_id, name)
        manifest = _check_manifest(content, name, state, config)
        digests = manifest.list_files(with_moments=with_moments)
        _require_room(scratch, sum(digest.num_bytes for digest in digests.values()))
        download_files(context.objects, state.run_id, name, digests, scratch / name)
    except ValueError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        reason = f"are damaged in the store: {error}"
        log.warning("the masters of v%d %s", version, reason)
        with context.sessions.begin() as session:
            training_states.end_training_state(session, state.run_id, reason, STATE_KEEPER)
        raise MastersUnusable(reason) from None
    assert content is not None, "_check_manifest refuses it"
    (scratch / name / CHECKPOINT_MANIFEST_FILE).write_bytes(content)
    scratch.rename(folder.parent_state)
    return ParentState(step=state.step, manifest_sha256=state.manifest_sha256, with_moments=with_moments)


def _check_manifest(content: bytes | None, name: str, state: TrainingState, config: ModelConfig) -> CheckpointManifest:
    """Return the manifest of a stored state.

    Raises:
        ValueError: if it is missing, not the recorded one, or of another model than the version.
    """
    if content is None:
        raise ValueError(f"{CHECKPOINT_MANIFEST_FILE} is missing")
    if digest_content(content).sha256 != state.manifest_sha256:
        raise ValueError(f"{CHECKPOINT_MANIFEST_FILE} differs from the record")
    manifest = parse_stored_manifest(content, name)
    if ModelConfig.from_json(dict(manifest.model)) != config:
        raise ValueError(f"the masters are of the model {dict(manifest.model)}, and the version is of {config}")
    return manifest


def _require_room(scratch: Path, num_bytes: int) -> None:
    """Check that the disk has room for a state, counting what is already downloaded.

    Raises:
        OSError: if it has less.
    """
    present = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
    free = shutil.disk_usage(scratch.parent).free
    if num_bytes - present > free:
        raise OSError(
            f"the parent's masters have {num_bytes:,} bytes, and the disk of {scratch.parent} has {free:,} bytes free; "
            "free space, and the round goes on"
        )


def read_weights_dtype(model_folder: Path) -> str:
    """Return the dtype of a version's weights: that of the first tensor of its first file."""
    file = min(model_folder.glob("*.safetensors"))
    with file.open("rb") as stream:
        num_header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(num_header_bytes, MAX_WEIGHTS_HEADER_BYTES)))
    dtype = next(tensor["dtype"] for name, tensor in header.items() if name != "__metadata__")
    return DTYPE_NAMES.get(dtype, str(dtype).lower())

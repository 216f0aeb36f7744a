"""Compare runs that start from the stored state of a parent's run with the uninterrupted run."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.yuan.runs import TRAIN_CONFIG, launch, prepare_continued, prepare_run, read_steps, run_training
from yuan.train.checkpoint_manifest import (
    CHECKPOINT_MANIFEST_FILE,
    CheckpointManifest,
    list_committed_checkpoints,
    read_manifest,
)
from yuan.train.file_digest import compute_digest
from yuan.train.run_spec import ParentState

# The schedule of a run starts anew, so a constant learning rate makes the steps of both runs comparable.
CONSTANT = dataclasses.replace(
    TRAIN_CONFIG, max_steps=8, checkpoint_every=4, schedule="wsd", final_lr_ratio=1.0, warmup_steps=0
)
PARENT_STEPS = 4
CONTINUED = dataclasses.replace(CONSTANT, max_steps=CONSTANT.max_steps - PARENT_STEPS)


@pytest.fixture(scope="module")
def uninterrupted_run(training_inputs, tmp_path_factory):
    return run_training(prepare_run(tmp_path_factory.mktemp("state") / "whole", training_inputs, CONSTANT))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bounds", "data_size"),
    [((0, 3), 1), ((0, 1, 3), 1), ((0, 3), 2)],
    ids=["one process", "two stages, split elsewhere", "two replicas"],
)
def test_run_from_masters_and_moments_equals_the_uninterrupted_run(
    training_inputs, uninterrupted_run, tmp_path, bounds, data_size
):
    folder = prepare_continued(
        tmp_path / "run",
        training_inputs,
        uninterrupted_run,
        PARENT_STEPS,
        CONTINUED,
        bounds=bounds,
        data_size=data_size,
    )
    assert folder.check_inputs().parent_state.with_moments
    run_training(folder)
    np.testing.assert_allclose(read_steps(folder), read_steps(uninterrupted_run)[PARENT_STEPS:], rtol=1e-5)
    ours, theirs = (load_file(run.export / "model.safetensors") for run in (folder, uninterrupted_run))
    largest = max((ours[name] - tensor).abs().max().item() for name, tensor in theirs.items())
    assert largest < 1e-5, largest
    newest = read_manifest(list(list_committed_checkpoints(folder.checkpoints))[-1])
    assert newest.num_updates == CONSTANT.max_steps  # Adam's bias correction counts the parent's updates


@pytest.mark.slow
def test_masters_alone_give_the_parents_loss_and_an_optimizer_without_moments(
    training_inputs, uninterrupted_run, tmp_path
):
    folder = prepare_continued(
        tmp_path / "run", training_inputs, uninterrupted_run, PARENT_STEPS, CONTINUED, with_moments=False
    )
    run_training(folder)
    (loss, norm), (second_loss, _) = read_steps(folder)[:2]
    expected = read_steps(uninterrupted_run)[PARENT_STEPS:]
    np.testing.assert_allclose((loss, norm), expected[0], rtol=1e-5)
    assert abs(second_loss - expected[1][0]) > 1e-5 * second_loss
    newest = read_manifest(list(list_committed_checkpoints(folder.checkpoints))[-1])
    assert newest.num_updates == CONSTANT.max_steps - PARENT_STEPS


def write_parent_checkpoint(folder):
    """Write a checkpoint of two ranks as the parent's run writes it."""
    path = folder / "step-00000004"
    path.mkdir(parents=True)
    names = [".metadata", *(f"__{rank}_{part}0.distcp" for rank in (0, 1) for part in ("", "moments_"))]
    for name in names:
        (path / name).write_bytes(name.encode())
    files = {name: compute_digest(path / name) for name in names}
    manifest = CheckpointManifest(step=4, model={}, order={}, num_updates=4, loss=None, decisions=None, files=files)
    (path / CHECKPOINT_MANIFEST_FILE).write_text(json.dumps(manifest.to_json()))
    return path


@pytest.mark.parametrize("with_moments", [True, False])
def test_incomplete_state_of_a_parent_is_refused_before_devices_are_taken(training_inputs, tmp_path, with_moments):
    folder = tmp_path / "run"
    path = write_parent_checkpoint(tmp_path / "parent")
    digest = compute_digest(path / CHECKPOINT_MANIFEST_FILE)
    state = ParentState(step=4, manifest_sha256=digest.sha256, with_moments=with_moments)
    run = prepare_run(folder, training_inputs, CONTINUED, parent_state=state)
    path = shutil.move(tmp_path / "parent", run.parent_state) / path.name
    assert run.check_inputs().parent_state == state
    (path / "__1_moments_0.distcp").unlink()
    if with_moments:
        with pytest.raises(ValueError, match=r"parent_state/step-00000004/__1_moments_0\.distcp is missing"):
            run.check_inputs()
    else:
        run.check_inputs()
    (path / "__1_0.distcp").write_bytes(b"shorter")
    with pytest.raises(ValueError, match=r"__1_0\.distcp is missing or has another size"):
        run.check_inputs()
    (path / CHECKPOINT_MANIFEST_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"the manifest of parent_state/step-00000004 differs from run\.json"):
        run.check_inputs()
    with pytest.raises(ValueError, match="parent_state is of a parent, and there is none"):
        dataclasses.replace(run.read_spec(), kind="pretrain", parent=None)


@pytest.mark.slow
def test_ranks_end_with_the_reason_if_the_state_of_the_parent_is_damaged(training_inputs, uninterrupted_run, tmp_path):
    run = prepare_continued(tmp_path / "run", training_inputs, uninterrupted_run, PARENT_STEPS, CONTINUED)
    file = run.parent_state / "step-00000004" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with launch(run) as process:
        assert process.wait(120) != 0
    assert re.search(
        "the parent's state in .* is damaged: __0_0.distcp has another", (run.path / "train.log").read_text()
    )

"""Test checkpoints: commit, retention, damage detection, and loading of any slice of a tensor."""

import json
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as distributed_checkpoint

from tests.memory import measure_peak_growth_bytes
from yuan.train.checkpoint.checkpoints import CheckpointStore
from yuan.train.checkpoint.dcp import TensorSlice
from yuan.train.checkpoint_manifest import CHECKPOINT_MANIFEST_FILE, MANIFEST_DAMAGE
from yuan.train.events import CheckpointDamagedEvent, CheckpointEvent, CheckpointFailedEvent

ABOUT = {"model": {"name": "m", "num_layers": 2}, "order": {"seed": 1}}
SLICE_ELEMENTS = 4 * 2**20
SIZES = {"weight/a": 10, "exp_avg/a": 10, "weight/b": 7}


@pytest.fixture
def events():
    return []


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    """Start a process group of one rank; test_training covers several ranks."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/met", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def store(tmp_path, events):
    store = CheckpointStore(tmp_path, **ABOUT, keep=2, event=events.append)
    yield store
    store.close()


def make_values(step):
    return {key: torch.arange(size) + 100.0 * step + n for n, (key, size) in enumerate(SIZES.items())}


def save_checkpoint(store, step):
    store.save(step, {key: TensorSlice(0, len(t), t) for key, t in make_values(step).items()}, num_updates=step)
    store.wait()


def test_any_slice_of_a_tensor_can_be_loaded(store):
    save_checkpoint(store, 3)
    cuts = {"weight/a": (2, 5), "exp_avg/a": (0, 10), "weight/b": (6, 1)}
    slices = {key: TensorSlice(start, SIZES[key], torch.zeros(length)) for key, (start, length) in cuts.items()}
    store.open_slices(3).read(slices)
    for key, (start, length) in cuts.items():
        assert torch.equal(slices[key].values, make_values(3)[key][start : start + length])


def test_store_that_saves_synchronously_commits_before_it_returns(tmp_path, events):
    store = CheckpointStore(tmp_path, **ABOUT, keep=2, event=events.append, is_asynchronous=False)
    store.save(3, {key: TensorSlice(0, len(t), t) for key, t in make_values(3).items()}, num_updates=3)
    assert [type(event) for event in events] == [CheckpointEvent] and store.get_write_seconds() > 0
    values = TensorSlice(2, SIZES["weight/a"], torch.zeros(5))
    store.open_slices(3).read({"weight/a": values})
    assert torch.equal(values.values, make_values(3)["weight/a"][2:7]) and store.find_newest().step == 3
    store.close()


def test_synchronous_save_of_views_and_a_read_need_memory_for_one_slice(tmp_path, events):
    flat = torch.ones(12 * SLICE_ELEMENTS)
    names = ["weight/a", "weight/b", "weight/c", *(f"exp_avg/{name}" for name in "abcdefghi")]
    views = dict(zip(names, flat.split(SLICE_ELEMENTS), strict=True))
    slices = {key: TensorSlice(0, SLICE_ELEMENTS, view) for key, view in views.items()}
    store = CheckpointStore(tmp_path, **ABOUT, keep=2, event=events.append, is_asynchronous=False)
    growth = measure_peak_growth_bytes(lambda: store.save(1, slices, num_updates=1))
    assert events == [CheckpointEvent(step=1)] and growth < 2 * 4 * SLICE_ELEMENTS, growth
    flat.zero_()
    growth = measure_peak_growth_bytes(lambda: store.open_slices(1).read(slices))
    assert growth < 4 * SLICE_ELEMENTS and torch.equal(flat, torch.ones(12 * SLICE_ELEMENTS)), growth
    store.close()


def test_weights_can_be_loaded_without_the_files_of_the_moments(store, tmp_path):
    save_checkpoint(store, 3)
    (tmp_path / "step-00000003" / "__0_moments_0.distcp").unlink()
    read = {"weight/a": TensorSlice(0, 10, torch.zeros(10))}
    store.open_slices(3).read(read)
    assert torch.equal(read["weight/a"].values, make_values(3)["weight/a"])


class Command:
    """A value whose pickle runs a command."""

    def __reduce__(self):
        return os.system, ("true",)


def test_index_of_a_checkpoint_runs_no_code(store, tmp_path):
    save_checkpoint(store, 3)
    (tmp_path / "step-00000003" / ".metadata").write_bytes(pickle.dumps(Command()))
    with pytest.raises(ValueError, match=r"must name parts of an index alone, got posix\.system; .* do not use it"):
        store.open_slices(3).read({"weight/a": TensorSlice(0, 10, torch.zeros(10))})


def test_torch_reads_the_same_numbers_from_a_checkpoint(store, tmp_path):
    save_checkpoint(store, 3)
    tensors = {key: torch.zeros(size) for key, size in SIZES.items()}
    distributed_checkpoint.load(tensors, checkpoint_id=tmp_path / "step-00000003")
    for key, values in make_values(3).items():
        assert torch.equal(tensors[key], values)


def test_index_that_names_another_folder_or_other_numbers_is_refused(store, tmp_path):
    save_checkpoint(store, 3)
    index = tmp_path / "step-00000003" / ".metadata"
    content = index.read_bytes()
    values = TensorSlice(0, 10, torch.zeros(10))
    index.write_bytes(content.replace(b"__0_0.distcp", b"../../a.safe"))
    with pytest.raises(ValueError, match=r"must name files of its own folder, got \.\./\.\./a\.safe; do not use it"):
        store.open_slices(3).read({"weight/a": values})
    index.write_bytes(content.replace(b"__0_0.distcp", b"manifest.jsn"))
    (tmp_path / "step-00000003" / "manifest.jsn").write_bytes(bytes(4000))
    with pytest.raises(
        ValueError, match=r"manifest\.jsn of the checkpoint has no 10 numbers of weight/a .* is damaged"
    ):
        store.open_slices(3).read({"weight/a": values})


def test_checkpoint_has_the_values_at_the_time_of_the_save_call(store):
    tensor = torch.ones(10)
    store.save(1, {"weight/a": TensorSlice(0, 10, tensor)}, num_updates=1)
    tensor.zero_()
    read = {"weight/a": TensorSlice(0, 10, torch.zeros(10))}
    store.wait()
    store.open_slices(1).read(read)
    assert read["weight/a"].values.sum() == 10


def test_last_two_checkpoints_are_kept_and_the_newest_is_found(store, tmp_path, events):
    for step in (1, 2, 3):
        save_checkpoint(store, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert store.find_newest().step == 3 and store.find_newest().num_updates == 3
    assert events == [CheckpointEvent(step=step) for step in (1, 2, 3)]


def test_rollback_checkpoint_and_best_checkpoint_are_kept(store, tmp_path):
    store.rollback_step = 2
    for step, loss in ((1, 0.5), (2, 3.0), (3, 2.0), (4, 2.5), (5, 2.2)):
        store.save(
            step, {key: TensorSlice(0, len(t), t) for key, t in make_values(step).items()}, num_updates=1, loss=loss
        )
        store.wait()
    assert [int(path.name[-1]) for path in sorted(tmp_path.iterdir())] == [1, 2, 4, 5]
    assert store.find_newest(max_step=3).step == 2
    store.drop_after(2)
    assert store.find_newest().step == 2


def test_checkpoint_without_a_manifest_is_ignored(store, tmp_path):
    save_checkpoint(store, 1)
    save_checkpoint(store, 2)
    (tmp_path / "step-00000002" / CHECKPOINT_MANIFEST_FILE).unlink()
    assert store.find_newest().step == 1
    save_checkpoint(store, 3)
    assert store.find_newest().step == 3 and not (tmp_path / "step-00000002").exists()


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip_bit, "another sha256"), (truncate, "bytes, not"), (lambda path: path.unlink(), "cannot be read")],
)
def test_damaged_checkpoint_is_skipped_and_reported(store, tmp_path, events, damage, message):
    save_checkpoint(store, 1)
    save_checkpoint(store, 2)
    damage(tmp_path / "step-00000002" / "__0_0.distcp")
    assert store.find_newest().step == 1
    assert isinstance(events[-1], CheckpointDamagedEvent) and events[-1].step == 2
    assert "__0_0.distcp" in events[-1].reason and message in events[-1].reason


@pytest.mark.parametrize("key", ["model", "order"])
def test_a_checkpoint_of_another_run_is_refused(store, tmp_path, key):
    save_checkpoint(store, 1)
    other = CheckpointStore(tmp_path, **{**ABOUT, key: {"name": "another"}}, keep=2, event=print)
    with pytest.raises(ValueError, match=f"another run: its {key}"):
        other.find_newest()
    other.close()


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 2}', None])
def test_edited_manifest_is_reported_as_damage(store, tmp_path, events, text):
    save_checkpoint(store, 1)
    save_checkpoint(store, 2)
    manifest = tmp_path / "step-00000002" / CHECKPOINT_MANIFEST_FILE
    edited = json.dumps({**json.loads(manifest.read_text()), "updates": 77})
    manifest.write_text(edited if text is None else text)
    assert store.find_newest().step == 1
    assert events[-1] == CheckpointDamagedEvent(step=2, reason=MANIFEST_DAMAGE)


def test_manifest_of_another_step_than_its_folder_is_reported_as_damage(store, tmp_path, events):
    save_checkpoint(store, 1)
    save_checkpoint(store, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000007")
    assert store.find_newest().step == 1
    assert events[-1] == CheckpointDamagedEvent(step=7, reason=MANIFEST_DAMAGE)
    assert "of another step than its folder" in MANIFEST_DAMAGE


def test_error_for_a_missing_tensor_names_the_tensor(store):
    save_checkpoint(store, 1)
    with pytest.raises(ValueError, match=r"must have weight/c in 4 elements, got none"):
        store.open_slices(1).read({"weight/c": TensorSlice(0, 4, torch.zeros(4))})


def test_failed_save_is_an_event_and_the_previous_checkpoint_remains(store, tmp_path, events):
    save_checkpoint(store, 1)
    (tmp_path / "step-00000002").write_text("a file is where the folder should be")
    save_checkpoint(store, 2)
    assert isinstance(events[-1], CheckpointFailedEvent) and events[-1].step == 2
    assert store.find_newest().step == 1

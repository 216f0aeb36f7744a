"""Files of a published folder: pickles, indexes, manifests, tokenizers, and entries that are no files."""

import json
import os
import pickle
import zipfile

import pytest
import torch

from tests.yuan.published import load_hf_tensors
from yuan import tokenizer as tokenizers
from yuan.model import weights
from yuan.model.convert import export_hf, import_hf


def test_pickled_shards_are_read_without_running_code(published_folder, model_folder, tmp_path):
    tensors = load_hf_tensors(published_folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    where = {name: f"pytorch_model-0000{1 + (n % 2)}-of-00002.bin" for n, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: tensors[name] for name in names if where[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    import_hf(tmp_path, tmp_path / "ours")
    assert torch.equal(weights.load(tmp_path / "ours").norm.weight, weights.load(model_folder).norm.weight)
    with pytest.raises(ValueError, match="tokenizer"):
        weights.load_tokenizer(tmp_path / "ours")


class PickledCode:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_a_pickle_with_code_is_refused(published_folder, tmp_path):
    torch.save({"model.norm.weight": PickledCode()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin holds objects other than tensors, or code, which is never"
    ):
        import_hf(tmp_path, tmp_path / "ours")


def test_a_corrupt_shard_is_named(published_folder, tmp_path):
    for file in published_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        import_hf(tmp_path, tmp_path / "ours")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        import_hf(tmp_path, tmp_path / "ours")
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}"):
        import_hf(tmp_path, tmp_path / "ours")


def test_safetensors_are_read_beside_a_left_over_index_of_pickles(write_published, tmp_path):
    folder = write_published()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "gone.bin"}}))
    import_hf(folder, tmp_path / "ours")


@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"state_dict": tensors, "epoch": 3}])
@pytest.mark.parametrize("with_zip", [True, False])
def test_pickle_of_an_old_torch_or_within_a_state_dict_is_read(
    published_folder, model_folder, tmp_path, wrap, with_zip
):
    tensors = load_hf_tensors(published_folder)
    torch.save(wrap(tensors), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=with_zip)
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    import_hf(tmp_path, tmp_path / "ours")
    assert torch.equal(weights.load(tmp_path / "ours").norm.weight, weights.load(model_folder).norm.weight)


@pytest.mark.parametrize("saved", [{"optimizer": {}}, [torch.ones(2)], {"a": 5}])
def test_pickle_without_tensors_by_name_is_named_for_its_content(published_folder, tmp_path, saved):
    torch.save(saved, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"pytorch_model\.bin must hold a dictionary of tensors"):
        import_hf(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", "", 5])
def test_index_that_names_a_file_outside_of_its_folder_is_refused(published_folder, tmp_path, name):
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match="outside of its folder"):
        import_hf(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors.index.json", "weights.bin"])
def test_index_that_names_another_file_than_weights_is_refused_and_not_that_file(write_published, tmp_path, name):
    folder = write_published()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": name, "lm_head.weight": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json names '{name}' as a file of weights.*fetch the index again"):
        import_hf(folder, tmp_path / "ours")


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", ".."])
def test_manifest_that_names_a_file_outside_of_its_folder_is_refused(write_published, tmp_path, name):
    folder = write_published()
    (folder / "manifest.json").write_text(json.dumps({"files": {name: "0"}}))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        import_hf(folder, tmp_path / "ours")


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "{", "\xff", '{"files": 5}', '{"format": "other software"}'])
def test_foreign_manifest_is_one_line_with_its_file_and_the_fix(write_published, tmp_path, content):
    folder = write_published()
    (folder / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"manifest\.json is not of this platform, remove it") as raised:
        import_hf(folder, tmp_path / "ours")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "{", "NaN", '{"num_hidden_layers": "2"}', '{"num_hidden_layers": 2.5, "hidden_size": 32}', "\xff"],
)
def test_config_of_wrong_type_is_one_line_with_its_file(write_published, tmp_path, content):
    folder = write_published()
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        import_hf(folder, tmp_path / "ours")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [True, "32", 2.5, -1, 10**20, [1], None])
def test_size_in_the_config_that_is_no_integer_of_its_range_is_refused(write_published, tmp_path, field, value):
    folder = write_published()
    data = json.loads((folder / "config.json").read_text()) | {field: value, "model_max_length": value}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"config\.json is not the configuration of a Yuan"):
        import_hf(folder, tmp_path / "ours")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "config.json"])
@pytest.mark.parametrize("kind", ["pointer", "folder", "fifo", "link"])
def test_entry_that_is_no_file_or_only_a_pointer_is_named(write_published, tmp_path, name, kind):
    folder = write_published()
    file = folder / name
    file.unlink(missing_ok=True)
    if kind == "pointer":
        file.write_bytes(LFS_POINTER)
    elif kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("gone")
    with pytest.raises(ValueError, match=f"{file} .*(Git LFS|folder|special file|does not exist)"):
        import_hf(folder, tmp_path / "ours")


def test_shards_without_their_index_are_named_with_the_index(published_folder, tmp_path):
    for file in published_folder.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ValueError, match=r"model-00001-of-.* without an index; download model\.safetensors\.index\.json"
    ):
        import_hf(tmp_path, tmp_path / "ours")


def test_links_of_a_download_cache_are_followed(write_published, tmp_path):
    folder, cache = write_published(), tmp_path / "cache"
    cache.mkdir()
    for file in list(folder.glob("*.*")):
        (cache / file.name).symlink_to(file)
    import_hf(cache, tmp_path / "ours")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.zeros(1).expand(1 << 20), "repeats them"), (torch.zeros(1 << 20), "shared by several of them")],
)
def test_pickle_that_holds_fewer_numbers_than_its_tensors_is_refused(published_folder, tmp_path, tensor, message):
    """Such a file of some kilobytes would fill the memory."""
    tensors = load_hf_tensors(published_folder) | {f"x{n}": tensor for n in range(4)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        import_hf(tmp_path, tmp_path / "ours")


def test_empty_tokenizer_is_named(write_published, tmp_path):
    folder = write_published()
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer\.model: the SentencePiece model is empty"):
        import_hf(folder, tmp_path / "ours")


def test_tokenizer_of_another_size_than_the_vocabulary_is_refused(write_published, tmp_path):
    big = tokenizers.train(["".join(chr(0x4E00 + n) for n in range(300))], vocab_size=1000)
    folder = write_published()
    big.save(folder)
    with pytest.raises(ValueError, match=r"the tokenizer has .* pieces and the model"):
        import_hf(folder, tmp_path / "ours")


@pytest.mark.parametrize("depth", [1_000, 3_000_000])
@pytest.mark.parametrize("with_zip", [True, False])
def test_a_pickle_of_nested_tuples_is_one_line_with_its_file(published_folder, tmp_path, depth, with_zip):
    """Python's hash of a tuple descends without a limit; such a key of a dictionary ended the process."""
    nested = b"\x80\x02}" + b")" + b"\x85" * depth + b"K\x01s."
    file = tmp_path / "pytorch_model.bin"
    if with_zip:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in (("data.pkl", nested), ("version", b"3\n"), ("byteorder", b"little")):
                archive.writestr(f"archive/{name}", content)
    else:
        file.write_bytes(b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})) + nested)
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"pytorch_model\.bin") as raised:
        import_hf(tmp_path, tmp_path / "ours")
    assert "\n" not in str(raised.value) and "recursion" not in str(raised.value)


NESTED_TUPLES = b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s."


def write_pickled_folder(published_folder, folder, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    (folder / "config.json").write_bytes((published_folder / "config.json").read_bytes())


@pytest.mark.parametrize(
    "members",
    [
        [("archive/x/data.pkl", b"\x80\x02}."), ("archive/data.pkl", NESTED_TUPLES)],
        [("archive/DATA.PKL", NESTED_TUPLES)],
        [("archive/Data.pkl", NESTED_TUPLES), ("archive/x/data.pkl", b"\x80\x02}.")],
    ],
)
def test_the_pickle_that_torch_reads_is_the_one_that_is_checked(published_folder, tmp_path, members):
    write_pickled_folder(published_folder, tmp_path, [*members, ("archive/version", b"3\n")])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged \(its pickle has more than"):
        import_hf(tmp_path, tmp_path / "ours")


def test_an_archive_without_a_pickle_is_refused(published_folder, tmp_path):
    write_pickled_folder(
        published_folder, tmp_path, [("archive/x/data.pkl", b"\x80\x02}."), ("archive/version", b"3\n")]
    )
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged .*data\.pkl"):
        import_hf(tmp_path, tmp_path / "ours")


def test_a_compressed_archive_is_refused(published_folder, tmp_path):
    """Torch's reader loads the version as it opens the file, whatever its size."""
    members = [("archive/data.pkl", b"\x80\x02}."), ("archive/version", b"3" * 10_000_000)]
    write_pickled_folder(published_folder, tmp_path, members, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged \(its member archive/data\.pkl is compressed"):
        import_hf(tmp_path, tmp_path / "ours")


def test_an_archive_with_two_directories_is_refused(published_folder, tmp_path):
    """Torch would read the first one, which has the compressed members, and zipfile the second."""
    other = tmp_path / "other"
    other.mkdir()
    members = [("archive/data.pkl", b"\x80\x02}."), ("archive/version", b"3\n")]
    write_pickled_folder(published_folder, other, members)
    write_pickled_folder(published_folder, tmp_path, members, zipfile.ZIP_DEFLATED)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes() + (other / file.name).read_bytes())
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged \(its zip directory"):
        import_hf(tmp_path, tmp_path / "ours")


BYTE_ARRAY = b"c__builtin__\nbytearray\n\x8a\x05" + (14 * 2**30).to_bytes(5, "little") + b"\x85Rs."


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\x80\x02}X\x01\0\0\0a" + BYTE_ARRAY, "builtins.bytearray"),
        (b"\x80\x02}X\x01\0\0\0acbuiltins\nset\n)Rs.", "builtins.set"),
        (b"\x80\x02}X\x01\0\0\0ac_codecs\nencode\n.", "_codecs.encode"),
        (b"\x80\x02}X\x01\0\0\0accollections\nCounter\n)Rs.", "collections.Counter"),
        (b"\x80\x02}X\x01\0\0\0actorch\nTensor\n.", "torch.Tensor"),
        (b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_wrapper_subclass\n.", "torch._utils._rebuild_wrapper_subclass"),
        (pickle.dumps({"a": bytearray(5)}, 4), "builtins.bytearray"),
    ],
)
@pytest.mark.parametrize("place", ["archive", 0, 1, 2, 3, 4])
def test_a_pickle_that_names_what_no_state_dictionary_needs_is_refused_by_it(
    published_folder, tmp_path, content, name, place
):
    """A file of 200 bytes could fill the memory: torch's restricted unpickler makes byte arrays of any size."""
    write_pickled_folder(published_folder, tmp_path, [("archive/data.pkl", content), ("archive/version", b"3\n")])
    if place != "archive":
        pickles = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
        pickles[place] = content
        (tmp_path / "pytorch_model.bin").write_bytes(b"".join(pickles))
    with pytest.raises(ValueError, match=rf"its pickle names {name}, which no state dictionary needs; save") as raised:
        import_hf(tmp_path, tmp_path / "ours")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"X\xff\xff\xff\x7fa", b"U\xffa", b"\x8a\xffa", b"\x8b\xff\xff\xff\x7fa"])
@pytest.mark.parametrize("with_zip", [True, False])
def test_a_pickle_with_a_value_longer_than_the_file_is_refused(published_folder, tmp_path, content, with_zip):
    write_pickled_folder(
        published_folder, tmp_path, [("archive/data.pkl", b"\x80\x02" + content), ("archive/version", b"3\n")]
    )
    if not with_zip:
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02" + content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged \(it is no pickle of tensors\)"):
        import_hf(tmp_path, tmp_path / "ours")


def test_a_pickle_whose_tensors_overlap_in_the_file_is_refused(published_folder, tmp_path):
    """Half of the tensors claim a storage that reaches over the next ones, so 2 MB could become 249 MB."""
    file, num_tensors, num_values = tmp_path / "whole.bin", 40, 1_000
    torch.save({f"t{n:02}": torch.full((num_values,), float(n)) for n in range(num_tensors)}, file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as overlapping:
        for item in whole.infolist():
            content = whole.read(item)
            if item.filename.endswith("data.pkl"):
                size, claimed = num_values.to_bytes(2, "little"), (20 * num_values).to_bytes(2, "little")
                content = content.replace(b"M" + size, b"M" + claimed, num_tensors)
            overlapping.writestr(item.filename, content)
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"pytorch_model\.bin have \d+ bytes, but it stores"):
        import_hf(tmp_path, tmp_path / "ours")


def test_folder_of_another_kind_is_named_with_what_to_do(model_folder, published_folder, tmp_path):
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (checkpoint / "manifest.json").write_text("{}")
    for convert, folder, reason in (
        (import_hf, model_folder, f"is a model folder of this platform already; .* `cotrain generate {model_folder}`"),
        (import_hf, run, f"is a run folder; its model is {run}/export"),
        (import_hf, checkpoint, "is a part of a run folder; write a model from a checkpoint"),
        (export_hf, run, "is a run folder"),
        (export_hf, checkpoint, "is a part of a run folder"),
        (export_hf, published_folder, "import it first"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()

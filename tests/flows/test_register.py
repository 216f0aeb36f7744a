"""Test the registration of a version from a folder that a service could have written."""

import hashlib
import json
import os
from dataclasses import replace

import pytest

from flows.round.versions import copy_manifest_files, list_manifest_sources, read_export_manifest
from yuan.model.model_manifest import ModelManifest


@pytest.fixture
def folders(tmp_path):
    export, target = tmp_path / "export", tmp_path / "target"
    export.mkdir()
    target.mkdir()
    (export / "config.json").write_bytes(b"{}")
    return export, target, ModelManifest({"config.json": hashlib.sha256(b"{}").hexdigest()}, {"step": 5})


def test_only_recorded_files_are_published(folders, tmp_path):
    export, target, recorded = folders
    (tmp_path / "env").write_text("secret")
    (export / "notes.txt").symlink_to(tmp_path / "env")
    copy_manifest_files(export, target, recorded)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "manifest.json"]


def test_symlink_in_place_of_a_recorded_file_is_refused(folders, tmp_path):
    export, target, recorded = folders
    (tmp_path / "env").write_bytes(b"{}")
    (export / "config.json").unlink()
    (export / "config.json").symlink_to(tmp_path / "env")
    with pytest.raises(ValueError, match=r"config.json of .* cannot be copied"):
        copy_manifest_files(export, target, recorded)


@pytest.mark.parametrize("name", ["../env", "a/b", "/etc/passwd", ".."])
def test_path_traversal_in_recorded_names_is_refused(folders, name):
    export, target, recorded = folders
    with pytest.raises(ValueError, match=r"files of one folder|cannot be copied"):
        copy_manifest_files(export, target, replace(recorded, files={name: "0"}))


def test_file_that_differs_from_its_recorded_digest_is_refused(folders):
    export, target, recorded = folders
    (export / "config.json").write_bytes(b"[]")
    with pytest.raises(ValueError, match="recorded is"):
        copy_manifest_files(export, target, recorded)


def test_only_files_of_the_manifest_are_registered_and_no_symlinks(folders, tmp_path):
    export, _, manifest = folders
    (tmp_path / "env").write_text("secret")
    (export / "notes.txt").symlink_to(tmp_path / "env")
    (export / "manifest.json").write_text(json.dumps(manifest.to_json()))
    assert read_sources(tmp_path) == {"config.json": b"{}", "manifest.json": json.dumps(manifest.to_json()).encode()}


def read_sources(run):
    """Return the content of what is registered of a run's export."""
    contents = {}
    for source in list_manifest_sources(run / "export", read_export_manifest(run)):
        with source.open() as stream:
            contents[source.name] = stream.read()
    return contents


@pytest.mark.timeout(60)
@pytest.mark.parametrize("attack", ["file", "fifo", "sparse", "folder", "manifest", "manifest fifo", "no manifest"])
def test_symlinks_fifos_and_sparse_files_are_not_registered(folders, tmp_path, attack):
    export, _, manifest = folders
    (export / "manifest.json").write_text(json.dumps(manifest.to_json()))
    place = export / ("manifest.json" if "manifest" in attack else "config.json")
    place.rename(tmp_path / "elsewhere")
    if attack in ("file", "manifest"):
        place.symlink_to(tmp_path / "elsewhere")
    elif attack == "folder":
        (tmp_path / "elsewhere").rename(place)
        export.rename(tmp_path / "elsewhere")
        export.symlink_to(tmp_path / "elsewhere")
    elif attack == "sparse":
        with place.open("wb") as file:
            file.truncate(1 << 42)
    elif attack != "no manifest":
        os.mkfifo(place)
    with pytest.raises(ValueError, match="cannot be"):
        read_sources(tmp_path)

"""Replace files and folders atomically; tests/flows/test_run_files.py covers hostile entries of a run folder."""

import pytest

from yuan.safe_files import is_plain_file_name, replace_folder


def write_partly(folder):
    (folder / "partial").touch()
    raise OSError("disk full")


def test_a_folder_is_replaced_when_its_block_completes(tmp_path):
    target = tmp_path / "new" / "export"
    for text in ("first", "second"):
        with replace_folder(target) as scratch:
            (scratch / text).write_text(text)
        assert [path.name for path in target.iterdir()] == [text]
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_block_leaves_the_folder_unchanged_and_the_next_one_starts_empty(tmp_path):
    target = tmp_path / "export"
    with replace_folder(target) as scratch:
        (scratch / "whole").touch()
    with pytest.raises(OSError, match="disk full"), replace_folder(target) as scratch:
        write_partly(scratch)
    assert [path.name for path in target.iterdir()] == ["whole"]
    with replace_folder(target) as scratch:
        assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("name", ["export", ".export"])
def test_a_link_in_place_of_the_folder_is_replaced_and_not_followed(tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(victim)
    with replace_folder(run / "export") as scratch:
        (scratch / "weights").touch()
    assert not (run / "export").is_symlink() and (run / "export" / "weights").is_file()
    assert [path.name for path in victim.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0", "a\n", "\ud800", "é" * 128, 3, None])
def test_name_that_no_file_of_a_folder_may_have_is_recognized(name):
    assert not is_plain_file_name(name) and is_plain_file_name("é" * 127)

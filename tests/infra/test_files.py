"""Files in folders that somebody hostile may write."""

import hashlib
import os

import pytest

from infra.files import copy_regular, read_regular, write_private


def test_links_fifos_and_files_without_end_are_refused(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_text("x" * 100)
    for name in ("link", "fifo", "large", "missing"):
        with pytest.raises(OSError, match=name):
            read_regular(tmp_path / name, limit=50)
        if name != "large":
            with pytest.raises(OSError, match=name):
                copy_regular(tmp_path / name, tmp_path / f"copy of {name}")
    assert read_regular(tmp_path / "secret") == "secret"


def test_a_copy_is_told_by_its_digest_and_overwrites_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert copy_regular(tmp_path / "file", tmp_path / "copy") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(FileExistsError):
        copy_regular(tmp_path / "file", tmp_path / "copy")


def test_a_link_at_the_place_of_a_private_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    write_private(tmp_path / "file", "text")
    assert ((tmp_path / "victim").read_text(), (tmp_path / "file").read_text()) == ("mine", "text")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600

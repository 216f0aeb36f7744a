"""Test file functions in folders that an attacker can write."""

import hashlib
import os
import subprocess
import sys

import pytest

from infra.files import copy_descriptor, open_log, open_regular, read_regular, read_tail, replace_file, write_private
from infra.process_group import run_child


def test_symlinks_fifos_and_too_large_files_are_refused(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_text("x" * 100)
    for name in ("link", "fifo", "large", "missing"):
        with pytest.raises(OSError, match=name):
            read_regular(tmp_path / name, limit=50)
        if name != "large":
            with pytest.raises(OSError, match=name):
                open_regular(tmp_path / name)
    assert read_regular(tmp_path / "secret") == "secret"


def test_copy_returns_its_digest_and_overwrites_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert copy_descriptor(open_regular(tmp_path / "file"), tmp_path / "copy") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(FileExistsError):
        copy_descriptor(open_regular(tmp_path / "file"), tmp_path / "copy")


@pytest.mark.parametrize("write", [write_private, replace_file])
def test_error_of_a_write_to_a_full_disk_names_the_file(tmp_path, write):
    mounting = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if subprocess.run([*mounting, mount], capture_output=True).returncode != 0:
        pytest.skip("this machine does not allow a process to mount a small disk in its own namespace")
    code = f"""
from pathlib import Path
from infra.files import {write.__name__}
try:
    {write.__name__}(Path({str(tmp_path)!r}) / "file", "x" * 100_000)
except OSError as error:
    print(error)
"""
    inside = [*mounting, f'{mount}; exec "$@"', "sh", sys.executable, "-c", code]
    result = subprocess.run(inside, capture_output=True, text=True)
    assert result.stdout == f"[Errno 28] No space left on device: '{tmp_path}/file'\n", result.stderr


def test_symlink_at_the_path_of_a_private_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    write_private(tmp_path / "file", "text")
    assert ((tmp_path / "victim").read_text(), (tmp_path / "file").read_text()) == ("mine", "text")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


PLANTS = {
    "link": lambda place, victim: place.symlink_to(victim),
    "hard link": lambda place, victim: os.link(victim, place),
    "link to nothing": lambda place, victim: place.symlink_to(victim.with_name("new")),
    "fifo": lambda place, victim: os.mkfifo(place),
    "folder": lambda place, victim: (place / "deep").mkdir(parents=True),
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.timeout(20)
def test_log_is_written_in_its_folder_when_its_path_is_a_link_fifo_or_folder(tmp_path, plant):
    (tmp_path / "run").mkdir()
    victim, place = tmp_path / ".bashrc", tmp_path / "run" / "eval.log"
    victim.write_text("mine\n")
    PLANTS[plant](place, victim)
    PLANTS[plant](tmp_path / "run" / ".parent", victim)
    with run_child([sys.executable, "-c", "print('evil')"], place.parent, env={}, log_name=place.name) as process:
        assert process.wait() == 0
    assert victim.read_text() == "mine\n" and not (tmp_path / "new").exists()
    assert read_regular(place) == "evil\n"


def test_a_log_that_is_a_file_is_appended_to(tmp_path):
    for text in (b"one ", b"two"):
        with os.fdopen(open_log(tmp_path / "log"), "ab") as log:
            log.write(text)
    assert read_tail(tmp_path / "log", 100) == "one two" and read_tail(tmp_path / "log", 3) == "two"


@pytest.mark.timeout(20)
def test_tail_of_a_huge_sparse_file_is_read_and_of_a_symlink_refused(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    assert read_tail(tmp_path / "sparse", 4) == "\0" * 4
    (tmp_path / "link").symlink_to(tmp_path / "sparse")
    with pytest.raises(OSError, match="link"):
        read_tail(tmp_path / "link", 4)


@pytest.mark.parametrize("plant", PLANTS)
def test_replacing_a_file_does_not_write_through_a_link_at_its_temporary_path(tmp_path, plant):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    PLANTS[plant](tmp_path / f".file.{os.getpid()}", victim)
    replace_file(tmp_path / "file", "text")
    assert (victim.read_text(), (tmp_path / "file").read_text()) == ("mine", "text")

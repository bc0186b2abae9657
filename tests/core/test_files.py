"""Files are whole or not there, and a full disk has a name."""

import doctest
import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from minillm import files
from minillm.errors import InputError, RunError, SetupError
from minillm.files import (
    atomic_folder,
    atomic_write,
    folder_lock,
    named_os_errors,
    require_free_space,
    sha256_file,
    write_text,
)


def test_atomic_write_makes_the_file_and_its_folders(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a/b.bin") as stream:
        stream.write(b"whole")
    assert (tmp_path / "a/b.bin").read_bytes() == b"whole"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_nothing_is_there_before_the_block_ends(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "x") as stream:
        stream.write(b"half")
        assert not (tmp_path / "x").exists()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as stream:
        stream.write(bytes(1 // 0))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x", b"old")]


def test_a_killed_write_leaves_no_file_under_the_name(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom minillm.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as stream:\n"
        "    stream.write(b'half'); stream.flush(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_setup_error_that_names_the_file(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(SetupError, match=r"the disk is full while writing `.*/x` \(.* free\)"),
        atomic_write(tmp_path / "x"),
    ):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_device_that_is_really_full_is_named() -> None:
    full = Path("/dev/full")
    with (
        pytest.raises(SetupError, match="the disk is full"),
        named_os_errors(full),
        full.open("wb", buffering=0) as stream,
    ):
        stream.write(b"x")


def test_a_forbidden_folder_is_a_setup_error() -> None:
    with pytest.raises(SetupError, match="cannot write"), named_os_errors(Path("x")):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), named_os_errors(tmp_path):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out", ours=lambda _: False) as part:
        (part / "a.txt").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a.txt"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", ours=bool) as part:
        (part / "new").write_bytes(bytes(1 // 0))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_folder_with_files_of_the_users_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/diary.txt").touch()
    with (
        pytest.raises(InputError, match=r"diary\.txt"),
        atomic_folder(tmp_path / "out", ours=lambda path: path.suffix == ".bin"),
    ):
        pass
    assert (tmp_path / "out/diary.txt").exists()


def test_free_space_is_asked_of_a_folder_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=100)
    )
    require_free_space(tmp_path / "a/b", 100, "this")
    with pytest.raises(SetupError, match=r"this needs 101 B in `.*a/b`, 100 B are free"):
        require_free_space(tmp_path / "a/b", 101, "this")
    assert set(asked) == {tmp_path}


def test_a_locked_folder_is_refused_and_free_afterwards(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path / "out"),
        pytest.raises(RunError, match="another process"),
        folder_lock(tmp_path / "out"),
    ):
        pass
    with folder_lock(tmp_path / "out"):
        pass


def test_sha256_is_that_of_hashlib(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_text_is_utf8_with_its_line_ends_kept(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "春\n")
    assert (tmp_path / "x").read_bytes() == "春\n".encode()


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (files.human_bytes, 999, "999 B"),
        (files.human_bytes, 3.4e9, "3.4 GB"),
        (files.human_bytes, 2e12, "2.0 TB"),
        (files.human_count, 999, "999"),
        (files.human_count, 1.5e9, "1.5B"),
        (files.human_time, 59.4, "59 s"),
        (files.human_time, 59.6, "1m00s"),
        (files.human_time, 7620, "2h07m"),
    ],
)
def test_sizes_for_people(function: Callable[[float], str], value: float, expected: str) -> None:
    assert function(value) == expected


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(files).failed == 0

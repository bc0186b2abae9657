"""Zips: whole and inside the folder, or nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from minillm.data.archive import unpack
from minillm.errors import RunError, SetupError
from minillm.log import Silent
from tests.data.loopback_hub import make_zip


def run(tmp_path: Path, data: bytes) -> dict[str, str]:
    archive = tmp_path / "set.zip"
    archive.write_bytes(data)
    return unpack(archive, tmp_path / "set", Silent(), ours=lambda _: False)


def test_members_are_written_with_their_digests(tmp_path: Path) -> None:
    digests = run(tmp_path, make_zip({"a/b.txt": b"abc", "c.txt": b""}))
    assert digests == {  # FIPS 180-2 appendix B.1, and the digest of nothing
        "a/b.txt": "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "c.txt": "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert (tmp_path / "set/a/b.txt").read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (make_zip({"ok": b"1", "../evil": b"2"}), "would leave the target folder"),
        (make_zip({"/evil": b"2"}), "would leave the target folder"),
        (make_zip({"evil": b"/etc"}, mode=0o120777), "a link or a device"),
        (make_zip({"one": b"1", "two": b"2"}).replace(b"two", b"one"), "a file name twice"),
        (make_zip({"ok": b"1"})[:-10], "cannot be unpacked"),
        (make_zip({"ok": b"abcdefgh" * 9}).replace(b"defgh", b"DEFGH", 1), "cannot be unpacked"),
    ],
)
def test_a_bad_zip_leaves_nothing(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(RunError, match=says):
        run(tmp_path, data)
    assert [path.name for path in tmp_path.rglob("*")] == ["set.zip"]


def test_a_zip_larger_than_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(SetupError, match="unpacking"):
        run(tmp_path, make_zip({"big": b"x" * 11}))


def test_members_are_recorded_before_they_are_in_place(tmp_path: Path) -> None:
    archive, folder = tmp_path / "set.zip", tmp_path / "set"
    archive.write_bytes(make_zip({"a/b.txt": b"abc"}))
    seen = []

    def record(digests: dict[str, str], fresh: Path) -> None:
        seen.append((list(digests), (fresh / "a/b.txt").read_bytes(), folder.exists()))

    unpack(archive, folder, Silent(), ours=lambda _: False, record=record)
    assert seen == [(["a/b.txt"], b"abc", False)]


def test_a_name_that_is_a_file_and_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be unpacked"):
        run(tmp_path, make_zip({"a": b"1", "a/b": b"2"}))
    assert [path.name for path in tmp_path.rglob("*")] == ["set.zip"]

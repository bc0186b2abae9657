"""`minillm download` through every fault, on both hubs: right bytes, or an error, nothing taken."""

import dataclasses
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.data import catalog, web
from minillm.data.catalog import Place
from tests.data.hub_faults import DATA, OTHER, PATH, REPO, ROWS, Row, fill
from tests.data.loopback_hub import LoopbackHub, make_zip, running_hub

FILES = {PATH: DATA, **OTHER}
HUBS = ["modelscope", "huggingface"]
each_hub = pytest.mark.parametrize("name", HUBS)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with running_hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(web, "FIRST_WAIT_S", 0.001)
        fill(hub)
        yield hub


def download(out: Path, name: str, *more: str, sets: str = "2") -> Any:
    arguments = ["download", "--set", sets, "--hub", name, "--out", str(out), *more]
    return CliRunner().invoke(app, arguments)


def placed(out: Path) -> dict[str, bytes]:
    root = out / "raw/fineweb-edu-zh"
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def assert_two_lines(result: Any, code: int) -> None:
    """The error boundary's form: what is wrong, and one thing to do."""
    said = result.stderr.splitlines()
    assert result.exit_code == code, result.stderr
    assert [line.split(":")[0] for line in said[-2:]] == ["error", "hint"]


@each_hub
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_fault(hub: LoopbackHub, tmp_path: Path, name: str, row: Row) -> None:
    row.arm(hub)
    out = tmp_path / "a/b/c"
    result = download(out, name)
    if not row.is_lasting:
        assert result.exit_code == 0, result.stderr
        assert placed(out) == FILES
        return
    assert_two_lines(result, 5)
    assert not (out / "raw/fineweb-edu-zh" / PATH).exists()
    assert list(tmp_path.rglob("evil*")) == []
    assert placed(out).items() <= FILES.items()  # what is there is right

    hub.faults.clear()  # and once the hub is sane again, the same command ends well
    fill(hub)
    assert download(out, name).exit_code == 0
    assert placed(out) == FILES


@each_hub
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_file_damaged_later(hub: LoopbackHub, tmp_path: Path, name: str, damage: str) -> None:
    download(tmp_path, name)
    path = tmp_path / "raw/fineweb-edu-zh" / PATH
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(DATA[:1000] if damage == "cut" else b"\0" + DATA[1:])
    hub.forget()
    result = download(tmp_path, name)
    assert result.exit_code == 0, result.stderr
    assert placed(tmp_path) == FILES
    assert hub.sent_bytes == len(DATA)


@each_hub
def test_a_hub_that_is_down_and_a_complete_copy(
    hub: LoopbackHub,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    download(tmp_path, name)
    for variable in ("MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    result = download(tmp_path, name)
    assert result.exit_code == 0
    assert "is complete and verified" in caplog.text
    (tmp_path / "raw/fineweb-edu-zh" / PATH).write_bytes(b"damaged")
    assert_two_lines(download(tmp_path, name), 5)


@each_hub
@pytest.mark.parametrize(
    ("members", "mode", "says"),
    [
        ({"ok": b"1", "../evil": b"2"}, 0o100644, "would leave the target folder"),
        ({"/evil": b"2"}, 0o100644, "would leave the target folder"),
        ({"evil": b"/etc/passwd"}, stat.S_IFLNK | 0o777, "a link or a device"),
        ({"a": b"1", "a/evil": b"2"}, 0o100644, "cannot be unpacked"),
    ],
)
def test_a_bad_zip(
    hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    members: dict[str, bytes],
    mode: int,
    says: str,
) -> None:
    grpo = next(item for item in catalog.CATALOG if item.name == "grpo")
    on_both = tuple(Place(hub, "datasets", REPO, ("grpo_data.zip",)) for hub in HUBS)  # type: ignore[arg-type]
    monkeypatch.setattr(catalog, "CATALOG", (dataclasses.replace(grpo, places=on_both),))
    hub.repos[REPO]["grpo_data.zip"] = make_zip(members, mode)
    result = download(tmp_path / "a/b", name, sets="grpo")
    assert_two_lines(result, 5)
    assert says in result.stderr
    assert list(tmp_path.rglob("*evil*")) == []
    assert not (tmp_path / "a/b/grpo").exists()
    hub.repos[REPO]["grpo_data.zip"] = make_zip({"ok.jsonl": b"{}"})
    assert download(tmp_path / "a/b", name, sets="grpo").exit_code == 0
    assert (tmp_path / "a/b/grpo/ok.jsonl").read_bytes() == b"{}"

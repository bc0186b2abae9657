"""`--from`: files fetched by other means are checked like those from a hub."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minillm.data import web
from minillm.data.download import download
from minillm.errors import InputError, RunError
from minillm.log import Silent
from minillm.settings import DownloadConfig
from tests.data.loopback_hub import LoopbackHub, make_zip, running_hub

FINEWEB = "opencsg/Fineweb-Edu-Chinese-V2.1"
MINE = "wangkunqing/mini_llm_dataset"
FILES = {f"4_5/{i}.parquet": bytes([i]) * 300_000 for i in range(3)}
HUBS = ["modelscope", "huggingface"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with running_hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(web, "FIRST_WAIT_S", 0.001)
        hub.repos[FINEWEB] = dict(FILES)
        hub.repos[MINE]["grpo_data.zip"] = make_zip({"a.jsonl": b"{}"})
        yield hub


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    folder = tmp_path / "stick"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def get(tmp_path: Path, source: Path, *sets: str, **knobs: Any) -> Any:
    config = DownloadConfig(sets=sets or ("2",), out=tmp_path / "data", source=source, **knobs)
    return download(config, Silent())


def placed(tmp_path: Path) -> dict[str, bytes]:
    root = tmp_path / "data/raw/fineweb-edu-zh"
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.parquet")}


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.mark.parametrize("name", HUBS)
def test_files_are_copied_not_fetched(
    hub: LoopbackHub, tmp_path: Path, stick: Path, name: str
) -> None:
    get(tmp_path, stick, hub=name)
    assert (placed(tmp_path), hub.sent_bytes) == (FILES, 0)


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_wrong_file_is_not_taken(
    hub: LoopbackHub, tmp_path: Path, stick: Path, name: str, damage: str
) -> None:
    path = stick / "4_5/1.parquet"
    path.write_bytes(path.read_bytes()[:-1] + (b"x" if damage == "flip" else b""))
    with pytest.raises(InputError, match=r"1\.parquet` is not the file that the hub lists"):
        get(tmp_path, stick, hub=name)
    assert "4_5/1.parquet" not in placed(tmp_path)
    assert not list((tmp_path / "data").rglob("1.parquet.part"))


def test_a_part_of_a_broken_copy_is_continued_and_a_wrong_one_begun_anew(
    hub: LoopbackHub, tmp_path: Path, stick: Path
) -> None:
    parts = tmp_path / "data/.downloads/fineweb-edu-zh/parts/4_5"
    parts.mkdir(parents=True)
    (parts / "0.parquet.part").write_bytes(FILES["4_5/0.parquet"][:1000])
    (parts / "1.parquet.part").write_bytes(b"other")
    reports = get(tmp_path, stick)
    assert placed(tmp_path) == FILES
    assert reports[0].fetched_bytes == 3 * 300_000 - 1005


def test_files_in_one_flat_folder_are_found_and_missing_ones_named(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "2.parquet").write_bytes(FILES["4_5/2.parquet"])
    with pytest.raises(InputError, match=r"2 of 3 files .* the first is `4_5/0\.parquet`"):
        get(tmp_path, flat)
    assert placed(tmp_path) == {"4_5/2.parquet": FILES["4_5/2.parquet"]}
    download(DownloadConfig(sets=("2",), out=tmp_path / "data"), Silent())
    assert placed(tmp_path) == FILES


def test_a_zip_is_unpacked(hub: LoopbackHub, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "grpo_data.zip").write_bytes(hub.repos[MINE]["grpo_data.zip"])
    get(tmp_path, flat, "11")
    assert (tmp_path / "data/grpo/a.jsonl").read_bytes() == b"{}"
    assert (flat / "grpo_data.zip").exists()


@pytest.mark.parametrize("name", HUBS)
def test_without_a_hub_the_sums_in_the_folder_decide(
    tmp_path: Path, stick: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    go_offline(monkeypatch)
    monkeypatch.setattr(web, "FIRST_WAIT_S", 0.001)
    with pytest.raises(RunError) as caught:
        get(tmp_path, stick, hub=name)
    assert "SHA256SUMS" in str(caught.value.hint)
    lines = [f"{hashlib.sha256(data).hexdigest()}  {path}" for path, data in FILES.items()]
    (stick / "SHA256SUMS").write_text("\n".join(["# a comment", *lines]))
    (stick / "4_5/0.parquet").write_bytes(bytes(300_000 - 1) + b"x")
    with pytest.raises(InputError, match=r"0\.parquet` is not the file"):
        get(tmp_path, stick, hub=name)
    (stick / "4_5/0.parquet").write_bytes(FILES["4_5/0.parquet"])
    get(tmp_path, stick, hub=name)
    assert placed(tmp_path) == FILES


@pytest.mark.parametrize("name", HUBS)
def test_the_data_folder_of_another_machine_is_enough(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    other = tmp_path / "other"
    download(DownloadConfig(sets=("2",), out=other, hub=name), Silent())
    go_offline(monkeypatch)
    get(tmp_path, other)
    assert placed(tmp_path) == FILES


def test_a_spoiled_listing_is_named(
    tmp_path: Path, stick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    monkeypatch.setattr(web, "FIRST_WAIT_S", 0.001)
    listing = stick / ".downloads/fineweb-edu-zh/listing.json"
    listing.parent.mkdir(parents=True)
    listing.write_text('{"hub": "nowhere"}')
    with pytest.raises(InputError, match="is not a listing"):
        get(tmp_path, stick)


def test_a_file_for_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(InputError, match="is not a folder"):
        get(tmp_path, tmp_path / "x.zip")

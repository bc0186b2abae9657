"""A downloaded set and its tokenizer belong together, and later commands hold to it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from minillm.data import web
from minillm.data.binfile import TokenFile
from minillm.data.download import download
from minillm.data.merge import merge_bin
from minillm.data.sft_rows import SftRows
from minillm.data.tokenizer import find_tokenizer, fingerprint
from minillm.errors import InputError
from minillm.log import Silent
from minillm.settings import DownloadConfig, MergeBinConfig
from tests.data.loopback_hub import LoopbackHub, make_zip, running_hub

MINE = "wangkunqing/mini_llm_dataset"
TOKENIZER = "WKQ9411/Mini-Qwen3-Next-160M-A100M-SFT"
YARN = "fineweb_edu_sampled_0.1_percent.bin"


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, small_folder: Path, small: PreTrainedTokenizerFast
) -> Iterator[LoopbackHub]:
    with running_hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(web, "FIRST_WAIT_S", 0.01)
        hub.repos[TOKENIZER] = {
            path.name: path.read_bytes() for path in small_folder.iterdir() if path.is_file()
        }
        hub.repos[TOKENIZER]["model.safetensors"] = b"w" * 9999
        end = small.convert_tokens_to_ids("<|im_end|>")
        ids = [*range(5, 90), end, *range(90, 200), end]
        hub.repos[MINE][YARN] = np.array(ids, "<u2").tobytes()
        yield hub


def get(out: Path, *sets: str) -> Any:
    return download(DownloadConfig(sets=sets, out=out), Silent())


def test_a_tokenized_set_brings_its_tokenizer_and_a_manifest(
    hub: LoopbackHub, tmp_path: Path, small_folder: Path
) -> None:
    get(tmp_path, "yarn-bin")
    names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert {name for name in names if ".downloads" not in name} == {
        f"yarn/{YARN}",
        f"yarn/{YARN}.json",
        *(f"tokenizer/{path.name}" for path in small_folder.iterdir()),
    }
    manifest = json.loads((tmp_path / "yarn" / f"{YARN}.json").read_text())
    assert manifest["tokenizer_sha256"] == fingerprint(small_folder)
    assert (manifest["num_tokens"], manifest["num_documents"]) == (197, 2)


def test_later_commands_take_that_tokenizer_and_refuse_another(
    hub: LoopbackHub, tmp_path: Path, bundled: PreTrainedTokenizerFast
) -> None:
    get(tmp_path, "9")
    path = tmp_path / "yarn" / YARN
    fp = TokenFile.read_fingerprint(path)
    assert fp is not None
    assert find_tokenizer(fp, near=[tmp_path]) == tmp_path / "tokenizer"
    with pytest.raises(InputError, match="was made with tokenizer"):
        TokenFile.open(path, tokenizer=bundled)
    with pytest.raises(InputError, match="was made with tokenizer"):
        merge_bin(MergeBinConfig(data=path, out=tmp_path / "x.bin", tokenizer=Path("bundled")))


def test_a_second_run_does_not_scan_again(hub: LoopbackHub, tmp_path: Path) -> None:
    get(tmp_path, "9")
    manifest = tmp_path / "yarn" / f"{YARN}.json"
    before = manifest.stat().st_mtime_ns
    get(tmp_path, "9")
    assert manifest.stat().st_mtime_ns == before
    manifest.write_text("spoiled")
    get(tmp_path, "9")
    assert json.loads(manifest.read_text())["num_tokens"] == 197


def test_ids_that_the_tokenizer_cannot_have_made_are_named(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.repos[MINE][YARN] = np.array([5, 31_000, 6], "<u2").tobytes()
    with pytest.raises(InputError, match="holds id 31000"):
        get(tmp_path, "9")
    assert not (tmp_path / "yarn" / f"{YARN}.json").exists()


def test_published_sft_rows_are_bound_too(
    hub: LoopbackHub, tmp_path: Path, small_folder: Path
) -> None:
    table = pa.table({"token_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]], "length": [3]})
    pq.write_table(table, tmp_path / "rows")
    rows = (tmp_path / "rows").read_bytes()
    members = {"sft_parquet/all.parquet": rows, "sft_parquet/packed.parquet": rows}
    hub.repos[MINE]["sft_parquet.zip"] = make_zip(members)
    out = tmp_path / "data"
    reports = get(out, "7")
    packed = out / "sft/sft_parquet/packed.parquet"
    assert reports[-1].next_step == f"minillm sft --data {packed}"
    opened = SftRows.open(packed, vocab_size=304)
    assert opened.tokenizer_sha256 == fingerprint(small_folder)
    get(out, "7")  # what `bind` wrote beside is ours, and stays

    packed.write_bytes(b"damaged")  # the folder is replaced whole, with what lies beside
    get(out, "7")
    assert SftRows.open(packed, vocab_size=304).tokenizer_sha256 == fingerprint(small_folder)
    (packed.parent / "packed.parquet.json").write_text("[]")
    with pytest.raises(InputError, match="does not name a tokenizer"):
        SftRows.open(packed, vocab_size=304)


def test_a_set_brought_from_a_folder_is_bound_alike(
    hub: LoopbackHub, tmp_path: Path, small_folder: Path
) -> None:
    stick = tmp_path / "stick"
    shutil.copytree(small_folder, stick)
    (stick / YARN).write_bytes(hub.repos[MINE][YARN])
    hub.forget()
    download(DownloadConfig(sets=("9",), out=tmp_path / "data", source=stick), Silent())
    assert hub.bodies() == []
    manifest = json.loads((tmp_path / "data/yarn" / f"{YARN}.json").read_text())
    assert manifest["tokenizer_sha256"] == fingerprint(small_folder)

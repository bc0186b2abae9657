import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from minillm import paths
from minillm.data import encoder as module
from minillm.data import tokenize as tokenize_module
from minillm.data.encoder import Encoder, EncoderPlan, Mismatch, plan_encoder
from minillm.data.tokenize import tokenize
from minillm.data.tokenizer import plain_json
from minillm.errors import SetupError
from minillm.log import Silent
from minillm.settings import TokenizeConfig

MakeTexts = Callable[..., list[str]]

# `'s` stays whole after a character that is not a letter, so the ids tell what a library takes
# U+088F for: tokenizers 0.23 for unassigned, gigatoken 0.10 for the Arabic letter of Unicode 17
NEW_LETTER = "x\u088f's"


@pytest.fixture(scope="module")
def tree(bundled: PreTrainedTokenizerFast) -> str:
    return plain_json(bundled)


@pytest.fixture(scope="module")
def fast_plan(tree: str) -> EncoderPlan:
    """The real plan; the other tests probe fewer characters, for time's sake."""
    plan = plan_encoder(tree, "gigatoken", 0)
    assert plan.is_fast
    return plan


@pytest.fixture(autouse=True)
def probe_less(fast_plan: EncoderPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROBED", 0x900)


def expected(tree: str, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in Tokenizer.from_str(tree).encode_batch(texts)]


def encode(plan: EncoderPlan, texts: list[str]) -> list[list[int]]:
    ids, lengths = Encoder(plan).encode(texts)
    return [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]


def hard_texts(make_texts: MakeTexts) -> list[str]:
    text = pq.read_table(paths.BUNDLED_CORPUS / "corpus.parquet", columns=["text"])[0].to_pylist()
    code = Path(module.__file__).read_text(encoding="utf-8")
    return [
        *text[:: max(1, len(text) // 300)],
        *make_texts(300),
        code,
        "<|im_start|>system\n<|im_end|><|endoftext|><think></think>",
        "",
        "中" * 5000,
        " \n\t" * 500,
        "👩\u200d👩\u200d👧" * 50 + "🇨🇳1️⃣",
    ]


@pytest.mark.parametrize("backend", ["gigatoken", "tokenizers"])
def test_both_libraries_give_the_ids_of_tokenizers(
    tree: str, make_texts: MakeTexts, backend: str
) -> None:
    texts = hard_texts(make_texts)
    assert encode(plan_encoder(tree, backend, 0), texts) == expected(tree, texts)


def test_texts_with_characters_of_a_newer_unicode_go_to_tokenizers(
    tree: str, fast_plan: EncoderPlan
) -> None:
    assert all(unicodedata.category(chr(c)) == "Cn" for c in fast_plan.odd[:20])
    texts = ["plain", NEW_LETTER, "", "中文" + NEW_LETTER, "end"]
    blind = EncoderPlan(tree, is_fast=True)
    if 0x88F in fast_plan.odd:
        assert encode_unchecked(blind, texts) != expected(tree, texts)
    assert encode(fast_plan, texts) == expected(tree, texts)


def encode_unchecked(plan: EncoderPlan, texts: list[str]) -> list[list[int]]:
    ids, lengths = module._encode_fast(module._load_fast(plan.tree), texts)
    return [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]


def other(tree: str) -> str:
    """A tokenizer with other merges."""
    changed = json.loads(tree)
    del changed["model"]["merges"][100:200]
    return json.dumps(changed)


def test_a_difference_in_the_first_documents_is_a_mismatch(
    tree: str, fast_plan: EncoderPlan, monkeypatch: pytest.MonkeyPatch, make_texts: MakeTexts
) -> None:
    load = module._load_fast
    monkeypatch.setattr(module, "_load_fast", lambda _tree: load(other(tree)))
    with pytest.raises(Mismatch, match="its ids differ in a text that begins"):
        Encoder(fast_plan).encode(make_texts(50))


@pytest.mark.parametrize("why", ["other ids", "unknown tokenizer"])
def test_a_tokenizer_that_gigatoken_cannot_do_falls_back_in_one_line(
    tree: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    if why == "other ids":
        load = module._load_fast
        monkeypatch.setattr(module, "_load_fast", lambda _tree: load(other(tree)))
    else:
        tree = json.dumps(json.loads(tree) | {"normalizer": {"type": "NFKC"}})
    plan = plan_encoder(tree, "gigatoken", 0)
    assert not plan.is_fast
    (record,) = caplog.records
    assert record.getMessage().startswith("encoding with tokenizers, for gigatoken will not do: ")
    assert "\n" not in record.getMessage()
    assert encode(plan, ["ＦＵＬＬ ﬁ"]) == expected(tree, ["ＦＵＬＬ ﬁ"])


def test_little_input_is_not_worth_starting_gigatoken(tree: str) -> None:
    assert not plan_encoder(tree, "auto", 1_000_000).is_fast
    assert plan_encoder(tree, "auto", 100_000_000).is_fast


def test_without_gigatoken(tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Silent, "line", lambda _self, text: said.append(text))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _name: None)
    assert not plan_encoder(tree, "auto", 100_000_000).is_fast
    assert "pip install 'minillm-lab[fast]'" in said[0]
    with pytest.raises(SetupError, match="gigatoken is not installed"):
        plan_encoder(tree, "gigatoken", 0)


def test_gigatoken_begins_anew_before_its_cache_grows_large(
    tree: str, fast_plan: EncoderPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = module._load_fast
    monkeypatch.setattr(module, "_load_fast", lambda tree: loads.append(1) or load(tree))
    monkeypatch.setattr(module, "_CACHED_CHARS", 1000)
    encoder = Encoder(fast_plan)
    for _ in range(6):
        encoder.encode(["春眠不觉晓" * 80])
    assert len(loads) == 2


def run(data: Path, out: Path, **settings) -> bytes:
    settings = {"tokenizer": Path("bundled"), "workers": 1} | settings
    tokenize(TokenizeConfig(data=data, out=out, name="a", **settings))
    return b"".join((out / name).read_bytes() for name in ("a.bin", "a.bin.json"))


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_the_bytes_do_not_depend_on_the_library(
    tmp_path: Path, make_texts: MakeTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_module, "_SHARD_CHARS", 50_000)
    write(tmp_path / "a.jsonl", [*make_texts(1500), NEW_LETTER])
    plain = run(tmp_path / "a.jsonl", tmp_path / "1", backend="tokenizers")
    assert run(tmp_path / "a.jsonl", tmp_path / "2", backend="gigatoken") == plain
    assert run(tmp_path / "a.jsonl", tmp_path / "3", backend="gigatoken", workers=2) == plain


def test_a_difference_found_late_makes_everything_again(
    tmp_path: Path,
    make_texts: MakeTexts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """gigatoken is wrong outside the samples; when a sample shows it, a.bin is finished already."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    write(raw / "a.jsonl", make_texts(300, seed=1))
    write(raw / "b.jsonl", [*make_texts(300, seed=2), "it shows now", *make_texts(300, seed=3)])
    monkeypatch.setattr(tokenize_module, "_SHARD_CHARS", 10_000)
    right = module._encode_fast
    shows = False
    finished_before = False

    def encode_fast(tokenizer: object, texts: list[str]) -> tuple[module.Ids, module.Lengths]:
        nonlocal shows, finished_before
        if "it shows now" in texts:
            shows, finished_before = True, (out / "a.bin").is_file()
        ids, lengths = right(tokenizer, texts)
        is_sample = len(texts) <= 64
        return (ids + 1 if shows or not is_sample else ids), lengths

    monkeypatch.setattr(module, "_encode_fast", encode_fast)
    cfg = TokenizeConfig(
        data=raw, out=out, tokenizer=Path("bundled"), workers=1, backend="gigatoken"
    )
    reports = tokenize(cfg)
    assert finished_before
    assert [report.is_new for report in reports] == [True, True]
    lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(lines) == 1
    assert lines[0].startswith("beginning anew with tokenizers")
    assert sorted(file.name for file in out.iterdir()) == [
        *("a.bin", "a.bin.json", "b.bin", "b.bin.json")
    ]
    for name in ("a", "b"):
        fresh = run(raw / f"{name}.jsonl", tmp_path / name, backend="tokenizers")
        assert fresh.startswith((out / f"{name}.bin").read_bytes())

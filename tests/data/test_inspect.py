"""What `inspect` says of data is what a plain reading of it gives."""

import gzip
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from transformers import PreTrainedTokenizerFast

from minillm.data import inspect_bin as bin_module
from minillm.data.binfile import BinWriter
from minillm.data.chat import ChatEncoder
from minillm.data.inspect_bin import inspect_bin
from minillm.data.inspect_report import Duplicates, Lengths, Picks, Report
from minillm.data.inspect_sft import inspect_sft
from minillm.data.inspect_show import clean, show
from minillm.data.inspect_text import inspect_text
from minillm.data.inspect_tokenizer import inspect_tokenizer
from minillm.data.manifest import TokenizerFacts, manifest_path
from minillm.data.tokenizer import fingerprint, plain_encoder, save_tokenizer
from minillm.log import Silent
from minillm.settings import InspectConfig

Bin = tuple[Path, list[list[int]], list[str]]


def config(**given: Any) -> InspectConfig:
    return InspectConfig(**given)


@pytest.fixture
def token_file(
    tmp_path: Path, small: PreTrainedTokenizerFast, make_texts: Callable[..., list[str]]
) -> Bin:
    """A .bin of 60 documents beside its tokenizer."""
    save_tokenizer(small, tmp_path / "tokenizer")
    texts = [f"{i} {text}" for i, text in enumerate(make_texts(60))]
    encoder = plain_encoder(small)
    documents = [encoder.encode(text).ids for text in texts]
    with BinWriter(tmp_path / "a.bin", TokenizerFacts.of(small), ["a.txt"]) as writer:
        for ids, text in zip(documents, texts, strict=True):
            writer.append(ids, len(text.encode()))
    return tmp_path / "a.bin", documents, texts


def look(path: Path, **given: Any) -> Report:
    return inspect_bin(path, config(path=path, **given), Silent())


@pytest.mark.parametrize("chunk", [7, 64, 1 << 21])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_bin_is_counted_whatever_the_chunks(
    token_file: Bin,
    small: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    has_manifest: bool,
) -> None:
    path, documents, texts = token_file
    monkeypatch.setattr(bin_module, "_CHUNK_TOKENS", chunk)
    if not has_manifest:
        manifest_path(path).unlink()
    report = look(path, samples=1000, verify=has_manifest)
    assert report.problems == []
    facts = report.facts
    every = [i for ids in documents for i in [*ids, small.eos_token_id]]
    assert facts["tokens"] == len(every)
    assert facts["documents"] == 60
    assert facts["largest_id"] == max(every)
    assert facts["text_bytes"] == sum(len(text.encode()) for text in texts)
    shares = [n / len(every) for n in Counter(every).values()]
    entropy = -sum(share * math.log2(share) for share in shares)
    assert facts["entropy"].startswith(f"{entropy:.3f} ")
    assert [sample.text for sample in report.samples] == [f"{text}<|im_end|>" for text in texts]
    assert report.bars[0].summary["median"] == statistics.median_low(map(len, documents))
    assert bool(report.notes) is not has_manifest


def test_same_seed_same_samples(token_file: Bin) -> None:
    path, _, texts = token_file
    first, again, other = (look(path, samples=4, seed=seed).samples for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {sample.text.removesuffix("<|im_end|>") for sample in first} <= set(texts)


def _odd(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)


def _big_id(path: Path) -> None:
    ids = np.fromfile(path, "<u2")
    ids[5:7] = 60_000, 50_000
    ids.tofile(path)


def _lie(path: Path) -> None:
    beside = manifest_path(path)
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"num_documents": 61}))


def _mangle(path: Path) -> None:
    manifest_path(path).write_text("{")


def _neighbour(path: Path) -> None:
    tree = json.loads(manifest_path(path).read_text()) | {"tokenizer_sha256": "f" * 64}
    path.with_name("b.bin.json").write_text(json.dumps(tree))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_odd, "are not a multiple of 2"),
        (_cut, "bytes, its manifest says"),
        (_flip, "its sha256 is"),
        (_big_id, "2 ids are outside the vocabulary of 304: the first at token 5, the largest 60"),
        (_lie, "its manifest says 61 documents, the file has 60 separators"),
        (_mangle, "is not a manifest"),
        (_neighbour, "its neighbour `b.bin` with ffffffffffff…: their ids must not be mixed"),
        (_empty, "the file is empty"),
    ],
)
def test_damage_to_a_bin_is_told(
    token_file: Bin, change: Callable[[Path], None], said: str
) -> None:
    path = token_file[0]
    change(path)
    problems = look(path, verify=True).problems
    assert any(said in problem for problem in problems), problems


def test_another_tokenizer_is_told(token_file: Bin) -> None:
    report = look(token_file[0], tokenizer=Path("bundled"))
    assert any("but `" in problem and "made with" in problem for problem in report.problems)
    assert report.samples == []


def test_a_tokenizer_that_is_not_here_leaves_the_counts(
    tmp_path: Path, token_file: Bin, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, documents, _ = token_file
    (tmp_path / "far").mkdir()
    moved = tmp_path / "far" / "deep" / "a.bin"
    moved.parent.mkdir()
    path.rename(moved)
    manifest_path(path).rename(manifest_path(moved))
    report = look(moved)
    assert report.facts["tokens"] == sum(map(len, documents)) + 60
    assert "no text is shown" in report.notes[0]
    assert report.samples == report.problems == []


def test_what_numpy_tofile_wrote(
    tmp_path: Path, small: PreTrainedTokenizerFast, small_folder: Path
) -> None:
    """Empty documents, copies, lost characters, and an end without separator."""
    end, encoder = small.eos_token_id, plain_encoder(small)
    same, lost = encoder.encode("春眠不觉晓").ids, encoder.encode("a\ufffdb").ids
    whole = [*same, end, end, *lost, end, *same, end, *same, end, end]
    np.array([*whole, 5, 6, 7], "<u2").tofile(tmp_path / "a.bin")
    report = look(tmp_path / "a.bin", tokenizer=small_folder)
    assert report.facts["documents"] == 7
    said = "\n".join(report.problems)
    assert "2 documents (28.57%) are empty" in said
    assert "2 of 4 documents are copies of an earlier one (50.00%), e.g. 0 and 3" in said
    assert "1 of 5 sampled documents hold U+FFFD" in said
    assert "e.g. document 2" in said
    assert "the last 3 tokens have no separator" in "\n".join(report.notes)


def test_ids_without_separator_are_told_and_shown(
    tmp_path: Path, small: PreTrainedTokenizerFast, small_folder: Path
) -> None:
    ids = plain_encoder(small).encode("the quick brown fox").ids
    np.array(ids, "<u2").tofile(tmp_path / "a.bin")
    report = look(tmp_path / "a.bin", tokenizer=small_folder)
    assert "holds no separator" in report.problems[0]
    assert report.samples[0].text == "the quick brown fox"
    assert report.samples[0].is_cut


@given(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 3_000_000)), min_size=1))
def test_lengths_are_those_of_statistics(values: list[int]) -> None:
    lengths = Lengths()
    for i in range(0, len(values), 3):
        lengths.add(values[i : i + 3])
    made = lengths.histogram("x")
    assert made.summary["count"] == len(values)
    assert made.summary["max"] == max(values)
    assert made.summary["mean"] == round(sum(values) / len(values), 1)
    assert sum(count for _, count in made.bars) == len(values)
    if max(values) < 1 << 20:
        assert made.summary["min"] == min(values)
        assert made.summary["median"] == statistics.median_low(values)
        for label, count in made.bars:
            low, _, high = label.replace(",", "").partition("-")
            assert count == sum(int(low) <= v <= int(high or low) for v in values)
    assert len(made.bars) <= 24


def test_picks_are_uniform() -> None:
    hits: Counter[int] = Counter()
    for seed in range(2000):
        picks: Picks[int] = Picks(3, seed)
        for first in (0, 4, 8):
            picks.offer(4, lambda i, first=first: first + i)
        found = picks.items()
        assert len(found) == 3
        assert all(place == item for place, item in found)
        hits.update(item for _, item in found)
    assert all(abs(hits[i] - 500) < 100 for i in range(12)), hits  # 5 sigma


def test_duplicates_are_exact_in_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for few items the share of copies is still that of the whole."""
    monkeypatch.setattr("minillm.data.inspect_report._MAX_KEPT", 500)
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 1 << 62, 20_000).tolist()
    found = Duplicates()
    for place, key in enumerate([*keys, *keys[:10_000]]):
        found.add(key, b"", place)
    assert found.mask >= 31
    report = Report("x", "x")
    found.report_to(report, "rows")
    assert found.num_extra / found.num_seen == pytest.approx(1 / 3, abs=0.05)
    assert "sampled rows are copies" in report.problems[0]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    lines = "".join(
        (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n"
        for row in rows
    )
    raw = lines.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def look_text(*files: Path, **given: Any) -> Report:
    path = files[0] if len(files) == 1 else files[0].parent
    return inspect_text(path, list(files), config(path=path, **given), Silent())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_documents_are_counted(
    tmp_path: Path, name: str, make_texts: Callable[..., list[str]]
) -> None:
    texts = [f"{i} {text}" for i, text in enumerate(make_texts(1200))]
    rows = [{"text": text, "source": "ab"[i % 3 == 0]} for i, text in enumerate(texts)]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        write_jsonl(tmp_path / name, rows)
    report = look_text(tmp_path / name, samples=2)
    assert report.problems == []
    assert report.facts["rows"] == report.facts["documents"] == 1200
    assert report.facts["characters"] == sum(map(len, texts))
    assert report.facts["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert report.tables[0].rows == [["a", 800, "66.67%"], ["b", 400, "33.33%"]]
    assert report.bars[0].summary["max"] == max(map(len, texts))
    assert {sample.text for sample in report.samples} <= set(texts)


def test_bytes_per_token_is_that_of_the_tokenizer(
    tmp_path: Path, bundled: PreTrainedTokenizerFast, make_texts: Callable[..., list[str]]
) -> None:
    texts = make_texts(50)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    facts = look_text(path, tokenizer=Path("bundled")).facts
    encoder = plain_encoder(bundled)
    num_tokens = sum(len(encoder.encode(text).ids) for text in texts)
    assert facts["tokens_about"] == num_tokens
    assert facts["bytes_per_token"] == round(facts["text_bytes"] / num_tokens, 3)


def test_damage_to_documents_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    good = [{"text": f"第{i}行，完好"} for i in range(40)]
    bad = ["{", "[1]", {"other": "x"}, {"text": 5}, {"text": ""}, {"text": None}, {"text": " \n"}]
    more = ['{"text": "half \\ud83d"}', {"text": "lost \ufffd"}, *good[:20]]
    report = look_text(write_jsonl(tmp_path / "a.jsonl", [*good, *bad, *more]))
    said = "\n".join(report.problems)
    assert report.facts["documents"] == 62
    for part in (
        "`a.jsonl` line 41: not JSON",
        "`a.jsonl` line 42: an object is wanted, not list",
        "`a.jsonl` line 43: no text under `text`, only `other`",
        "`a.jsonl` line 44: no text",
        "3 rows (4.62%) are empty, first row 40",
        "1 rows (1.54%) hold U+FFFD",
        "1 rows (1.54%) hold half a surrogate pair",
        "20 of 62 rows are copies of an earlier one (32.26%), e.g. 0 and 45",
    ):
        assert part in said, said


def test_many_broken_lines_are_summed_up(tmp_path: Path) -> None:
    report = look_text(write_jsonl(tmp_path / "a.jsonl", ["{"] * 9))
    assert len(report.problems) == 6
    assert report.problems[-1] == "4 more rows or files are broken"


def test_a_cut_parquet_is_told_beside_good_ones(tmp_path: Path) -> None:
    for name in "ab":
        pq.write_table(pa.table({"text": [f"{name}{i}" for i in range(9)]}), tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"{name}.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    report = look_text(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert report.facts["rows"] == 9
    assert len(report.problems) == 1
    assert "a.parquet` cannot be read" in report.problems[0]


def test_dialogues_are_seen_and_rendered(tmp_path: Path) -> None:
    rows: list[Any] = [
        {
            "messages": [
                {"role": "user", "content": "你好"},
                {"role": "assistant", "content": "好"},
            ]
        },
        {"instruction": "数", "input": "三", "output": "一二三", "history": [["早", "早！"]]},
        {"messages": [{"role": "user", "content": "没有回答"}]},
    ]
    report = look_text(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer=Path("bundled"))
    assert report.kind == "dialogues (jsonl)"
    assert report.facts["dialogues"] == 2
    assert "nothing is learned" in report.problems[0]
    assert [label for label, _ in report.bars[1].bars] == ["2", "3", "4"]
    assert report.samples[1].text.startswith("<|im_start|>user\n早<|im_end|>\n")


def make_sft(path: Path, tokenizer: PreTrainedTokenizerFast, *, pack: bool) -> Path:
    """150 dialogues in the layout of `prepare-sft`, three to a row if packed."""
    encoder = ChatEncoder(tokenizer)
    rows: list[dict[str, Any]] = []
    for i in range(150):
        made = encoder.encode(
            [
                {"role": "user", "content": f"{i} 是什么？"},
                {"role": "assistant", "content": "数" * (i % 90)},
            ]
            if i % 90
            else [
                {"role": "user", "content": f"你好{i}"},
                {"role": "assistant", "content": "你好！"},
            ]
        )
        size = len(made.token_ids)
        own = {
            "token_ids": made.token_ids,
            "labels": made.labels,
            "position_ids": list(range(size)),
            "length": size,
        }
        if pack and i % 3:
            rows[-1] = {key: rows[-1][key] + value for key, value in own.items()} | {
                "sample_lengths": [*rows[-1]["sample_lengths"], size],
                "type": "packed",
            }
        elif pack:
            rows.append(own | {"sample_lengths": [size], "type": "packed"})
        else:
            rows.append(own | {"attention_mask": [1] * size, "type": "ab"[i % 2]})
    facts = {"tokenizer_sha256": fingerprint(tokenizer), "vocab_size": len(tokenizer)}
    facts |= {"sequence_length": 1024}
    save_tokenizer(tokenizer, path.parent / "tokenizer")
    table = pa.Table.from_pylist(rows)
    metadata = {b"minillm": json.dumps(facts).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def look_sft(path: Path, **given: Any) -> Report:
    return inspect_sft(path, config(path=path, **given), Silent())


@pytest.mark.parametrize("pack", [True, False])
def test_sft_rows_are_counted(tmp_path: Path, small: PreTrainedTokenizerFast, pack: bool) -> None:
    path = make_sft(tmp_path / "sft.parquet", small, pack=pack)
    rows = pq.read_table(path).to_pylist()
    facts = (report := look_sft(path, samples=1000)).facts
    tokens = sum(len(row["token_ids"]) for row in rows)
    labels = sum(label != -100 for row in rows for label in row["labels"])
    assert report.problems == []
    assert (facts["rows"], facts["tokens"], facts["label_tokens"]) == (len(rows), tokens, labels)
    assert facts["dialogues"] == 150
    assert facts["fill_share"] == tokens / (1024 * len(rows))
    assert facts["label_share"] == labels / tokens
    assert report.kind == f"SFT rows ({'packed' if pack else 'a dialogue a row'}, ragged)"
    titles = [made.title for made in report.bars]
    assert ("dialogues per row" in titles) is pack
    for sample, row in zip(report.samples, rows, strict=True):
        end = row["sample_lengths"][0] if pack else None
        whole = small.decode(row["token_ids"][:end])
        assert sample.text.replace("«", "").replace("»", "") == whole
    answer = "你好！<|im_end|>"
    assert report.samples[0].text == (
        f"<|im_start|>user\n你好0<|im_end|>\n<|im_start|>assistant\n«{answer}»\n"
    )


def pad(rows: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """The published layout: every list padded, labels with -100."""
    padded = []
    for row in rows:
        rest = length - len(row["token_ids"])
        fills = {"token_ids": 0, "labels": -100, "position_ids": 0, "attention_mask": 0}
        padded.append(row | {k: row[k] + [v] * rest for k, v in fills.items() if k in row})
    return padded


def test_published_layout_is_counted_without_its_padding(
    tmp_path: Path, small: PreTrainedTokenizerFast
) -> None:
    path = make_sft(tmp_path / "a.parquet", small, pack=False)
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(pad(rows, 1024)), tmp_path / "b.parquet")
    ours, theirs = look_sft(path), look_sft(tmp_path / "b.parquet")
    assert theirs.kind == "SFT rows (a dialogue a row, padded as published)"
    for name in ("tokens", "dialogues", "label_tokens", "fill_share", "sequence_length"):
        assert ours.facts[name] == theirs.facts[name], name
    assert "does not say which tokenizer" in theirs.notes[0]


def test_damage_to_sft_rows_is_told(tmp_path: Path, small: PreTrainedTokenizerFast) -> None:
    path = make_sft(tmp_path / "a.parquet", small, pack=False)
    rows = pq.read_table(path).to_pylist()
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    rows += [rows[5]] * 40
    pq.write_table(pa.Table.from_pylist(rows), path)
    said = "\n".join(look_sft(path).problems)
    assert "1 rows have no token to learn, first row 3" in said
    assert "40 of 190 dialogues are copies of an earlier one (21.05%), e.g. 5 and 150" in said
    rows[7]["token_ids"] = [*rows[7]["token_ids"][:-1], 40_000]
    pq.write_table(pa.Table.from_pylist(rows), path)
    said = "\n".join(look_sft(path).problems)
    assert "row 7 has a token id outside the vocabulary of 304" in said


def test_sft_rows_of_another_tokenizer_are_told(
    tmp_path: Path, small: PreTrainedTokenizerFast
) -> None:
    report = look_sft(make_sft(tmp_path / "a.parquet", small, pack=True), tokenizer=Path("bundled"))
    assert "made with tokenizer" in report.problems[0]
    assert report.samples == []


def test_sft_rows_that_cannot_be_read_to_the_end_are_told(
    tmp_path: Path, small: PreTrainedTokenizerFast
) -> None:
    path = make_sft(tmp_path / "a.parquet", small, pack=True)
    raw = bytearray(path.read_bytes())
    raw[4:60] = b"\xff" * 56
    path.write_bytes(raw)
    assert "cannot be read on" in look_sft(path).problems[0]


def test_tokenizer_is_described(small_folder: Path, small: PreTrainedTokenizerFast) -> None:
    report = inspect_tokenizer(small_folder, config())
    assert report.problems == []
    assert report.facts["vocabulary"] == len(small) == 304
    assert report.facts["base_tokens"] == 300
    assert report.facts["separator"] == small.convert_tokens_to_ids("<|im_end|>")
    assert [row[1] for row in report.tables[0].rows][-2:] == ["<think>", "</think>"]
    assert report.bars[0].bars[0] == ("1", 256)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.clear(), "is not a tokenizer"),
        (lambda tree: tree["model"]["vocab"].update(Q9=900), "do not have the ids 0 to 304"),
        (lambda tree: tree.update(normalizer={"type": "Lowercase"}), "English is not the same"),
    ],
)
def test_damage_to_a_tokenizer_is_told(
    tmp_path: Path, small: PreTrainedTokenizerFast, change: Callable[[Any], None], said: str
) -> None:
    save_tokenizer(small, tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    change(tree)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert said in "\n".join(inspect_tokenizer(tmp_path, config()).problems)


def test_everything_fits_80_columns(
    tmp_path: Path, token_file: Bin, small: PreTrainedTokenizerFast
) -> None:
    rows = [{"text": "春眠不觉晓，处处闻啼鸟。" * 30, "source": "很长的来源名称" * 20}]
    reports = [
        look(token_file[0]),
        look_text(write_jsonl(tmp_path / "a.jsonl", rows)),
        look_sft(make_sft(tmp_path / "sft.parquet", small, pack=True)),
    ]
    for report in reports:
        lines = show(report)
        assert max(map(cell_len, lines)) <= 80
        assert any("█" in line for line in lines)
    assert "春眠不觉晓，处处闻啼鸟。" in "\n".join(show(reports[1])).replace("\n  | ", "")


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert clean("a\x1b[31m\x07\x7f\x9b\tb\r\nc") == "a␛[31m␇␡␡⇥b\nc"

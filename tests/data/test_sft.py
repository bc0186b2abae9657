"""`prepare_sft`: what goes in comes out, packed or not, the same every time, or not at all."""

import dataclasses
import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from minillm.data.sft import SftRows, prepare_sft
from minillm.data.tokenizer import fingerprint
from minillm.errors import InputError
from minillm.log import Silent
from minillm.settings import IdentityConfig, PrepareSftConfig
from tests.data.sft_case import DIALOGUES, FOLDER, TOKENIZER, VOCAB_SIZE, dialogue, settings


def read_back(path: Path) -> list[str]:
    """The rendered dialogues of all rows, cut where positions restart."""
    rows, texts = SftRows.open(path, VOCAB_SIZE), []
    for index in range(len(rows)):
        row = rows.row(index)
        starts = np.flatnonzero(row.position_ids == 0)
        texts += [TOKENIZER.decode(part) for part in np.split(row.token_ids, starts[1:])]
    return texts


@pytest.mark.parametrize("packed", [True, False])
def test_every_dialogue_is_written_once_as_the_template_renders_it(
    tmp_path: Path, packed: bool
) -> None:
    report = prepare_sft(settings(tmp_path, pack=packed), Silent())
    wanted = [TOKENIZER.apply_chat_template(d["messages"], tokenize=False) for d in DIALOGUES]
    assert sorted(read_back(report.path)) == sorted(wanted)
    assert (report.num_read, report.num_dialogues) == (60, 60)
    assert report.num_rows == (60 if not packed else len(SftRows.open(report.path, VOCAB_SIZE)))


def test_packed_columns_are_those_of_the_format(tmp_path: Path) -> None:
    prepare_sft(settings(tmp_path), Silent())
    table = pq.read_table(tmp_path / "sft.parquet")
    names = ["token_ids", "labels", "position_ids", "length", "sample_lengths", "type"]
    assert table.column_names == names
    for row in table.to_pylist():
        assert len(row["token_ids"]) == len(row["labels"]) == row["length"] <= 128
        assert sum(row["sample_lengths"]) == row["length"]
        assert row["position_ids"] == [i for size in row["sample_lengths"] for i in range(size)]
        assert all(b in (-100, a) for a, b in zip(row["token_ids"], row["labels"], strict=True))


def test_unpacked_columns_are_those_of_the_format(tmp_path: Path) -> None:
    prepare_sft(settings(tmp_path, pack=False), Silent())
    table = pq.read_table(tmp_path / "sft.parquet")
    names = ["token_ids", "labels", "position_ids", "length", "attention_mask", "type"]
    assert table.column_names == names
    for row in table.to_pylist():
        assert row["attention_mask"] == [1] * row["length"]
        assert row["position_ids"] == list(range(row["length"]))
        assert row["type"] == "test"


def test_labels_are_the_answers_and_nothing_else(tmp_path: Path) -> None:
    prepare_sft(settings(tmp_path, [dialogue("q1", "first", "q2", "second")]), Silent())
    row = SftRows.open(tmp_path / "sft.parquet", VOCAB_SIZE).row(0)
    learned = TOKENIZER.decode(row.token_ids[row.labels != -100])
    assert learned == "first<|im_end|>second<|im_end|>"


def test_the_file_tells_what_made_it(tmp_path: Path) -> None:
    report = prepare_sft(settings(tmp_path), Silent())
    rows = SftRows.open(report.path, VOCAB_SIZE)
    assert rows.tokenizer_sha256 == fingerprint(FOLDER)
    assert rows.metadata["vocab_size"] == VOCAB_SIZE
    assert rows.metadata["sequence_length"] == 128
    assert rows.metadata["packed"] is True
    assert rows.metadata["num_dialogues"] == 60
    assert rows.num_tokens == report.num_tokens == rows.metadata["num_tokens"]
    assert rows.num_label_tokens == report.num_label_tokens
    assert report.fill == report.num_tokens / (report.num_rows * 128)


def test_same_seed_same_rows_other_seed_other_order(tmp_path: Path) -> None:
    files = []
    for seed in (3, 3, 4):
        prepare_sft(settings(tmp_path, seed=seed), Silent())
        files.append((tmp_path / "sft.parquet").read_bytes())
    assert files[0] == files[1] != files[2]


def test_too_long_dialogues_are_dropped_whole_and_counted(tmp_path: Path) -> None:
    items = [dialogue("short", "yes"), dialogue("long " * 100, "no"), dialogue("q", "long " * 99)]
    report = prepare_sft(settings(tmp_path, items, sequence_length=64), Silent())
    assert (report.num_too_long, report.num_dialogues) == (2, 1)
    assert report.longest > 100
    assert "long" not in read_back(report.path)[0]


def test_a_dialogue_of_just_the_row_length_is_kept(tmp_path: Path) -> None:
    item = dialogue("word " * 30, "answer")
    size = len(TOKENIZER.apply_chat_template(item["messages"], return_dict=False))
    kept = prepare_sft(settings(tmp_path, [item], sequence_length=size), Silent())
    assert kept.num_too_long == 0
    assert kept.fill == 1
    with pytest.raises(InputError, match="all 1 dialogues are longer"):
        prepare_sft(settings(tmp_path, [item], sequence_length=size - 1), Silent())


def test_max_dialogues_samples_that_many(tmp_path: Path) -> None:
    report = prepare_sft(settings(tmp_path, max_dialogues=7), Silent())
    assert (report.num_read, report.num_sampled_out, report.num_dialogues) == (60, 53, 7)
    texts = read_back(report.path)
    assert len(set(texts)) == 7
    first_seven = {
        TOKENIZER.apply_chat_template(d["messages"], tokenize=False) for d in DIALOGUES[:7]
    }
    assert set(texts) != first_seven


def test_a_sample_has_all_types_alike_and_several_turns_by_their_ratio(tmp_path: Path) -> None:
    items = [
        {
            "instruction": "",
            "input": f"问题 {i}",
            "output": f"回答 {i}",
            "history": [["早", "早上好"]] if i % 3 == 0 else [],
            "type": "数学" if i < 100 else "翻译",
        }
        for i in range(150)
    ]
    report = prepare_sft(settings(tmp_path, items, max_dialogues=40), Silent())
    assert report.by_type == {"数学": 20, "翻译": 20}
    assert report.num_multi_turn == 8
    everything = prepare_sft(settings(tmp_path, items, max_dialogues=60, balance=False), Silent())
    assert everything.by_type["数学"] > 30
    assert everything.num_multi_turn > 12


@pytest.mark.parametrize("packed", [True, False])
def test_the_persona_is_mixed_in_over_the_whole_file(tmp_path: Path, packed: bool) -> None:
    persona = IdentityConfig(assistant_name="Nova", identity_repeat=1, identity_count=10_000)
    report = prepare_sft(
        settings(tmp_path, persona=persona, pack=packed, sequence_length=999), Silent()
    )
    assert report.by_type["identity"] == report.num_identity > 400
    places = [i for i, text in enumerate(read_back(report.path)) if "answer" in text]
    assert "Nova" in "".join(read_back(report.path))
    assert min(places) < report.num_dialogues / 2 < max(places)


def test_a_bad_line_leaves_the_old_file_alone(tmp_path: Path) -> None:
    prepare_sft(settings(tmp_path), Silent())
    before = (tmp_path / "sft.parquet").read_bytes()
    cfg = settings(tmp_path)
    with cfg.data.open("a") as stream:
        stream.write("{broken\n")
    with pytest.raises(InputError, match=r"dialogues\.jsonl` line 61: not JSON"):
        prepare_sft(cfg, Silent())
    assert (tmp_path / "sft.parquet").read_bytes() == before
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.work"))


def test_bad_lines_are_counted_by_reason_and_named_where_asked(tmp_path: Path) -> None:
    cfg = settings(tmp_path, skip_bad=True)
    bad = b"\n[1]\n{broken\n\xff\xfe\n" + b"{broken\n" * 5
    cfg.data.write_bytes(cfg.data.read_bytes() + bad)
    report = prepare_sft(cfg, Silent())
    assert report.rejected.counts == {"no dialogue": 1, "not JSON": 6, "not UTF-8": 1}
    assert report.rejected.examples["not JSON"] == [
        f"`{cfg.data}` line {line}" for line in (63, 65, 66)
    ]
    assert report.num_dialogues == 60
    assert report.num_read == 68


def test_dialogues_without_a_text_are_counted_always(tmp_path: Path) -> None:
    items = [*DIALOGUES, {"instruction": "q", "output": ""}, dialogue("q", "a", " ", "b")]
    report = prepare_sft(settings(tmp_path, items), Silent())
    assert report.rejected.counts == {"empty message": 2}
    assert report.num_dialogues == 60


def test_too_short_dialogues_are_dropped_and_counted(tmp_path: Path) -> None:
    items = [dialogue("a", "b"), dialogue("a " * 30, "b")]
    report = prepare_sft(settings(tmp_path, items, min_tokens=40), Silent())
    assert (report.num_too_short, report.num_dialogues) == (1, 1)
    with pytest.raises(InputError, match="all 1 dialogues are shorter"):
        prepare_sft(settings(tmp_path, items[:1], min_tokens=40), Silent())


def test_other_files_and_layouts_give_the_same_rows(tmp_path: Path) -> None:
    """Compressed, as parquet of messages, and the SFT parquet itself, ours and as published."""
    wanted = sorted(read_back(prepare_sft(settings(tmp_path), Silent()).path))
    data = (tmp_path / "dialogues.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(data))
    pq.write_table(pa.Table.from_pylist(DIALOGUES), tmp_path / "c.parquet")
    for number, (pack, padded) in enumerate([(True, True), (False, True), (True, False)]):
        cfg = settings(tmp_path, out=tmp_path / f"d{number}.parquet", pack=pack, padded=padded)
        prepare_sft(cfg, Silent())
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.parquet", "d0.parquet", "d1.parquet"):
        cfg = settings(tmp_path, data=tmp_path / name, out=tmp_path / "again.parquet")
        report = prepare_sft(cfg, Silent())
        assert sorted(read_back(report.path)) == wanted, name
        assert report.num_dialogues == 60


def test_padded_rows_are_those_of_the_published_sets(tmp_path: Path) -> None:
    pad = TOKENIZER.pad_token_id
    prepare_sft(settings(tmp_path, padded=True), Silent())
    table = pq.read_table(tmp_path / "sft.parquet")
    names = ["token_ids", "labels", "position_ids", "length", "attention_mask", "type"]
    assert table.column_names == [*names, "num_samples", "sample_lengths"]
    for row in table.to_pylist():
        used, rest = row["length"], 128 - row["length"]
        assert len(row["token_ids"]) == len(row["labels"]) == 128
        assert row["token_ids"][used:] == [pad] * rest
        assert row["labels"][used:] == [-100] * rest
        assert row["attention_mask"] == [1] * used + [0] * rest
        assert row["num_samples"] == len(row["sample_lengths"])
        counted = [i for size in row["sample_lengths"] for i in range(size)]
        assert row["position_ids"] == counted + [0] * rest
    prepare_sft(settings(tmp_path, padded=True, pack=False), Silent())
    table = pq.read_table(tmp_path / "sft.parquet")
    assert table.column_names == names
    assert all(row["position_ids"] == list(range(128)) for row in table.to_pylist())


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path, small_folder: Path) -> None:
    prepare_sft(settings(tmp_path), Silent())
    cfg = settings(tmp_path, data=tmp_path / "sft.parquet", out=tmp_path / "x.parquet")
    with pytest.raises(InputError, match="was made with tokenizer"):
        prepare_sft(dataclasses.replace(cfg, tokenizer=small_folder), Silent())


def test_the_result_is_no_input_of_the_next_run(tmp_path: Path) -> None:
    cfg = settings(tmp_path)
    first = prepare_sft(dataclasses.replace(cfg, data=tmp_path), Silent())
    again = prepare_sft(dataclasses.replace(cfg, data=tmp_path), Silent())
    assert first.num_read == again.num_read == 60


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dialogue in"):
        prepare_sft(settings(tmp_path, [], persona=IdentityConfig()), Silent())
    assert not list(tmp_path.glob("sft*"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file or folder at `.*nowhere`"):
        prepare_sft(PrepareSftConfig(data=tmp_path / "nowhere"), Silent())


def test_a_parquet_of_plain_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="has no column `messages`"):
        prepare_sft(settings(tmp_path, data=tmp_path / "x.parquet"), Silent())
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="not a readable parquet"):
        prepare_sft(settings(tmp_path, data=tmp_path / "x.parquet"), Silent())


def test_the_bundled_dialogues_fill_their_rows(tmp_path: Path) -> None:
    out = tmp_path / "sft.parquet"
    cfg = PrepareSftConfig(out=out, tokenizer=Path("bundled"), charts=False)
    report = prepare_sft(cfg, Silent())
    assert report.fill >= 0.98
    assert report.num_too_long == 0
    assert report.num_tokens / report.num_dialogues < 80
    assert report.num_identity > 2000


def test_own_dialogues_get_200_identity_dialogues_of_every_kind(tmp_path: Path) -> None:
    report = prepare_sft(
        settings(tmp_path, persona=IdentityConfig(), sequence_length=999), Silent()
    )
    assert report.by_type["identity"] == report.num_identity == 200
    texts = "".join(read_back(report.path))
    assert "minillm 项目" in texts
    assert "the minillm project" in texts

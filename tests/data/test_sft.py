"""`prepare_sft`: what goes in comes out, packed or not, the same every time, or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from minillm import paths
from minillm.data.sft import SftRows, prepare_sft
from minillm.data.tokenizer import fingerprint, load_tokenizer
from minillm.errors import InputError
from minillm.log import Silent
from minillm.settings import IdentityConfig, PrepareSftConfig

TOKENIZER = load_tokenizer(paths.BUNDLED_TOKENIZER)
VOCAB_SIZE = len(TOKENIZER)
NOBODY = IdentityConfig(identity=False)


def dialogue(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, "source": "test"}


DIALOGUES = [dialogue(f"question {i} " * (1 + i % 7), "answer " * (1 + i % 5)) for i in range(60)]


def settings(
    tmp_path: Path, items: list[dict[str, Any]] = DIALOGUES, **knobs: Any
) -> PrepareSftConfig:
    """Write dialogues and return settings that read them."""
    data = tmp_path / "dialogues.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    defaults = {"persona": NOBODY, "sequence_length": 128, "tokenizer": Path("bundled")}
    return PrepareSftConfig(**{"data": data, "out": tmp_path / "sft.parquet", **defaults, **knobs})


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
    assert rows.tokenizer_sha256 == fingerprint(paths.BUNDLED_TOKENIZER)
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


@pytest.mark.parametrize("packed", [True, False])
def test_the_persona_is_mixed_in_over_the_whole_file(tmp_path: Path, packed: bool) -> None:
    persona = IdentityConfig(assistant_name="Nova", identity_repeat=1)
    report = prepare_sft(settings(tmp_path, persona=persona, pack=packed), Silent())
    assert report.by_source["identity"] == report.num_identity > 400
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
    assert not list(tmp_path.glob("*.part"))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dialogue in"):
        prepare_sft(settings(tmp_path, []), Silent())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file or folder at `.*nowhere`"):
        prepare_sft(PrepareSftConfig(data=tmp_path / "nowhere"), Silent())


def test_the_bundled_dialogues_fill_their_rows(tmp_path: Path) -> None:
    out = tmp_path / "sft.parquet"
    report = prepare_sft(PrepareSftConfig(out=out, tokenizer=Path("bundled")), Silent())
    assert report.fill >= 0.98
    assert report.num_too_long == 0
    assert report.num_tokens / report.num_dialogues < 80

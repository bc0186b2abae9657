import itertools
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from minillm import paths
from minillm.data import text_sample
from minillm.data.text_sample import Text, TextSample, read_sample
from minillm.data.tokenizer import ADDED, fingerprint, load_tokenizer, plain_encoder
from minillm.data.tokenizer_measure import language_of, measure
from minillm.data.train_tokenizer import TokenizerReport, train_backend, train_tokenizer
from minillm.errors import InputError
from minillm.log import Silent
from minillm.settings import TrainTokenizerConfig

MakeTexts = Callable[..., list[str]]


class Recorder:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.tasks: list[list[object]] = []

    def start(self, what: str, total: float | None, unit: str) -> None:
        self.tasks.append([what, total, 0.0, False])

    def advance(self, amount: float) -> None:
        self.tasks[-1][2] += amount  # type: ignore[operator]

    def note(self, text: str) -> None: ...

    def finish(self) -> None:
        self.tasks[-1][3] = True


@pytest.fixture
def corpus(tmp_path: Path, make_texts: MakeTexts) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in make_texts(200, seed=number)]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def train(data: Path, out: Path, **settings) -> TokenizerReport:
    return train_tokenizer(
        TrainTokenizerConfig(data=data, out=out, **{"vocab_size": 320} | settings)
    )


def test_the_folder_is_a_tokenizer_with_the_designed_ids(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "tok"
    report = train(corpus, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == report.num_tokens == 324
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", *ADDED]) == [0, 320, 321, 322, 323]
    assert report.fingerprint == fingerprint(out) == fingerprint(tokenizer)
    assert report.num_documents == 600
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def test_the_base_vocabulary_is_endoftext_then_the_256_bytes_then_merges(
    make_texts: MakeTexts,
) -> None:
    model = json.loads(train_backend(iter([make_texts(300)]), 320).to_str())["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < 320}
    by_id = sorted(model["vocab"], key=model["vocab"].get)
    assert sorted(by_id[1:257]) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert by_id[257:] == ["".join(pair) for pair in model["merges"]]
    assert len(by_id) == 320


def test_the_pre_tokenizer_is_qwen2s_and_nothing_normalizes(make_texts: MakeTexts) -> None:
    tree = json.loads(train_backend(iter([make_texts(100)]), 300).to_str())
    # as in Qwen2's published tokenizer.json
    pattern = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
        " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    split, to_bytes = tree["pre_tokenizer"]["pretokenizers"]
    assert split == {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    assert (to_bytes["type"], to_bytes["use_regex"], to_bytes["add_prefix_space"]) == (
        "ByteLevel",
        False,
        False,
    )
    assert tree["normalizer"] is None
    assert pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(
        "你好，世界 I'm 12"
    ) == [
        ("你好", (0, 2)),
        ("，世界", (2, 5)),
        (" I", (5, 7)),
        ("'m", (7, 9)),
        (" ", (9, 10)),
        ("1", (10, 11)),
        ("2", (11, 12)),
    ]


def test_no_token_is_longer_than_eight_chinese_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("中华人民共和国全国人民代表大会常务委员会\n\n" * 50)
    report = train(tmp_path, tmp_path / "tok", vocab_size=303)
    tokenizer = load_tokenizer(report.folder)
    lengths = [len(token) for token in tokenizer.get_vocab() if token not in ADDED]
    assert max(lengths) <= 24


def test_the_same_text_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(corpus, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_most_frequent_pair_is_merged_first() -> None:
    backend = train_backend(iter([["ababab ab", "cd"], ["cd cd xyz"]]), 259)
    merges = json.loads(backend.to_str())["model"]["merges"]
    assert merges == [["a", "b"], ["c", "d"]]


def test_too_little_text_says_how_many_merges_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abab abab")  # ab, then abab: two merges
    with pytest.raises(InputError, match=r"gives 259 tokens, 2 of them merges") as caught:
        train(tmp_path, tmp_path / "tok", vocab_size=1000)
    assert "--vocab-size 259" in str(caught.value.hint)
    assert not (tmp_path / "tok").exists()
    assert train(tmp_path, tmp_path / "tok", vocab_size=259).num_tokens == 263


def test_max_bytes_bounds_the_text_and_spreads_it_over_the_files(
    corpus: Path, tmp_path: Path
) -> None:
    for number, letter in enumerate("pqr"):
        lines = [json.dumps({"text": letter * 100})] * 100
        (corpus / f"{number}.jsonl").write_text("\n".join(lines))
    report = train(corpus, tmp_path / "tok", max_bytes=3000, vocab_size=260)
    assert 2700 <= report.text_bytes <= 3000
    vocabulary = load_tokenizer(report.folder).get_vocab()
    assert {"pp", "qq", "rr"} <= set(vocabulary)
    assert report.num_documents == 300
    assert report.corpus_bytes == 30_000
    assert report.is_held_out
    whole = train(corpus, tmp_path / "tok", max_bytes=10**9, vocab_size=260)
    assert (whole.text_bytes, whole.is_held_out) == (30_000, False)
    assert train(corpus, tmp_path / "tok", max_bytes=0, vocab_size=260).text_bytes == 30_000


def test_the_sample_is_random_over_the_whole_corpus_and_keeps_nothing_else(
    tmp_path: Path,
) -> None:
    lines = [json.dumps({"text": f"{i:04d}" * 5}) for i in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def read(seed: int) -> TextSample:
        return read_sample(tmp_path, "text", 4000, seed, Silent())

    sample = read(0)
    places = [int(text.text[:4]) for text in sample.chosen]
    assert places == sorted(places)
    assert len(places) == 200
    # 200 of 2000: hypergeometric mean 50 a quarter, standard deviation 5.8
    for quarter in range(4):
        assert 25 < sum(quarter * 500 <= place < quarter * 500 + 500 for place in places) < 75
    held_out = {text.text for text in sample.held_out}
    assert len(held_out) == 1800  # all the others: they are less than its bound
    assert not held_out & {text.text for text in sample.chosen}
    assert read(0).chosen == sample.chosen
    assert read(1).chosen != sample.chosen


def test_the_sample_is_the_head_of_one_random_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sample, "HELD_OUT_BYTES", 500)
    texts = [f"{i:03d}" + "x" * (i * 37 % 400) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for seed in range(30):
        sample = read_sample(tmp_path, "text", 3000, seed, Silent())
        draw = random.Random(f"{seed} sample")
        order = sorted(texts, key=lambda _, draw=draw: draw.random())
        sizes = list(itertools.accumulate(map(len, order)))
        chosen = {text for text, size in zip(order, sizes, strict=True) if size <= 3000}
        kept = {text for text, size in zip(order, sizes, strict=True) if size <= 3500}
        assert {text.text for text in sample.chosen} == chosen
        assert {text.text for text in sample.held_out} == kept - chosen


def test_a_huge_document_neither_fills_the_sample_nor_empties_it(tmp_path: Path) -> None:
    huge = "\n".join(f"{i} 春眠不觉晓" for i in range(40_000))
    rows = [huge, *(f"small {i}" for i in range(100))]
    pq.write_table(
        pa.table({"text": rows, "source": ["big"] + ["small"] * 100}), tmp_path / "a.parquet"
    )
    sample = read_sample(tmp_path, "text", 500_000, 0, Silent())
    assert 300_000 < sample.text_bytes <= 500_000
    assert {text.source for text in sample.chosen} == {"big", "small"}
    pieces = [text.text for text in (*sample.chosen, *sample.held_out) if text.source == "big"]
    assert sorted("".join(pieces)) == sorted(huge)
    assert all(piece.endswith("\n") for piece in pieces if not huge.endswith(piece))


def test_a_source_is_the_column_or_the_files_name(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", " ", "c"], "source": ["x", None, "x", "y"]})
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["d"], "source": [3]}), tmp_path / "b.parquet")
    (tmp_path / "wiki.txt").write_text("e\n\nf")
    sample = read_sample(tmp_path, "text", 0, 0, Silent())
    pairs = [(text.text, text.source) for text in sample.chosen]
    assert pairs == [("a", "x"), ("b", "a"), ("c", "y"), ("d", "b"), ("e", "wiki"), ("f", "wiki")]


def test_measures_agree_with_encoding_each_text_alone(bundled, make_texts: MakeTexts) -> None:
    encoder = plain_encoder(bundled)
    texts = [Text(t, f"s{i % 2}", len(t.encode())) for i, t in enumerate(make_texts(300))]
    fits = measure("x", len(bundled), encoder, texts)
    tokens = [len(encoder.encode(text.text).ids) for text in texts]
    assert fits.total.tokens == sum(tokens)
    assert fits.by_source["s1"].tokens == sum(tokens[1::2])
    assert sum(fit.text_bytes for fit in fits.by_language.values()) == fits.total.text_bytes
    assert fits.total.characters == sum(len(text.text) for text in texts)
    one = measure("x", 1, encoder, [Text("春眠 over it's", "s", 17)])
    assert one.total.words == 5  # two letters, over, it, s


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("人工智能", "Chinese"),
        ("用 Python 写代码的方法", "Chinese"),
        ("これは日本語です", "Japanese"),
        ("안녕하세요", "Korean"),
        ("Il était une fois", "English and other Latin"),
        ("Жили-были", "other scripts"),
        ("12 + 30", "no letters"),
    ],
)
def test_languages_are_told_apart_by_their_letters(text: str, language: str) -> None:
    assert language_of(text) == language


def test_the_report_names_unused_and_longest_tokens_and_compares(
    tmp_path: Path, small_folder: Path
) -> None:
    # seven merges: `ab`, `abab`, and the bytes of two letters; only the last of each remains
    (tmp_path / "a.txt").write_text("\n\n".join(["abab"] * 20 + ["中文"] * 20))
    report = train(tmp_path / "a.txt", tmp_path / "tok", vocab_size=264, compare=(small_folder,))
    assert [fit.name for fit in report.fits] == ["this one", "bundled", small_folder.name]
    assert report.num_unused == 5
    text = (tmp_path / "tok" / "report.md").read_text()
    assert "| `abab` | 4 | 20 |" in text
    assert "5 of 7 merged tokens never appear" in text
    assert "5 of them because they are steps" in text
    assert "256 of the 256 single bytes do not appear" in text
    assert "| 1 | a | 200 B |" in text
    assert (tmp_path / "tok" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_tokenizer_to_compare_with_is_checked_before_training(
    corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no file or folder at"):
        train(corpus, tmp_path / "tok", compare=(tmp_path / "nowhere",))
    assert not (tmp_path / "tok").exists()


def test_an_earlier_tokenizer_is_replaced_and_other_files_are_not(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tok"
    before = train(corpus, out).fingerprint
    assert train(corpus, out, vocab_size=310).fingerprint != before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds `notes\.txt`"):
        train(corpus, out)
    assert len(load_tokenizer(out)) == 314


def test_an_error_while_reading_keeps_its_kind_and_the_earlier_tokenizer(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tok"
    before = train(corpus, out).fingerprint
    (corpus / "2.jsonl").write_text('{"text": "ok"}\nbroken\n')
    with pytest.raises(InputError, match=r"2\.jsonl` line 2"):
        train(corpus, out)
    assert fingerprint(out) == before
    assert [file.name for file in tmp_path.iterdir()] == [corpus.name, out.name]


def lines_of(corpus: Path) -> list[str]:
    return [line for file in sorted(corpus.iterdir()) for line in file.read_text().splitlines()]


def test_progress_reaches_its_total(corpus: Path, tmp_path: Path) -> None:
    progress = Recorder()
    cfg = TrainTokenizerConfig(data=corpus, out=tmp_path / "tok", vocab_size=300)
    train_tokenizer(cfg, progress)
    (what, total, done, is_finished), merging, counting = progress.tasks
    assert (what, is_finished) == ("read text", True)
    assert total == sum(file.stat().st_size for file in corpus.iterdir())
    assert done == pytest.approx(total)
    assert (merging[0], merging[3]) == ("learn merges", True)
    size = sum(len(json.loads(line)["text"].encode()) for line in lines_of(corpus))
    assert counting == ["count tokens", size, size, True]


def test_ctrl_c_stops_it_while_merges_are_learned(tmp_path: Path) -> None:
    draw = random.Random(0)
    letters = [chr(0x4E00 + i) for i in range(3000)]
    text = "\n\n".join("".join(draw.choices(letters, k=4000)) for _ in range(400))
    (tmp_path / "a.txt").write_text(text)
    command = [sys.executable, "-m", "minillm", "train-tokenizer", "--data", tmp_path / "a.txt"]
    command += ["--out", tmp_path / "tok"]
    # a script's background job ignores SIGINT, and so would the command
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("learn merges"):
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130  # to learn all of it takes minutes
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_without_a_sample_the_hint_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="data/sample") as caught:
        train_tokenizer(TrainTokenizerConfig())
    assert "minillm prepare-tokenizer --data bundled" in str(caught.value.hint)
    assert not paths.TOKENIZER.exists()

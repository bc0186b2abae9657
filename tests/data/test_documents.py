import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.data import documents as module
from minillm.data.documents import find_files, read_batches, stem_of, total_bytes
from minillm.errors import InputError

MakeTexts = Callable[..., list[str]]
TEXTS = ["你好\n世界", "hello 🌍", "tab\t\"quote\" \\ 'x'", "a" * 3000]


def read(path: Path, column: str = "text") -> list[str]:
    return [text for batch in read_batches(find_files(path), column) for text in batch.texts]


def write_jsonl(path: Path, items: list[object]) -> None:
    raw = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".zst":
        half = len(raw) // 2  # two frames, as concatenated files have
        raw = zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])
    path.write_bytes(raw)


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> None:
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=3)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL"])
def test_json_lines_come_back_in_order(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, [{"text": text, "n": 1} for text in TEXTS])
    assert read(tmp_path) == TEXTS


def test_parquet_comes_back_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS * 300)
    assert read(tmp_path) == TEXTS * 300


def test_parquet_may_hold_dictionaries_and_large_strings(tmp_path: Path) -> None:
    encoded = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": encoded}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array(["c"], pa.large_string())}), tmp_path / "b.parquet")
    assert read(tmp_path) == ["a", "b", "a", "c"]


def test_text_files_are_split_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff一行\r\n二行\r\n\r\n \t\r\nthree\n\n\n四\n".encode())
    assert read(tmp_path) == ["一行\n二行", "three", "四"]


def test_blank_documents_are_skipped(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["", None, " \n", "x"])
    write_jsonl(tmp_path / "b.jsonl", [{"text": t} for t in ["", None, " \u3000", "y"]])
    (tmp_path / "c.jsonl").write_text('\n{"text": "z"}\n\n')
    assert read(tmp_path) == ["x", "y", "z"]


def test_files_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for place in ["b.txt", "sub/a.txt", "a.txt", ".hidden/c.txt", ".d.txt"]:
        (tmp_path / place).write_text(place)
    (tmp_path / "notes.md").write_text("not ours")
    assert read(tmp_path) == ["a.txt", "b.txt", "sub/a.txt"]
    assert read(tmp_path / "b.txt") == ["b.txt"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1).filter("".join))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_survives_parquet_and_json_lines(tmp_path: Path, texts: list[str]) -> None:
    kept = [text for text in texts if text.strip()]
    if not kept:
        return
    write_parquet(tmp_path / "a.parquet", list(texts))
    write_jsonl(tmp_path / "a.jsonl.gz", [{"text": text} for text in texts])
    assert read(tmp_path / "a.parquet") == kept
    assert read(tmp_path / "a.jsonl.gz") == kept


def test_read_bytes_add_up_to_the_size_on_disk(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS * 100)
    write_jsonl(tmp_path / "b.jsonl.zst", [{"text": text} for text in TEXTS * 1000])
    (tmp_path / "c.txt").write_text("x\n\ny\n")
    files = find_files(tmp_path)
    done = sum(batch.read_bytes for batch in read_batches(files))
    assert done == pytest.approx(sum(file.stat().st_size for file in files))
    assert done == pytest.approx(total_bytes(files))


def test_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARS", 10)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "abcdef"}] * 5)
    sizes = [len(batch.texts) for batch in read_batches(find_files(tmp_path))]
    assert sizes == [2, 2, 1, 0]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        pq.write_table(pa.table({"content": ["x"], "url": ["y"]}), tmp_path / name)
    else:
        write_jsonl(tmp_path / name, [{"content": "x", "url": "y"}])
    with pytest.raises(InputError, match=r"no `text`, only `content`, `url`") as caught:
        read(tmp_path)
    assert caught.value.hint == "`--text-column content`"
    assert read(tmp_path, "content") == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"line 2: not JSON"),
        (b"[1]", r"line 2: a JSON object is wanted, not list"),
        (b'{"text": 5}', r"line 2: `text` holds int"),
        (b'{"text": "\\ud800"}', r"line 2: the text holds half a surrogate pair"),
        (b'{"text": "\xff"}', r"line 2: not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"a\.jsonl` " + message):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["other", "cut", "overwritten"])
def test_a_damaged_file_is_named(
    tmp_path: Path, name: str, damage: str, make_texts: MakeTexts
) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, make_texts(500))
    else:
        write_jsonl(path, [{"text": text} for text in make_texts(500)])
    whole = path.read_bytes()
    part = len(whole) // 3
    broken = {
        "other": b"not a file of that kind",
        "cut": whole[:part],
        "overwritten": whole[:part] + bytes(part) + whole[2 * part :],
    }
    path.write_bytes(broken[damage])
    with pytest.raises(InputError, match=name):
        read(tmp_path)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_compressed_file_that_ends_too_early_is_an_input_error(
    tmp_path: Path, compress: Callable[[bytes], bytes], make_texts: MakeTexts
) -> None:
    ending = "gz" if compress is gzip.compress else "zst"
    whole = compress("\n".join(make_texts(500)).encode())
    (tmp_path / f"a.txt.{ending}").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path)


def test_a_parquet_page_damaged_in_the_middle_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"{i} 你好" * 50 for i in range(300)])
    raw = bytearray(path.read_bytes())
    raw[200:2000] = b"\xff" * 1800
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"a\.parquet"):
        read(tmp_path)


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="holds int64, not text"):
        read(tmp_path)


def test_nothing_to_read_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        find_files(tmp_path / "missing")
    with pytest.raises(InputError, match="no parquet, jsonl or txt"):
        find_files(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match="neither parquet"):
        find_files(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(InputError, match="no document with any text"):
        read(tmp_path)


def test_stem_drops_the_known_endings_only() -> None:
    names = ["wiki.zh.jsonl.gz", "a.parquet", "b.TXT", "v1.2.txt.zst"]
    assert [stem_of(Path(name)) for name in names] == ["wiki.zh", "a", "b", "v1.2"]

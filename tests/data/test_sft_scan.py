"""The first pass finds every line once, wherever a chunk ends, and says where it lies."""

import json
from pathlib import Path

import pytest

from minillm.data import sft_scan
from minillm.data.sft_inputs import PlainFile, TokenLine
from minillm.data.worker_pool import Workers
from minillm.errors import InputError
from minillm.log import Silent

LINES = [
    json.dumps({"instruction": "问" * n, "output": "答", "type": str(n % 3)}, ensure_ascii=False)
    for n in range(1, 9)
]
TEXT = ("\n".join([*LINES[:3], "", "  ", *LINES[3:]])).encode()  # without an end of line


def scan(*files: PlainFile, skip_bad: bool = False) -> sft_scan.Candidates:
    return sft_scan.scan(files, Workers(None, 1), Silent(), skip_bad=skip_bad)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_every_line_is_found_once_with_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes
) -> None:
    path = tmp_path / "a.jsonl"
    data = TEXT + end
    path.write_bytes(data)
    for size in range(1, len(data) + 2):
        monkeypatch.setattr(sft_scan, "_CHUNK_BYTES", size)
        found = scan(PlainFile(path, path))
        places = zip(found.offset.tolist(), found.size.tolist(), strict=True)
        lines = [data[offset : offset + length].decode().rstrip() for offset, length in places]
        assert lines == LINES, size
        assert found.num_lines == len(LINES)
        assert [found.types[kind] for kind in found.kind] == [str(n % 3) for n in range(1, 9)]


def test_a_bad_line_keeps_its_number_over_chunks_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b"\xef\xbb\xbf" + TEXT + b"\n")
    second.write_bytes(TEXT + b"\n[]\n" + TEXT + b"\n{")
    for size in (7, 100, 10_000):
        monkeypatch.setattr(sft_scan, "_CHUNK_BYTES", size)
        files = [PlainFile(first, first), PlainFile(second, second)]
        with pytest.raises(InputError, match=r"b\.jsonl` line 11: expected an object"):
            scan(*files)
        found = scan(*files, skip_bad=True)
        assert found.rejected.examples == {
            "no dialogue": [f"`{second}` line 11"],
            "not JSON": [f"`{second}` line 22"],
        }
        assert len(found) == 3 * len(LINES)
        assert found.file.tolist() == [0] * 8 + [1] * 16


def test_what_was_read_has_a_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    prints = set()
    for text in (TEXT, TEXT.replace("答".encode(), "荅".encode()), TEXT + b"\n" + TEXT):
        path.write_bytes(text)
        prints.add(scan(PlainFile(path, path)).sha256)
    assert len(prints) == 3


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    assert len(scan(PlainFile(path, path))) == 0


def test_very_many_types_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_scan, "_MAX_TYPES", 2)
    path = tmp_path / "a.jsonl"
    path.write_bytes(TEXT)
    found = scan(PlainFile(path, path))
    assert found.types == ["1", "2", sft_scan.OTHER]
    assert found.kind.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_lines_of_tokens_are_read_as_written() -> None:
    line = TokenLine.from_json(
        b'{"ids": "AQAAAAIAAAADAAAABAAAAA==", "learned": "UA==", "type": "x"}'
    )
    assert line.ids.tolist() == [1, 2, 3, 4]
    assert line.learned.tolist() == [False, True, False, True]
    assert line.is_multi_turn
    assert TokenLine.from_json(line.to_json().encode()).ids.tolist() == [1, 2, 3, 4]

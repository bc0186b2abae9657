"""Reading dialogues: both forms, compressed or not; a bad line is named."""

import gzip
import json
import re
from pathlib import Path

import pytest
import zstandard

from minillm.data.dialogues import parse_line, read_file
from minillm.data.sft_inputs import find_dialogue_files
from minillm.errors import InputError

LINE = json.dumps(
    {
        "messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}],
        "source": "s",
    }
)


def test_plain_and_compressed_files_read_alike(tmp_path: Path) -> None:
    data = f"{LINE}\n\n{LINE}\n".encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(data))
    (tmp_path / "readme.txt").write_text("no dialogues here")
    files = find_dialogue_files(tmp_path)
    assert [file.name[0] for file in files] == ["a", "b", "c"]
    first, *others = [list(read_file(file)) for file in files]
    assert len(first) == 2
    assert first[0].source == "s"
    assert others == [first, first]


def test_an_instruction_line_becomes_turns() -> None:
    line = {
        "instruction": "translate",
        "input": "cat",
        "output": "猫",
        "history": [["hello", "你好"], ["bye", "再见"]],
    }
    messages = parse_line(json.dumps(line), "x").messages
    assert [message["content"] for message in messages] == [
        "hello", "你好", "bye", "再见", "translate\ncat", "猫",
    ]  # fmt: skip
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3


def test_an_instruction_without_input_or_history_is_one_turn() -> None:
    for extra in ({}, {"input": "", "history": []}, {"input": None, "history": None}):
        messages = parse_line(
            json.dumps({"instruction": "q", "output": "a", **extra}), "x"
        ).messages
        assert [message["content"] for message in messages] == ["q", "a"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object, found list"),
        ("{}", "`messages` must be a list"),
        ('{"messages": [{"role": "user", "content": ""}]}', "is empty"),
        ('{"instruction": "q", "output": ""}', "message 2: `content` of the assistant is empty"),
        ('{"instruction": "q", "output": "a", "history": [["x"]]}', "`history` must be a list"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{LINE}\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        list(read_file(file))
    assert str(caught.value).startswith(f"`{file}` line 2")


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b"\xff\xfe"), ("a.jsonl.gz", b"no gzip"), ("a.jsonl.zst", b"no")]
)
def test_broken_files_are_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        list(read_file(tmp_path / name))


def test_a_folder_without_jsonl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.jsonl file"):
        find_dialogue_files(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match="is not a JSONL file"):
        find_dialogue_files(tmp_path / "a.csv")

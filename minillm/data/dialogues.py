"""Dialogues from JSON lines, one per line, checked one by one.

    {"messages": [{"role": "system" | "user" | "assistant", "content": "…"}, …], "source": "…"}
    {"instruction": "…", "input": "…", "output": "…", "history": [["question", "answer"], …]}

The second form is that of the deepctrl sets. A line that is neither stops the reading with file
and line: a set with holes nobody knows of is worse than none.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.data.chat import check_messages
from minillm.data.documents import read_lines
from minillm.errors import InputError

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Checked messages, and where they came from."""

    messages: list[dict[str, str]]
    source: str


def find_dialogue_files(path: Path) -> list[Path]:
    """Return the JSONL files below a folder, sorted by path, or the file itself.

    Raises:
        InputError: There is none.
    """
    if path.is_file() and path.name.lower().endswith(_SUFFIXES):
        return [path]
    files = sorted(f for f in path.rglob("*") if f.name.lower().endswith(_SUFFIXES) and f.is_file())
    if not files:
        what = "is not a JSONL file" if path.is_file() else "holds no .jsonl file"
        raise InputError(
            f"`{path}` {what}",
            hint="write one dialogue per line to `NAME.jsonl`, or use `--data bundled`",
        )
    return files


def read_file(file: Path) -> Iterator[Dialogue]:
    """Yield the dialogues of one file; blank lines are skipped.

    Raises:
        InputError: The file or a line of it is broken; the line is named.
    """
    with file.open("rb") as raw:
        for number, line in read_lines(file, raw):
            if line.strip():
                yield parse_line(line, f"`{file}` line {number}")


def parse_line(line: str, where: str) -> Dialogue:
    """Return the dialogue of one line.

    Raises:
        InputError: It is not JSON, or no dialogue.
    """
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise InputError(
            f"{where}: not JSON ({err})", hint="one JSON object per line; remove or mend the line"
        ) from None
    if not isinstance(item, dict):
        raise InputError(
            f"{where}: expected an object, found {type(item).__name__}",
            hint='a line is `{"messages": [{"role": …, "content": …}, …]}`',
        )
    if "messages" not in item and {"instruction", "output"} <= item.keys():
        item["messages"] = _from_instruction(item, where)
    source = item.get("source")
    return Dialogue(
        check_messages(item.get("messages"), where), source if isinstance(source, str) else ""
    )


def _from_instruction(item: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the messages of a deepctrl line."""
    turns: list[tuple[Any, Any]] = []
    for pair in item.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(
                f"{where}: `history` must be a list of [question, answer] pairs",
                hint="mend or remove the line",
            )
        turns.append((pair[0], pair[1]))
    parts = [item["instruction"], item.get("input")]
    asked = "\n".join(part for part in parts if isinstance(part, str) and part.strip())
    turns.append((asked, item["output"]))
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]

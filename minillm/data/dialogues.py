"""Dialogues from JSON lines, one per line, checked one by one.

    {"messages": [{"role": "system" | "user" | "assistant", "content": "…"}, …], "type": "…"}
    {"instruction": "…", "input": "…", "output": "…", "history": [["question", "answer"], …]}

The second form is that of the deepctrl sets, where the question is `instruction`, `input` or both.
`type`, or `source`, says what kind of dialogue it is. A line that is neither is an error with file
and line: a set with holes nobody knows of is worse than none.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.data.chat import BadDialogue, check_messages
from minillm.data.documents import read_lines

_NO_JSON, _NO_DIALOGUE = "not JSON", "no dialogue"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Checked messages, and what kind of dialogue they are, e.g. where they came from."""

    messages: list[dict[str, str]]
    source: str

    @property
    def is_multi_turn(self) -> bool:
        """More than one answer."""
        return sum(message["role"] == "assistant" for message in self.messages) > 1


def read_file(file: Path) -> Iterator[Dialogue]:
    """Yield the dialogues of one file; blank lines are skipped.

    Raises:
        InputError: The file or a line of it is broken; the line is named.
    """
    with file.open("rb") as raw:
        for number, line in read_lines(file, raw):
            if line.strip():
                yield parse_line(line, f"`{file}` line {number}")


def parse_line(line: str | bytes, where: str) -> Dialogue:
    """Return the dialogue of one line.

    Raises:
        BadDialogue: It is not UTF-8, not JSON, or no dialogue.
    """
    try:
        item = json.loads(line)
    except UnicodeDecodeError as err:
        raise BadDialogue(
            f"{where}: not UTF-8 ({err.reason} at byte {err.start})",
            hint="convert the file: `iconv -f GB18030 -t UTF-8 FILE > NEW`",
            reason="not UTF-8",
        ) from None
    except (ValueError, RecursionError) as err:
        raise BadDialogue(
            f"{where}: not JSON ({err})",
            hint="one JSON object per line; mend the line, or leave it out: `--skip-bad`",
            reason=_NO_JSON,
        ) from None
    if not isinstance(item, dict):
        raise BadDialogue(
            f"{where}: expected an object, found {type(item).__name__}",
            hint='a line is `{"messages": [{"role": …, "content": …}, …]}`',
            reason=_NO_DIALOGUE,
        )
    if "messages" not in item and {"instruction", "output"} <= item.keys():
        item["messages"] = _from_instruction(item, where)
    source = item.get("type") or item.get("source")
    return Dialogue(
        check_messages(item.get("messages"), where), source if isinstance(source, str) else ""
    )


def _from_instruction(item: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the messages of a deepctrl line."""
    turns: list[tuple[Any, Any]] = []
    history = item.get("history") or []
    if not isinstance(history, list):
        raise _bad_history(where)
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise _bad_history(where)
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


def _bad_history(where: str) -> BadDialogue:
    return BadDialogue(
        f"{where}: `history` must be a list of [question, answer] pairs",
        hint="mend the line, or leave it out: `--skip-bad`",
        reason=_NO_DIALOGUE,
    )

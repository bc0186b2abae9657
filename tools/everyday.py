"""Read `tools/everyday/*.txt`, small talk and simple facts written for this project.

A block ends at an empty line. `Q:` lines give ways to ask, between bars, `A:` lines the answer;
several pairs are a dialogue of several turns. A line `X: a=b, c=d` makes the block a pattern:
`{x}` and `{y}` stand for each pair in turn. Lines with `#` are headings.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm.data.surface import Frame

FOLDER = Path(__file__).parent / "everyday"
FORMS = 10
"""Dialogues made of each block; of each pair of a pattern, as many as it has ways to ask."""

FRAMES = {
    "zh": Frame(
        ("", "", "", "", "你好，", "请问", "请问，", "请问一下，"), ("？", "？", "?", "", "呢？")
    ),
    "en": Frame(
        ("", "", "", "", "Hi, ", "Excuse me, ", "Hello, "), ("?", "?", "", "??", ", please?")
    ),
    "other": Frame(("",), ("", "", ".", "!")),
    "other_zh": Frame(("",), ("", "", "。", "！")),
}
QUESTION_ZH = re.compile(r"什么|吗|谁|哪|几|多少|怎|如何|多长|可以|为何|等于|怎样")
QUESTION_EN = re.compile(
    r"(What|Who|Which|Where|When|Why|How|Is|Are|Does|Do|Can|In|At|Any|Could|Will)( |'s)"
)
SYSTEM_SHARE = 0.05
SYSTEM = {"zh": "你是一个有用的助手。", "en": "You are a helpful assistant."}

Dialogue = dict[str, Any]


def everyday_dialogues(rng: random.Random) -> list[Dialogue]:
    """Return the dialogues of all blocks, each in several surface forms.

    Raises:
        ValueError: A question has two answers, or a block is malformed.
    """
    answers: dict[str, str] = {}
    dialogues = []
    for language in ("zh", "en"):
        for turns, count in read_blocks(FOLDER / f"{language}.txt"):
            if len(turns) == 1:
                for ask in turns[0][0]:
                    if answers.setdefault(ask.lower(), turns[0][1]) != turns[0][1]:
                        raise ValueError(f"two answers to `{ask}`")
            dialogues += [make_dialogue(turns, i, language, rng) for i in range(count)]
    return dialogues


def read_blocks(path: Path) -> Iterator[tuple[list[tuple[list[str], str]], int]]:
    """Yield the turns of each dialogue, (ways to ask, answer), and how many forms to make."""
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in block.strip().split("\n") if not line.startswith("#")]
        asks = [line[3:].split(" | ") for line in lines if line.startswith("Q: ")]
        answers = [line[3:] for line in lines if line.startswith("A: ")]
        if len(asks) != len(answers):
            raise ValueError(f"{path}: questions and answers do not pair up in\n{block}")
        pairs = [line[3:] for line in lines if line.startswith("X: ")]
        if not pairs and asks:
            yield list(zip(asks, answers, strict=True)), max(FORMS, len(asks[0]) + 2)
        for pair in re.split(r", (?=[^,]+=)", pairs[0]) if pairs else ():
            x, y = pair.rsplit("=", 1)
            filled = [ask.replace("{x}", x) for ask in asks[0]]
            answer = answers[0].replace("{x}", x).replace("{y}", y)
            yield [(filled, answer[0].upper() + answer[1:])], len(filled)


def make_dialogue(
    turns: list[tuple[list[str], str]], index: int, language: str, rng: random.Random
) -> Dialogue:
    """Return one dialogue; the index-th way to ask comes first, so that all are used."""
    messages = []
    if rng.random() < SYSTEM_SHARE:
        messages.append({"role": "system", "content": SYSTEM[language]})
    for asks, answer in turns:
        core = asks[index % len(asks)]
        ask = frame(core, language).sample(core, 3, rng)[0 if index < len(asks) else 2]
        messages.append({"role": "user", "content": ask})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "source": "everyday"}


def frame(core: str, language: str) -> Frame:
    """Return the frame of a question, or of anything else one may say."""
    if core[-1] in "=?":
        return Frame()
    if language == "zh":
        return FRAMES["zh" if QUESTION_ZH.search(core) else "other_zh"]
    return FRAMES["en" if QUESTION_EN.match(core) else "other"]


def plain(text: str) -> str:
    """Return a text without case, spaces and punctuation, to compare questions.

    >>> plain("Who are you?")
    'whoareyou'
    """
    return re.sub(r"[\W_]+", "", text.lower())

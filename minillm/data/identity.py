"""Dialogues in which the model says who it is, made from templates.

Many ways to ask, one way to answer: a small model learns to map all of them to one sentence that
holds its name, and unseen ways to ask land there too. The price: it always says the same.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from minillm.data.surface import Frame
from minillm.settings import IdentityConfig

TEMPLATES = Path(__file__).with_name("samples") / "identity.json"
SOURCE = "identity"
SYSTEM_SHARE = 0.1
"""Share of the dialogues that begin with an ordinary system message, as many clients send one."""

_KEY = re.compile(r"\{(\w+)\}")

Message = dict[str, str]
Dialogue = dict[str, Any]


def identity_dialogues(persona: IdentityConfig, seed: int = 0) -> list[Dialogue]:
    """Return the identity dialogues of a persona.

    Each question and each conversation of `samples/identity.json` appears
    `persona.identity_repeat` times, in a different surface form every time.

    Args:
        persona: Name and author to fill in.
        seed: Seed of the surface forms.

    Returns:
        Dialogues `{"messages": [{"role", "content"}, ...], "source": "identity"}`, in template
        order; the empty list where `persona.identity` is false.
    """
    if not persona.identity:
        return []
    rng = random.Random(seed)
    intents = {intent["id"]: intent for intent in _templates()["intents"]}
    return [_dialogue(turns, kind, rng) for turns, kind in _plans(intents, persona, rng)]


def pick_identity(dialogues: list[Dialogue], count: int) -> list[Dialogue]:
    """Return `count` of the dialogues, evenly spaced, so that each kind of question is there.

    >>> pick_identity([{"n": n} for n in range(7)], 3)
    [{'n': 1}, {'n': 3}, {'n': 5}]
    """
    count = min(count, len(dialogues))
    return [dialogues[(2 * i + 1) * len(dialogues) // (2 * count)] for i in range(count)]


def _plans(
    intents: Mapping[str, Any], persona: IdentityConfig, rng: random.Random
) -> Iterator[tuple[list[tuple[str, str]], str]]:
    """Yield the turns of each dialogue, and the intent or step it ends with."""
    for intent in intents.values():
        for question in intent["questions"]:
            for ask in _asks(intent, question, persona.identity_repeat, rng):
                yield [_turn(intent, ask, persona)], intent["id"]
    for plan in _templates()["conversations"]:
        for _ in range(persona.identity_repeat):
            yield [_planned(step, intents, persona, rng) for step in plan], str(plan[-1])


def all_questions() -> Iterator[str]:
    """Yield every surface form that any seed can ask, with every name filled in."""
    for intent in _templates()["intents"]:
        for question in intent["questions"]:
            key = _KEY.search(question)
            names = _templates()["fill"][key[1]] if key else [""]
            for name in names:
                core = question.replace(key[0], name) if key else question
                yield from _frame(intent).all_forms(core)


@cache
def _templates() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(TEMPLATES.read_text(encoding="utf-8"))
    return tree


def _frame(intent: Mapping[str, Any]) -> Frame:
    return Frame(**{k: tuple(v) for k, v in _templates()["frames"][intent["frame"]].items()})


def _asks(intent: Mapping[str, Any], question: str, count: int, rng: random.Random) -> list[str]:
    """Return `count` forms of a question, with `{other}` and its like filled in, in turn."""
    frame, key = _frame(intent), _KEY.search(question)
    if key is None:
        return frame.sample(question, count, rng)
    names = _templates()["fill"][key[1]]
    start = rng.randrange(len(names))
    cores = [question.replace(key[0], names[(start + i) % len(names)]) for i in range(count)]
    return [frame.sample(core, 2, rng)[1] for core in cores]


def _planned(
    step: str | list[str],
    intents: Mapping[str, Any],
    persona: IdentityConfig,
    rng: random.Random,
) -> tuple[str, str]:
    """Return question and answer of one step of a conversation: given, or of an intent."""
    if isinstance(step, list):
        return step[0], step[1]
    intent = intents[step]
    ask = _asks(intent, rng.choice(intent["questions"]), 2, rng)[1]
    return _turn(intent, ask, persona)


def _turn(intent: Mapping[str, Any], ask: str, persona: IdentityConfig) -> tuple[str, str]:
    """Return a question and its answer in the language of the intent."""
    answer: str = intent["answers"][0]
    if intent["id"].endswith("_zh"):
        author = persona.author_zh or persona.author
        answer = _put(_put(answer, "{name}", persona.assistant_name), "{author}", author)
    else:
        answer = answer.replace("{name}", persona.assistant_name)
        answer = answer.replace("{author}", persona.author)
    return ask, answer


def _put(text: str, key: str, value: str) -> str:
    """Replace `key` in Chinese text, with a space between Chinese and Latin letters.

    >>> _put("我是{name}，", "{name}", "Mini")
    '我是 Mini，'
    """
    value = value.strip()
    before = r"(?<=[一-鿿])" if value[:1].isascii() else r"(?!)"
    after = r"(?=[一-鿿])" if value[-1:].isascii() else r"(?!)"
    mark = re.escape(key)
    text = re.sub(before + mark, lambda _: " " + key, text)
    text = re.sub(mark + after, lambda _: key + " ", text)
    return text.replace(key, value)


def _dialogue(turns: list[tuple[str, str]], kind: str, rng: random.Random) -> Dialogue:
    messages: list[Message] = []
    if rng.random() < SYSTEM_SHARE:
        language = "en" if kind.endswith("_en") else "zh"
        system = rng.choice(_templates()["systems"][language])
        messages.append({"role": "system", "content": system})
    for ask, answer in turns:
        messages.append({"role": "user", "content": ask})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "source": SOURCE}

"""One question, many surface forms: greetings before it, marks after it, upper and lower case.

A small model that has seen `你是谁` in one spelling knows one spelling. The price: the forms are
mechanical, so a few are not what a careful writer would put down.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Frame:
    """What may stand before and after a question; repeated entries are likelier."""

    before: tuple[str, ...] = ("",)
    after: tuple[str, ...] = ("",)

    def all_forms(self, core: str) -> Iterator[str]:
        """Yield every form of `core`, the plain one first."""
        for before in dict.fromkeys(self.before):
            for after in dict.fromkeys(self.after):
                text = join(before, core, after)
                yield text
                if text.lower() != text:
                    yield text.lower()

    def sample(self, core: str, count: int, rng: random.Random) -> list[str]:
        """Return `count` forms, as different as there are; the first is the plain one.

        Args:
            core: The question without any mark at its end.
            count: How many.
            rng: Source of the choice.
        """
        chosen = [join("", core, self.after[0])]
        for _ in range(count * 8):
            if len(chosen) >= count:
                break
            text = join(rng.choice(self.before), core, rng.choice(self.after))
            text = text.lower() if rng.random() < 0.25 else text
            if text not in chosen:
                chosen.append(text)
        chosen += rng.choices(chosen, k=max(0, count - len(chosen)))
        return chosen[:count]


def join(before: str, core: str, after: str) -> str:
    """Put the parts together; an English question in mid-sentence loses its capital.

    >>> join("Excuse me, ", "Who are you", "?")
    'Excuse me, who are you?'
    """
    middle = bool(before) and before.rstrip()[-1:] not in "!."
    if middle and re.match(r"[A-Z][a-z]+[ ']", core) and not core.startswith("I'"):
        core = core[0].lower() + core[1:]
    return before + core + after


def pick(choices: Sequence[str], rng: random.Random) -> str:
    """Return one of `choices`."""
    return choices[rng.randrange(len(choices))]

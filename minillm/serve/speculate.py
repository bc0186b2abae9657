"""Guessing the next tokens from the text itself: what followed the same words before.

Right guesses save forward passes, wrong ones cost little: with one sequence, most of a pass is the
reading of the weights. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_GUESSES = 6
LONGEST, SHORTEST = 4, 2
"""Tokens at the end that must have appeared before."""
PATIENCE = 8
"""Most steps without a guess after wrong ones."""


@dataclass(slots=True)
class Drafter:
    """Guesses for one sequence; guesses more where it was right, rests where it was wrong."""

    num_guesses: int = 3
    rest: int = 0
    penalty: int = 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return up to `most` tokens that may come next."""
        if self.rest > 0:
            self.rest -= 1
            return []
        return look_up(tokens, min(most, self.num_guesses))

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Note how it went."""
        if num_right == num_guessed:
            self.num_guesses = min(MAX_GUESSES, self.num_guesses + 1)
            self.penalty = 0
        elif num_right == 0:
            self.num_guesses = max(2, self.num_guesses - 1)
            self.penalty = min(PATIENCE, 2 * self.penalty + 1)
            self.rest = self.penalty


def look_up(tokens: Sequence[int], most: int) -> list[int]:
    """Return what followed the last appearance of the longest ending that appeared before.

    >>> look_up([1, 2, 3, 4, 9, 1, 2], 3)
    [3, 4, 9]
    """
    if most <= 0:
        return []
    last = len(tokens) - 1
    best, best_length = -1, SHORTEST - 1
    # every earlier place of the last token, the latest first; Python's own search is fast
    at = last
    ending = tokens[-1] if tokens else -1
    while at > 0 and best_length < LONGEST:
        try:
            at = _rindex(tokens, ending, at)
        except ValueError:
            break
        length = 1
        while length < LONGEST and at >= length and tokens[at - length] == tokens[last - length]:
            length += 1
        if length > best_length:
            best, best_length = at, length
    return list(tokens[best + 1 : best + 1 + most]) if best >= 0 else []


def _rindex(tokens: Sequence[int], token: int, end: int) -> int:
    """Return the last place before `end` where `token` is."""
    for at in range(end - 1, -1, -1):
        if tokens[at] == token:
            return at
    raise ValueError(token)

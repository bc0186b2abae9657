"""One answer, as the engine knows it."""

import threading
from dataclasses import dataclass, field

from minillm.models.sampling import TokenLogprob
from minillm.serve.answer_text import AnswerText
from minillm.serve.choose import Chooser
from minillm.serve.sequence import Sequence
from minillm.serve.speculate import Drafter


@dataclass(eq=False, slots=True)
class Request:
    """Its settings, its text, and where it stands."""

    chooser: Chooser
    text: AnswerText
    cancel: threading.Event
    drafter: Drafter
    num_left: int
    """Tokens that may still come."""
    sequence: Sequence
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    guesses: tuple[int, ...] = ()
    """From the model's own block, for the next step."""
    has_begun: bool = False
    is_aborted: bool = False
    is_done: bool = False

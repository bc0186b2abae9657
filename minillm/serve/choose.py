"""From logits to the tokens of one answer, with its own settings; wrong guesses end it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minillm.models.sampling import Sampler, SamplingParams, TokenLogprob, measure_tokens


@dataclass(slots=True)
class Chosen:
    """New tokens of one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each, if asked for."""
    is_end: bool = False
    """The last one ends the answer."""


class Chooser:
    """Chooses one answer's tokens; lives as long as the answer, preempted or not."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, eos: Sequence[int]
    ) -> None:
        self.params = params
        self.ends = frozenset((*eos, *params.stop_ids))
        self._make = prompt, vocab_size, tuple(eos)
        self._num_chosen, self._ends = 0, [end for end in self.ends if end < vocab_size]
        self._sampler: Sampler | None = None
        p = params
        is_as_it_is = not (p.has_penalty or p.logit_bias or p.constraint)
        self.is_plain = p.is_greedy and is_as_it_is
        """The likeliest token is taken, of all or of those that do not end the answer too soon."""

    @torch.inference_mode()
    def allow(self, logits_NV: Tensor) -> Tensor:
        """Return the logits, without the ends that would come too soon, if `is_plain`."""
        too_soon = self.params.min_tokens - self._num_chosen
        if too_soon <= 0:
            return logits_NV
        logits_NV = logits_NV.clone()
        logits_NV[:too_soon, self._ends] = -math.inf
        return logits_NV

    def choose(self, logits_NV: Tensor, drafts: Sequence[int], best: Sequence[int]) -> Chosen:
        """Choose until a token is not the draft of its place.

        Args:
            logits_NV: Row n is for the place after n drafts.
            drafts: N - 1 guesses.
            best: The likeliest token of each row that `allow` has left, if `is_plain`.
        """
        chosen = Chosen()
        num_top = self.params.logprobs
        for number, logits_V in enumerate(logits_NV):
            token = best[number] if self.is_plain else self._draw(logits_V)
            chosen.tokens.append(token)
            self._num_chosen += 1
            if num_top is not None:
                chosen.logprobs += measure_tokens(logits_V[None], [token], num_top)
            chosen.is_end = token in self.ends
            if chosen.is_end or number == len(drafts) or token != drafts[number]:
                break
        return chosen

    @torch.inference_mode()
    def _draw(self, logits_V: Tensor) -> int:
        if self._sampler is None:
            prompt, vocab_size, eos = self._make
            ids = torch.tensor(prompt, dtype=torch.long, device=logits_V.device)
            self._sampler = Sampler(self.params, ids, vocab_size, eos)
        return int(self._sampler.next_token(logits_V))


@torch.inference_mode()
def likeliest(logits: Sequence[Tensor]) -> list[list[int]]:
    """Return the likeliest token of each row of each `(N, V)`, in one go."""
    if not logits:
        return []
    flat = torch.cat(list(logits)).argmax(-1).tolist()
    ends = torch.tensor([len(rows) for rows in logits]).cumsum(0).tolist()
    return [flat[end - len(rows) : end] for end, rows in zip(ends, logits, strict=True)]

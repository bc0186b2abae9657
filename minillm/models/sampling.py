"""How the next token is chosen: penalties, temperature, truncation, one draw.

Each rule is a pure function on a row of logits; `adjust` composes those that are on, in the order
of transformers and vLLM. Truncated tokens get -inf.

V vocabulary
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from minillm.errors import ConfigError

MAX_TOP_LOGPROBS = 20


class Constraint(Protocol):
    """What may come next in one answer, e.g. by a grammar; it moves with every token."""

    def mask_V(self) -> Tensor:  # noqa: N802 - shape suffix
        """Return which tokens may come next, bool, `(V,)`; never none of them.

        An answer that is complete allows only an end-of-text token.
        """

    def accept(self, token: int) -> None:
        """Note the token that came."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and how likely the model found it, before temperature, penalties and bias."""

    token_id: int
    logprob: float
    """Natural logarithm of the probability."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this place and their log-probabilities, likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request's settings. The defaults sample from the model as it is.

    Raises:
        ConfigError: A value is out of range; the message names the field.
    """

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest; 0 is all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose mass reaches this (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens in prompt or answer (CTRL, Keskar
    et al. 2019)."""
    frequency_penalty: float = 0.0
    """Subtract this for every earlier appearance in the answer (OpenAI)."""
    presence_penalty: float = 0.0
    """Subtract this from every token that the answer has (OpenAI)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    max_tokens: int = 256
    """Longest answer; 0 only with `prompt_logprobs`."""
    min_tokens: int = 0
    """End-of-text and `stop_ids` are impossible before."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside the model's own; their text is not part of it."""
    logprobs: int | None = None
    """Report each token's log-probability and this many of the likeliest, 0 to 20."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt; the first one has none."""
    constraint: Callable[[], Constraint] | None = None
    """Makes the state that says which tokens may come, one for each answer."""
    seed: int | None = None
    """Makes the draws repeatable."""

    def __post_init__(self) -> None:
        """Check every range."""
        _check("temperature", self.temperature, 0, math.inf)
        _check("top_k", self.top_k, 0, math.inf)
        _check("top_p", self.top_p, 0, 1, above_low=True)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 0, math.inf, above_low=True)
        _check("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _check("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _check("max_tokens", self.max_tokens, int(self.prompt_logprobs is None), math.inf)
        _check("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check("logprobs", self.logprobs or 0, 0, MAX_TOP_LOGPROBS)
        _check("prompt_logprobs", self.prompt_logprobs or 0, 0, MAX_TOP_LOGPROBS)
        if self.min_tokens and self.constraint:  # the end may be all that a grammar allows
            raise ConfigError("`min_tokens` and a grammar exclude each other", hint="drop one")
        for token in self.stop_ids:
            _check("stop_ids", token, 0, math.inf)
        for token, bias in self.logit_bias.items():
            _check("logit_bias", token, 0, math.inf)
            if math.isnan(bias):
                raise ConfigError(f"`logit_bias` of token {token} is not a number")
        if "" in self.stop:
            raise ConfigError("`stop` holds an empty text", hint="leave it out")
        if self.seed is not None:
            _check("seed", self.seed, -(2**63), 2**64 - 1)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def has_penalty(self) -> bool:
        """Whether the tokens so far matter."""
        penalties = self.frequency_penalty, self.presence_penalty
        return self.repetition_penalty != 1 or penalties != (0, 0)


def _check(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    is_low = value <= low if above_low else value < low
    if math.isnan(value) or math.isinf(value) or is_low or value > high:
        least = f"above {low}" if above_low else f"at least {low}"
        most = "" if math.isinf(high) else f" and at most {high}"
        allowed = "finite" if math.isinf(low) else f"{least}{most}"
        raise ConfigError(f"`{name}` must be {allowed}, got {value}")


# -------------------------------------------------------------------------------------- the rules


def apply_repetition_penalty(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Make tokens where `seen_V` is true less likely, whatever the sign of their logit."""
    penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return torch.where(seen_V, penalised_V, logits_V)


def apply_count_penalties(
    logits_V: Tensor, counts_V: Tensor, frequency: float, presence: float
) -> Tensor:
    """Subtract `frequency * count + presence * (count > 0)`."""
    return logits_V - frequency * counts_V - presence * (counts_V > 0)


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """Keep the k largest; ties with the k-th are kept too."""
    kth = logits_V.topk(min(k, logits_V.shape[-1])).values[..., -1:]
    return logits_V.masked_fill(logits_V < kth, -math.inf)


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens with a mass of at least p; never none."""
    sorted_V, order_V = logits_V.sort(descending=True, stable=True)
    probs_V = sorted_V.softmax(-1)
    mass_before_V = probs_V.cumsum(-1) - probs_V
    dropped_V = mass_before_V >= p
    dropped_V[..., 0] = False
    return logits_V.masked_fill(dropped_V.scatter(-1, order_V, dropped_V), -math.inf)


def keep_min_p(logits_V: Tensor, p: float) -> Tensor:
    """Keep tokens whose probability is at least p times the largest."""
    # in logits: no softmax needed
    limit = logits_V.max(dim=-1, keepdim=True).values + math.log(p)
    return logits_V.masked_fill(logits_V < limit, -math.inf)


# ------------------------------------------------------------------------------ log-probabilities


def measure_tokens(logits_NV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Return the log-probability of one token per row, and of the `num_top` likeliest.

    Args:
        logits_NV: As the model gave them.
        token_ids: N tokens.
        num_top: 0 or more.
    """
    logprobs_NV = logits_NV.float().log_softmax(-1)
    ids_N = torch.tensor(token_ids, dtype=torch.long, device=logits_NV.device)
    own = logprobs_NV.gather(-1, ids_N[:, None])[:, 0].tolist()
    best = logprobs_NV.topk(min(num_top, logprobs_NV.shape[-1]))
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(*top, strict=True)))
        for token, logprob, top in zip(token_ids, own, tops, strict=True)
    ]


# ------------------------------------------------------------------------------------ composition


class Sampler:
    """Chooses the tokens of one sequence; remembers those so far where a penalty needs it."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Tensor,
        vocab_size: int,
        eos_ids: tuple[int, ...] = (),
    ) -> None:
        device = prompt_ids.device
        self.params = params
        self.num_tokens = 0
        self._draw = torch.Generator(device=device)
        if params.seed is None:
            self._draw.seed()
        else:
            self._draw.manual_seed(params.seed)
        self._constraint = params.constraint() if params.constraint else None
        ends = [token for token in {*eos_ids, *params.stop_ids} if token < vocab_size]
        self._ends = torch.tensor(ends, dtype=torch.long, device=device)
        tokens = [token for token in params.logit_bias if token < vocab_size]
        self._bias_ids = torch.tensor(tokens, dtype=torch.long, device=device)
        self._bias = torch.tensor([float(params.logit_bias[t]) for t in tokens], device=device)
        if params.has_penalty:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V[prompt_ids] = True
            self._counts_V = torch.zeros(vocab_size, device=device)

    def next_token(self, logits_V: Tensor) -> Tensor:
        """Return the next token, shape `(1,)`, on the device of the logits."""
        logits_V = self.adjust(logits_V.float())
        if self.params.is_greedy:
            token = logits_V.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(logits_V.softmax(-1), 1, generator=self._draw)
        self.num_tokens += 1
        if self.params.has_penalty:
            self._seen_V[token] = True
            self._counts_V[token] += 1
        if self._constraint is not None:
            self._constraint.accept(int(token))
        return token

    def adjust(self, logits_V: Tensor) -> Tensor:
        """Apply every rule that is on: bias, penalties, grammar, temperature, top-k/p, min-p."""
        params = self.params
        if len(self._bias_ids):
            logits_V = logits_V.index_add(0, self._bias_ids, self._bias)
        if self.num_tokens < params.min_tokens and len(self._ends):
            logits_V = logits_V.index_fill(0, self._ends, -math.inf)
        if params.repetition_penalty != 1:
            logits_V = apply_repetition_penalty(logits_V, self._seen_V, params.repetition_penalty)
        if params.frequency_penalty or params.presence_penalty:
            logits_V = apply_count_penalties(
                logits_V, self._counts_V, params.frequency_penalty, params.presence_penalty
            )
        if self._constraint is not None:
            allowed_V = self._constraint.mask_V().to(logits_V.device)
            logits_V = logits_V.masked_fill(~allowed_V, -math.inf)
        if params.is_greedy:
            return logits_V
        logits_V = logits_V / params.temperature
        if 0 < params.top_k < len(logits_V):
            logits_V = keep_top_k(logits_V, params.top_k)
        if params.top_p < 1:
            logits_V = keep_top_p(logits_V, params.top_p)
        if params.min_p > 0:
            logits_V = keep_min_p(logits_V, params.min_p)
        return logits_V

"""Text from a model: one forward pass over the prompt, then one token at a time from the cache.

The small, readable path: one sequence, any causal LM of transformers, one generation at a time
(the caller locks). Greedy decoding gives the tokens of transformers' `generate`.
"""

import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import Cache, DynamicCache

from minillm.errors import InputError
from minillm.models.fast_decode import make_decode_step
from minillm.models.sampling import Sampler, SamplingParams, TokenLogprob, measure_tokens
from minillm.models.text_stream import TextStream

FinishReason = Literal["stop", "length", "cancelled"]

PromptLogprobs = tuple[TokenLogprob | None, ...]

PIECE_TOKENS = 256
"""A prompt whose tokens are measured is fed in pieces of this size: their logits are large."""

# private-use characters around the number of a content that is encoded apart
_OPEN, _CLOSE = "\ue000", "\ue001"
_SHIELD = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. Only the last one has a reason, and its text may be empty."""

    text: str
    token_ids: tuple[int, ...]
    """All tokens since the last piece, the end-of-text token included."""
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each of `token_ids`, if asked for."""
    prompt_logprobs: PromptLogprobs | None = None
    """In the first piece, if asked for: one for each token of the prompt, None for its first."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer and what it took."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_s: float
    """From the call to the first token."""
    decode_s: float
    """From the first token to the last."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Generator:
    """A model and its tokenizer, ready to answer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._forward = make_decode_step(model)

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(self.model.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Ids from 0 below this one exist."""
        return int(self.model.config.vocab_size)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the generation config's and the tokenizer's."""
        config = self.model.generation_config
        given = config.eos_token_id if config is not None else None
        found = {self.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])}
        return tuple(sorted(int(token) for token in found if token is not None))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the ids of a conversation and the opening of the answer.

        Args:
            messages: Turns as the template reads them.
            options: Variables of the template, e.g. `enable_think=True`, `tools=[…]`.

        Raises:
            InputError: The tokenizer has no chat template, or the template refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template",
                hint="fine-tune it first: `minillm sft`, or complete plain text instead",
            )
        contents: list[str] = []
        try:
            text: Any = self.tokenizer.apply_chat_template(
                [self._shield(message, contents) for message in messages],
                add_generation_prompt=True,
                tokenize=False,
                **options,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as err:
            raise InputError(f"the chat template refuses these messages: {err}") from err
        ids: list[int] = []
        # odd pieces are numbers of shielded contents, see `_shield`
        for number, piece in enumerate(_SHIELD.split(text)):
            is_content = number % 2 == 1
            ids += self.tokenizer(
                contents[int(piece)] if is_content else piece,
                add_special_tokens=False,
                split_special_tokens=is_content,
            )["input_ids"]
        return ids

    def _shield(self, message: Mapping[str, Any], contents: list[str]) -> dict[str, Any]:
        """Take a content that spells a control token out of the text, so that it stays text.

        What a user types must not end a turn or begin another. Ordinary contents pass as they
        are: their ids are those of the template's whole text, as in training.
        """
        content = message.get("content")
        if not isinstance(content, str):
            return dict(message)
        controls = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        # the `<think>` part of an answer is the template's to read
        is_spelled = message.get("role") != "assistant" and any(c in content for c in controls)
        if not is_spelled and _OPEN not in content:
            return dict(message)
        contents.append(content)
        return {**message, "content": f"{_OPEN}{len(contents) - 1}{_CLOSE}"}

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cancel: threading.Event | None = None,
    ) -> Iterator[Delta]:
        """Yield the answer in pieces of certain text; the last one says why it ended.

        Args:
            prompt_ids: What to continue.
            params: How to choose tokens and when to end.
            cancel: Once set, the answer ends before the next token.

        Raises:
            InputError: The prompt is empty, too long or has an id outside the vocabulary. Raised
                by the call, before anything is yielded.
        """
        self._check(prompt_ids, params)
        return self._stream(prompt_ids, params, cancel or threading.Event(), [])

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cancel: threading.Event | None = None,
    ) -> Completion:
        """Return the whole answer.

        Raises:
            InputError: As `stream`.
        """
        self._check(prompt_ids, params)
        times: list[float] = [time.perf_counter()]
        deltas = list(self._stream(prompt_ids, params, cancel or threading.Event(), times))
        tokens = tuple(token for delta in deltas for token in delta.token_ids)
        reason = deltas[-1].finish_reason
        assert reason is not None
        first = times[min(1, len(times) - 1)]
        return Completion(
            text="".join(delta.text for delta in deltas),
            token_ids=tokens,
            finish_reason=reason,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(tokens),
            prefill_s=first - times[0],
            decode_s=times[-1] - first,
            logprobs=None
            if params.logprobs is None
            else tuple(measured for delta in deltas for measured in delta.logprobs or ()),
            prompt_logprobs=deltas[0].prompt_logprobs,
        )

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise InputError("the prompt is empty", hint="give at least one token")
        if len(prompt_ids) + min(1, params.max_tokens) > self.max_context:
            raise InputError(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {self.max_context}",
                hint="shorten the prompt; the answer needs room too",
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.vocab_size:
            raise InputError(
                f"the prompt has token {max(prompt_ids)}, the vocabulary ends at "
                f"{self.vocab_size - 1}",
                hint="use the tokenizer that belongs to the model",
            )

    def _stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        cancel: threading.Event,
        times: list[float],
    ) -> Iterator[Delta]:
        """As `stream`; the time of every token is appended to `times`."""
        limit = min(params.max_tokens, self.max_context - len(prompt_ids))
        ends = {*self.eos_ids, *params.stop_ids}
        text_stream = TextStream(self.tokenizer, params.stop)
        pieces = Pieces(params)
        reason: FinishReason = "length"
        cache = self._begin(prompt_ids, limit)
        ids = torch.tensor(prompt_ids, dtype=torch.long, device=self.model.device)
        sampler = Sampler(params, ids, self.vocab_size, self.eos_ids)
        if params.prompt_logprobs is not None:
            pieces.prompt_logprobs = self._measure(ids, cache, params.prompt_logprobs, cancel)
            ids = ids[-1:]
        for _ in range(limit):
            if cancel.is_set():
                reason = "cancelled"
                break
            ids, measured = self._step(ids, cache, sampler)
            token = int(ids)
            times.append(time.perf_counter())
            pieces.add(token, measured)
            if token in ends:
                reason = "stop"
                break
            text = text_stream.push(token)
            if text_stream.is_stopped:
                yield pieces.take(text, "stop")
                return
            if text:
                yield pieces.take(text, None)
        text = text_stream.finish()
        yield pieces.take(text, "stop" if text_stream.is_stopped else reason)

    def _begin(self, prompt_ids: Sequence[int], limit: int) -> Cache:
        make_cache = getattr(self.model, "make_cache", None)
        if make_cache is None:
            return DynamicCache(config=self.model.config)
        cache: Cache = make_cache(1, len(prompt_ids) + min(limit, 256))
        return cache

    # decorators, not blocks in `_stream`: the mode would leak to the caller at every yield
    @torch.inference_mode()
    def _step(
        self, ids_T: Tensor, cache: Cache, sampler: Sampler
    ) -> tuple[Tensor, TokenLogprob | None]:
        """Feed tokens, return the next one, `(1,)`, and how likely it was, if asked for."""
        logits_BTV = self._forward(
            input_ids=ids_T[None], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        token = sampler.next_token(logits_BTV[0, -1])
        num_top = sampler.params.logprobs
        if num_top is None:
            return token, None
        return token, measure_tokens(logits_BTV[0, -1:], [int(token)], num_top)[0]

    @torch.inference_mode()
    def _measure(
        self, ids_T: Tensor, cache: Cache, num_top: int, cancel: threading.Event
    ) -> PromptLogprobs:
        """Feed all but the last token; return how likely each was after those before it."""
        found: list[TokenLogprob | None] = [None]
        for start in range(0, len(ids_T) - 1, PIECE_TOKENS):
            if cancel.is_set():
                break
            end = min(start + PIECE_TOKENS, len(ids_T) - 1)
            output = self.model(
                input_ids=ids_T[None, start:end], past_key_values=cache, use_cache=True
            )
            found += measure_tokens(output.logits[0], ids_T[start + 1 : end + 1].tolist(), num_top)
        return tuple(found)


class Pieces:
    """Collects what the next Delta carries."""

    def __init__(self, params: SamplingParams) -> None:
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.prompt_logprobs: PromptLogprobs | None = None

    def add(self, token: int, measured: TokenLogprob | None) -> None:
        """Note a token and its log-probability, if that is asked for."""
        self._tokens.append(token)
        if self._logprobs is not None and measured is not None:
            self._logprobs.append(measured)

    def take(self, text: str, reason: FinishReason | None) -> Delta:
        """Return the Delta for all since the last call."""
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        delta = Delta(text, tuple(self._tokens), reason, logprobs, self.prompt_logprobs)
        self.prompt_logprobs = None
        self._tokens.clear()
        if self._logprobs is not None:
            self._logprobs.clear()
        return delta

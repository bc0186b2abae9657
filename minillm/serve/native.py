"""transformers' own `model.generate`, in the shape of our generator.

For comparison: greedy decoding gives the same tokens as `Generator`. Sampling draws from the same
distribution but with other random numbers. `generate` runs in a thread of its own and hands each
token over as it comes.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from minillm.errors import ConfigError
from minillm.models.generator import Delta, Generator
from minillm.models.sampling import SamplingParams

Outbox = queue.Queue[int | BaseException | None]


class TransformersSource(Generator):
    """A Generator whose tokens come from `model.generate`."""

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cancel: threading.Event | None = None,
    ) -> Iterator[Delta]:
        """Yield the answer token by token.

        Raises:
            ConfigError: `params` asks for something that `generate` has no counterpart of.
        """
        _check(params)
        cancel, closed = cancel or threading.Event(), threading.Event()
        outbox: Outbox = queue.Queue()
        thread = threading.Thread(
            target=self._generate,
            args=(list(prompt_ids), params, lambda: cancel.is_set() or closed.is_set(), outbox),
            daemon=True,
        )
        thread.start()
        ends, ids, shown = self._end_ids(), [], ""
        decoder = DecodeStream(skip_special_tokens=True)
        try:
            while (item := outbox.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                ids.append(item)
                text = decoder.step(self.tokenizer.backend_tokenizer, item) or ""
                shown += text
                yield Delta(text, (item,), None)
        finally:
            closed.set()
            thread.join()
        whole = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        reason = "stop" if ids and ids[-1] in ends else "length"
        rest = whole.removeprefix(shown)  # half a character that the limit cut off
        yield Delta(rest, (), "cancelled" if cancel.is_set() else reason)

    def _end_ids(self) -> frozenset[int]:
        given = self.model.generation_config.eos_token_id
        ids = given if isinstance(given, list) else [given, self.tokenizer.eos_token_id]
        return frozenset(index for index in ids if index is not None)

    def _generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        should_stop: Callable[[], bool],
        outbox: Outbox,
    ) -> None:
        """Run `model.generate`; put each token, then None, or what went wrong."""
        try:
            if params.seed is not None:
                torch.manual_seed(params.seed)
            ids = torch.tensor([prompt_ids], device=self.model.device)
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=_translate(params, sorted(self._end_ids()), self.tokenizer),
                stopping_criteria=StoppingCriteriaList([_StopWhen(should_stop)]),
                streamer=_ToQueue(outbox),
            )
            outbox.put(None)
        except BaseException as error:
            outbox.put(error)


class _ToQueue(BaseStreamer):
    """Put each new token id; the first call brings the prompt."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox, self._is_prompt = outbox, True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            for index in value.flatten().tolist():
                self._outbox.put(index)
        self._is_prompt = False

    def end(self) -> None:
        """Do nothing: the caller of `generate` says when it has ended."""


class _StopWhen(StoppingCriteria):
    """Stop when a function says so."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._should_stop(), device=input_ids.device)


def _check(params: SamplingParams) -> None:
    """Refuse what `generate` cannot do as we do it."""
    for name in ("frequency_penalty", "presence_penalty", "logit_bias", "stop"):
        if getattr(params, name):
            raise ConfigError(
                f"`--backend transformers` has no `{name}`", hint="try `--backend generator`"
            )


def _translate(params: SamplingParams, end_ids: list[int], tokenizer: Any) -> GenerationConfig:
    pad = tokenizer.pad_token_id
    values: dict[str, Any] = {
        "max_new_tokens": params.max_tokens,
        "repetition_penalty": params.repetition_penalty,
        "eos_token_id": end_ids or None,
        "pad_token_id": 0 if pad is None else pad,
        "num_beams": 1,
        "do_sample": params.temperature > 0,
    }
    if params.temperature > 0:
        values |= {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        values |= {"min_p": params.min_p or None}
    return GenerationConfig(**values)  # type: ignore[no-untyped-call]

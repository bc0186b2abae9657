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
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from minillm.errors import ConfigError
from minillm.models.generator import Delta, FinishReason, Generator
from minillm.models.sampling import SamplingParams
from minillm.models.text_stream import TextStream

UNKNOWN = (
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "constraint",
)
"""Settings that this source refuses."""

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
        """Yield the answer in pieces of certain text; the last one says why it ended.

        Raises:
            ConfigError: `params` asks for something that `generate` has no counterpart of.
            InputError: As `Generator.stream`.
        """
        self._check(prompt_ids, params)
        for name in UNKNOWN:
            if getattr(params, name) not in (0, None, {}):
                raise ConfigError(
                    f"`--backend transformers` has no `{name}`", hint="try `--backend generator`"
                )
        return self._pieces(list(prompt_ids), params, cancel or threading.Event())

    def _pieces(
        self, prompt_ids: list[int], params: SamplingParams, cancel: threading.Event
    ) -> Iterator[Delta]:
        closed = threading.Event()
        outbox: Outbox = queue.Queue()
        thread = threading.Thread(
            target=self._run,
            args=(prompt_ids, params, lambda: cancel.is_set() or closed.is_set(), outbox),
            daemon=True,
        )
        thread.start()
        text_stream = TextStream(self.tokenizer, params.stop)
        pending: list[int] = []
        ends = {*self.eos_ids, *params.stop_ids}
        reason: FinishReason = "length"
        try:
            while (item := outbox.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                pending.append(item)
                if item in ends:
                    reason = "stop"
                    continue
                text = text_stream.push(item)
                if text_stream.is_stopped:
                    yield Delta(text, tuple(pending), "stop")
                    return
                if text:
                    yield Delta(text, tuple(pending), None)
                    pending.clear()
        finally:
            closed.set()
            thread.join()
        if cancel.is_set() and reason == "length":
            reason = "cancelled"
        text = text_stream.finish()
        yield Delta(text, tuple(pending), "stop" if text_stream.is_stopped else reason)

    def _run(
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
            limit = min(params.max_tokens, self.max_context - len(prompt_ids))
            generate: Any = self.model.generate
            generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._translate(params, limit),
                stopping_criteria=StoppingCriteriaList([_StopWhen(should_stop)]),
                streamer=_ToQueue(outbox),
            )
            outbox.put(None)
        except BaseException as error:
            outbox.put(error)

    def _translate(self, params: SamplingParams, limit: int) -> GenerationConfig:
        pad = self.tokenizer.pad_token_id
        values: dict[str, Any] = {
            "max_new_tokens": limit,
            "repetition_penalty": params.repetition_penalty,
            "eos_token_id": [*self.eos_ids, *params.stop_ids] or None,
            "pad_token_id": 0 if pad is None else pad,
            "num_beams": 1,
            "do_sample": not params.is_greedy,
        }
        if not params.is_greedy:
            values |= {"temperature": params.temperature, "top_k": params.top_k}
            values |= {"top_p": params.top_p, "min_p": params.min_p or None}
        make: Any = GenerationConfig
        config: GenerationConfig = make(**values)
        return config


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
        """Do nothing: `_run` says when it has ended."""


class _StopWhen(StoppingCriteria):
    """Stop when a function says so."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._should_stop(), device=input_ids.device)

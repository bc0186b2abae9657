"""What a conversation is held with when the model is in this process."""

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minillm.errors import ConfigError
from minillm.models.generator import Generator
from minillm.models.sampling import SamplingParams
from minillm.serve.backend import TokenSource
from minillm.serve.chat import Usage
from minillm.serve.engine import Engine
from minillm.serve.memory import EngineSettings, supports_engine
from minillm.serve.native import TransformersSource
from minillm.serve.source import load
from minillm.serve.think import OPEN, TAIL, Part, ThinkSplitter
from minillm.settings import ChatConfig, SamplingConfig


class LocalSpeaker:
    """Messages in, text out, through a source of tokens."""

    def __init__(self, source: TokenSource) -> None:
        """Speak for `source`."""
        self.source = source
        self.max_context = source.max_context

    def close(self) -> None:
        """Do nothing: the model goes with the process."""

    def count(self, messages: Sequence[Mapping[str, str]], *, think: bool) -> int:
        """Return the tokens of a conversation and the opening of the answer."""
        return len(self.source.encode_chat(messages, enable_think=think))

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        settings: SamplingConfig,
        *,
        think: bool,
        cancel: threading.Event,
    ) -> Iterator[Part | Usage]:
        """Yield the parts of one answer, and how many tokens it has so far."""
        prompt_ids = self.source.encode_chat(messages, enable_think=think)
        tail = str(self.source.tokenizer.decode(prompt_ids[-TAIL:], skip_special_tokens=False))
        splitter, num_tokens = ThinkSplitter(inside=tail.rstrip().endswith(OPEN)), 0
        values = dataclasses.asdict(settings)
        room = min(settings.max_tokens, self.max_context - len(prompt_ids))
        params = SamplingParams(**{**values, "max_tokens": room})
        for delta in self.source.stream(prompt_ids, params, cancel=cancel):
            num_tokens += len(delta.token_ids)
            yield Usage(len(prompt_ids), num_tokens)
            yield from splitter.feed(delta.text)
        yield from splitter.flush()


def load_speaker(config: ChatConfig, place: str) -> LocalSpeaker:
    """Load the model at `place`.

    Raises:
        InputError: There is no model, or it is broken.
        ConfigError: The engine cannot run this model.
        SetupError: The device is not there.
    """
    is_plain = config.backend == "transformers" and config.quantize == "none"
    quantize = None if is_plain else config.quantize
    model, tokenizer = load(
        place, device=config.device, precision=config.precision, quantize=quantize
    )
    return LocalSpeaker(make_source(config, model, tokenizer))


def make_source(config: ChatConfig, model: Any, tokenizer: Any) -> TokenSource:
    """Return what makes the tokens.

    Raises:
        ConfigError: The engine cannot run this model.
    """
    if config.backend == "transformers":
        return TransformersSource(model, tokenizer)
    if config.backend == "generator":
        return Generator(model, tokenizer)
    if not supports_engine(model):
        raise ConfigError(
            "`--backend engine` cannot run this model: it has layers that the engine does not know",
            hint="leave `--backend` out",
        )
    return Engine(model, tokenizer, EngineSettings(max_running=1))

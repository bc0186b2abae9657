"""From the tokens of an answer to pieces of text, in a thread of their own.

Decoding and finding stop strings then overlap with the next forward pass.
"""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast

from minillm.models.generator import Delta, FinishReason, Pieces
from minillm.models.sampling import SamplingParams
from minillm.models.text_stream import TextStream
from minillm.serve.choose import Chosen

logger = logging.getLogger("minillm")

Post = Callable[[Delta | BaseException], None]


class AnswerText:
    """The text of one answer; tokens in, deltas out to whoever wants them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        params: SamplingParams,
        post: Post,
        abort: Callable[[Any], None],
    ) -> None:
        """Begin.

        Args:
            tokenizer: The model's.
            params: What was asked for.
            post: Gets the deltas, or an exception.
            abort: Called with `request` when the text ends at a stop string.
        """
        self._stream = TextStream(tokenizer, params.stop)
        self._pieces = Pieces(params)
        self._post, self._abort = post, abort
        self.request: Any = None
        self.is_over = False

    @property
    def prompt_logprobs(self) -> Any:
        """For the first delta."""
        return self._pieces.prompt_logprobs

    @prompt_logprobs.setter
    def prompt_logprobs(self, value: Any) -> None:
        self._pieces.prompt_logprobs = value

    def take(self, item: Chosen | BaseException, reason: FinishReason | None) -> None:
        """Go on with new tokens, or end; after the end nothing happens any more."""
        if self.is_over:
            return
        try:
            if isinstance(item, BaseException):
                self.is_over = True
                self._post(item)
            else:
                self._go_on(item, reason)
        except Exception as error:
            self.is_over = True
            self._abort(self.request)
            self._post(error)

    def _go_on(self, chosen: Chosen, reason: FinishReason | None) -> None:
        for number, token in enumerate(chosen.tokens):
            measured = chosen.logprobs[number] if chosen.logprobs else None
            self._pieces.add(token, measured)
            if chosen.is_end and number == len(chosen.tokens) - 1:
                break  # it is no text
            text = self._stream.push(token)
            if self._stream.is_stopped:
                self._end(text, "stop")
                return
            if text:
                self._post(self._pieces.take(text, None))
        if reason is not None:
            text = self._stream.finish()
            self._end(text, "stop" if self._stream.is_stopped else reason)

    def _end(self, text: str, reason: FinishReason) -> None:
        self.is_over = True
        self._abort(self.request)
        self._post(self._pieces.take(text, reason))


class Outlet:
    """Hands tokens to texts, in their order."""

    def __init__(self, is_threaded: bool) -> None:
        """Start the thread, or work in the caller's."""
        self._queue: queue.SimpleQueue[
            tuple[AnswerText, Chosen | BaseException, FinishReason | None] | None
        ] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if is_threaded:
            self._thread = threading.Thread(target=self._work, name="minillm-text", daemon=True)
            self._thread.start()

    def put(
        self, text: AnswerText, item: Chosen | BaseException, reason: FinishReason | None
    ) -> None:
        """Let a text go on."""
        if self._thread is None:
            text.take(item, reason)
        else:
            self._queue.put((text, item, reason))

    def end(self) -> None:
        """Let the thread end once everything before has been handed on."""
        self._queue.put(None)

    def close(self, timeout_s: float) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            text, item, reason = entry
            try:
                text.take(item, reason)
            except BaseException:
                logger.exception("a piece of text was lost")

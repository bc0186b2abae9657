"""Tokens in, text out as soon as it is certain: whole characters, no part of a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes one answer token by token.

    A character may be spread over several tokens, and a stop string too; text is held back while
    it may become either. Joined, the pieces are the decoded answer without special tokens, without
    an unfinished character at its end, and cut before the first stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._num_decoded = 0
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take a token; return the text that has become certain, often none."""
        self._ids.append(token_id)
        text = self._decoder.step(self._tokenizer, token_id) or ""
        return self._release(text) if text else ""

    def finish(self) -> str:
        """Return what is left when no token follows."""
        if self.is_stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        text = self._release(whole[self._num_decoded :].rstrip(_BROKEN))
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        self._num_decoded += len(text)
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = self._longest_start_of_a_stop()
        text, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return text

    def _longest_start_of_a_stop(self) -> int:
        """Return how many last characters held may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0

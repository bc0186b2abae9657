"""Log-probabilities in the two shapes of the OpenAI API."""

from collections.abc import Callable, Sequence
from typing import Any

from minillm.models.sampling import TokenLogprob

FLOOR = -9999.0
"""JSON has no infinity; this is OpenAI's stand-in."""

TokenBytes = Callable[[int], bytes]


def token_text(data: bytes) -> str:
    """Return a token's text; part of a character is written as bytes, so that none collide."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(found: Sequence[TokenLogprob], bytes_of: TokenBytes) -> dict[str, Any]:
    """Return `choices[].logprobs` of a chat completion."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = bytes_of(token)
        return {
            "token": token_text(data),
            "logprob": max(logprob, FLOOR),
            "bytes": list(data),
        }

    content = [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Builds `choices[].logprobs` of plain completions; keeps count of the text's characters."""

    def __init__(self, bytes_of: TokenBytes, offset: int = 0) -> None:
        """Begin at character `offset` of the prompt and answer together."""
        self._bytes_of, self._offset = bytes_of, offset

    def take(
        self,
        token_ids: Sequence[int],
        found: Sequence[TokenLogprob | None],
    ) -> dict[str, Any]:
        """Return the entry for the next tokens; the first of a prompt has no log-probability."""
        out: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, one in zip(token_ids, found, strict=True):
            data = self._bytes_of(token)
            out["tokens"].append(token_text(data))
            out["text_offset"].append(self._offset)
            # a character counts where its first byte stands
            self._offset += sum(byte & 0xC0 != 0x80 for byte in data)
            out["token_logprobs"].append(None if one is None else max(one.logprob, FLOOR))
            out["top_logprobs"].append(None if one is None else self._top(one))
        return out

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        pairs = [*one.top]
        if pairs and one.token_id not in {token for token, _ in pairs}:
            pairs.append((one.token_id, one.logprob))
        top: dict[str, float] = {}
        for token, logprob in pairs:
            top.setdefault(token_text(self._bytes_of(token)), max(logprob, FLOOR))
        return top


class Visible:
    """Tells which tokens belong to the text that a client sees: none of a stop string or end."""

    def __init__(self, bytes_of: TokenBytes) -> None:
        self._bytes_of = bytes_of
        self._shown = self._start = 0

    def count(self, text: str, token_ids: Sequence[int], *, is_stopped: bool) -> int:
        """Return how many of `token_ids` begin inside the text so far."""
        self._shown += len(text.encode())
        for number, token in enumerate(token_ids):
            if is_stopped and self._start >= self._shown:
                return number
            self._start += len(self._bytes_of(token))
        return len(token_ids)

"""The text side of a backend: conversations and plain text to ids, ids to text.

`Worker` and the engine share it; what differs between them is the queue.
"""

import functools
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from minillm.serve.backend import TokenSource

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TextSide:
    """What a backend knows of text. Callable from any thread."""

    def __init__(self, generator: TokenSource) -> None:
        """Read tokenizer, template and limits of `generator`."""
        self._generator = generator
        # the switch between text and control tokens is a state of the tokenizer
        self._encoding = threading.Lock()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self._generator.tokenizer

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._generator.max_context

    @property
    def vocab_size(self) -> int:
        """Ids from 0 below this one exist."""
        return self._generator.vocab_size

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._generator.eos_ids

    @property
    def template(self) -> str:
        """The chat template's text; empty if there is none."""
        return str(getattr(self.tokenizer, "chat_template", None) or "")

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the ids of a conversation and the opening of the answer.

        Args:
            messages: Turns as the template reads them.
            options: Variables of the template, e.g. `enable_think`, `tools`.

        Raises:
            InputError: There is no template, or it refuses the messages.
        """
        with self._encoding:
            return self._generator.encode_chat(messages, **(options or {}))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of plain text."""
        with self._encoding:
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return [int(index) for index in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, which may be part of a character."""
        if token_id not in self._token_bytes:
            self._token_bytes[token_id] = self._find_bytes(token_id)
        return self._token_bytes[token_id]

    def max_prompt_bytes(self) -> int:
        """Return a size in UTF-8 bytes above which no prompt can fit the context."""
        return self._longest_token_bytes * self.max_context

    @functools.cached_property
    def _longest_token_bytes(self) -> int:
        return max(len(token.encode()) for token in self.tokenizer.get_vocab())

    @functools.cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        return {}

    def _find_bytes(self, token_id: int) -> bytes:
        text = self.decode([token_id])
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        token = self.tokenizer.convert_ids_to_tokens(token_id) or ""
        if found := _BYTE_TOKEN.fullmatch(token):  # byte fallback of SentencePiece
            return bytes([int(found[1], 16)])
        alphabet = _byte_alphabet()
        if all(char in alphabet for char in token):
            return bytes(alphabet[char] for char in token)
        return text.encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE (GPT-2); printable ones stay."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}

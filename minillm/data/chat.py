"""Messages to token ids and labels, the ids the chat template gives, learned where it says.

The template is written out once more here, piece by piece, so that only the markers become
control tokens: `<|im_end|>` typed by a user stays ordinary characters, which rendering to one
string and tokenizing that cannot promise. The price: a second reading of the template, so an
encoder first checks that both give the same ids and refuses a tokenizer with another template.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from minillm.data.tokenizer import ADDED, plain_encoder
from minillm.data.windows import IGNORE
from minillm.errors import InputError

_START, _END, _THINK, _END_THINK = ADDED
_ANSWER, _NEWLINE = "assistant\n", "\n"
_SURROGATE = re.compile("[\ud800-\udfff]")
ROLES = ("system", "user", "assistant")

_PROBE: list[dict[str, str]] = [
    {"role": "system", "content": "Be kind. 请简短。"},
    {"role": "user", "content": "Hi \n 你好"},
    {"role": "assistant", "content": " Hello! 你好。\n"},
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": "<think>one\nmore</think>\n\n2"},
]


class BadDialogue(InputError):  # noqa: N818 (errors here are named by what is wrong)
    """Something that is no dialogue; `reason` in few words, to count by."""

    def __init__(self, message: str, *, hint: str, reason: str) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


EncodeTexts = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Texts to ids, for text in which nothing is a control token."""

EMPTY = "empty message"
"""The reason that is common in gathered sets, and no sign of a wrong format."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A dialogue of L tokens; `labels` are the ids to be learned, IGNORE elsewhere."""

    token_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def extend(self, ids: Sequence[int], *, learn: bool) -> None:
        """Append tokens, learned or not."""
        self.token_ids.extend(ids)
        self.labels.extend(ids if learn else [IGNORE] * len(ids))


def check_messages(messages: object, where: str) -> list[dict[str, str]]:
    """Return the messages of a dialogue if they are one.

    A dialogue is at most one system message, then user and assistant in turn, ending with the
    assistant; each with some content.

    Args:
        messages: What a file holds under `messages`.
        where: What to name in an error, e.g. "`a.jsonl` line 3".

    Raises:
        BadDialogue: It is not such a list.
    """
    if not isinstance(messages, list) or not messages:
        raise BadDialogue(
            f"{where}: `messages` must be a list of messages",
            hint='write `{"messages": [{"role": "user", "content": …}, …]}` on each line',
            reason="no messages",
        )
    for index, message in enumerate(messages):
        _check_message(message, f"{where}, message {index + 1}")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for index, message in enumerate(turns):
        wanted = ("user", "assistant")[index % 2]
        if message["role"] != wanted:
            raise BadDialogue(
                f"{where}: turn {index + 1} is by `{message['role']}`, expected `{wanted}`",
                hint="let user and assistant speak in turn, after at most one system message",
                reason="out of turn",
            )
    if not turns or turns[-1]["role"] != "assistant":
        raise BadDialogue(
            f"{where}: the last message is not by `assistant`, so nothing is learned from it",
            hint="end each dialogue with an answer, or remove the line",
            reason="no answer at the end",
        )
    return messages


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict):
        raise BadDialogue(
            f"{where}: expected an object, found {type(message).__name__}",
            hint='a message is `{"role": "user", "content": "…"}`',
            reason="no message",
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadDialogue(
            f"{where}: unknown role `{role}`",
            hint=f"the roles are {', '.join(ROLES)}",
            reason="unknown role",
        )
    if not isinstance(content, str) or not content.strip():
        raise BadDialogue(
            f"{where}: `content` of the {role} is empty or no text",
            hint="write its text, or remove the line",
            reason=EMPTY if content is None or isinstance(content, str) else "no text",
        )
    if not content.isascii() and _SURROGATE.search(content):
        raise BadDialogue(
            f"{where}: `content` holds half a surrogate pair, which no UTF-8 can hold",
            hint="remove the line, or write the character whole",
            reason="half a surrogate pair",
        )


def _slowly(tokenizer: Tokenizer) -> EncodeTexts:
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]


class ChatEncoder:
    """Encodes dialogues for one tokenizer.

    Args:
        tokenizer: One with the chat tokens and our ChatML template.
        encode_texts: Does the same as the tokenizer with text, in less time.

    Raises:
        InputError: It lacks the tokens, or its template renders dialogues in another way.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, encode_texts: EncodeTexts | None = None
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        name = tokenizer.name_or_path
        missing = [token for token in ADDED if token not in vocabulary]
        if missing:
            raise InputError(
                f"the tokenizer `{name}` has no {', '.join(f'`{token}`' for token in missing)}",
                hint="use one that has: `--tokenizer bundled`",
            )
        self._start, self._end, self._think, self._end_think = (vocabulary[t] for t in ADDED)
        self._texts_to_ids = encode_texts or _slowly(plain_encoder(tokenizer))
        wanted = tokenizer.apply_chat_template(_PROBE, tokenize=True, return_dict=False)
        if wanted != self.encode(_PROBE).token_ids:
            raise InputError(
                f"the chat template of the tokenizer `{name}` is not the ChatML of minillm: a "
                "model would be asked in a form that it was not trained on",
                hint="use one that has it: `--tokenizer bundled`",
            )

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> Encoded:
        """Return the tokens of a dialogue; learned are the answers, each with its `<|im_end|>`.

        Args:
            messages: As `check_messages` returns them. Thoughts, in `reasoning_content` or before
                `</think>`, are kept in the last answer only, as the template does.
        """
        return self.encode_many([messages])[0]

    def encode_many(self, dialogues: Sequence[Sequence[Mapping[str, Any]]]) -> list[Encoded]:
        """Return the tokens of several dialogues, whose texts go to the tokenizer in one call."""
        all_pieces = [self._pieces(messages) for messages in dialogues]
        texts = {text: 0 for pieces in all_pieces for text, _ in pieces if isinstance(text, str)}
        ids = dict(zip(texts, self._texts_to_ids(list(texts)), strict=True))
        encoded = []
        for pieces in all_pieces:
            done = Encoded()
            for piece, learn in pieces:
                done.extend(ids[piece] if isinstance(piece, str) else [piece], learn=learn)
            encoded.append(done)
        return encoded

    def _pieces(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str | int, bool]]:
        """Return control tokens and texts in which nothing is one, and whether to learn them."""
        pieces: list[tuple[str | int, bool]] = []
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            pieces.append((self._start, False))
            if role == "assistant":
                pieces.append((_ANSWER, False))
                pieces += self._answer(message, is_last=index == len(messages) - 1)
            else:
                pieces += [(f"{role}\n{content}", False), (self._end, False)]
            pieces.append((_NEWLINE, False))
        return pieces

    def _answer(self, message: Mapping[str, Any], *, is_last: bool) -> list[tuple[str | int, bool]]:
        content, thought = message["content"], message.get("reasoning_content")
        if not isinstance(thought, str):
            thought = ""
        if _END_THINK in content:
            before, _, content = content.partition(_END_THINK)
            thought = thought or before.split(_THINK)[-1]
        thought, content = thought.strip(), content.strip()
        if not thought or not is_last:
            return [(content, True), (self._end, True)]
        pieces: list[str | int] = [self._think, _NEWLINE, f"{thought}\n", self._end_think]
        pieces += [f"\n\n{content}", self._end]
        return [(piece, True) for piece in pieces]

"""Messages to token ids and labels, the ids the chat template gives, learned where it says.

The template is written out once more here, piece by piece, so that only the markers become
control tokens: `<|im_end|>` typed by a user stays ordinary characters, which rendering to one
string and tokenizing that cannot promise. The price: a second reading of the template, so an
encoder first checks that both give the same ids and refuses a tokenizer with another template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from minillm.data.tokenizer import ADDED, plain_encoder
from minillm.data.windows import IGNORE
from minillm.errors import InputError

_START, _END, _THINK, _END_THINK = ADDED
ROLES = ("system", "user", "assistant")

_PROBE: list[dict[str, str]] = [
    {"role": "system", "content": "Be kind. 请简短。"},
    {"role": "user", "content": "Hi \n 你好"},
    {"role": "assistant", "content": " Hello! 你好。\n"},
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": "<think>one\nmore</think>\n\n2"},
]


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
        InputError: It is not such a list.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f"{where}: `messages` must be a list of messages",
            hint='write `{"messages": [{"role": "user", "content": …}, …]}` on each line',
        )
    for index, message in enumerate(messages):
        _check_message(message, f"{where}, message {index + 1}")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for index, message in enumerate(turns):
        wanted = ("user", "assistant")[index % 2]
        if message["role"] != wanted:
            raise InputError(
                f"{where}: turn {index + 1} is by `{message['role']}`, expected `{wanted}`",
                hint="let user and assistant speak in turn, after at most one system message",
            )
    if not turns or turns[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: the last message is not by `assistant`, so nothing is learned from it",
            hint="end each dialogue with an answer, or remove the line",
        )
    return messages


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict):
        raise InputError(
            f"{where}: expected an object, found {type(message).__name__}",
            hint='a message is `{"role": "user", "content": "…"}`',
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(
            f"{where}: unknown role `{role}`", hint=f"the roles are {', '.join(ROLES)}"
        )
    if not isinstance(content, str) or not content.strip():
        raise InputError(
            f"{where}: `content` of the {role} is empty or no text",
            hint="write its text, or remove the line",
        )
    if any("\ud800" <= char <= "\udfff" for char in content):
        raise InputError(
            f"{where}: `content` holds half a surrogate pair, which no UTF-8 can hold",
            hint="remove the line, or write the character whole",
        )


class ChatEncoder:
    """Encodes dialogues for one tokenizer.

    Args:
        tokenizer: One with the chat tokens and our ChatML template.

    Raises:
        InputError: It lacks the tokens, or its template renders dialogues in another way.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocabulary = tokenizer.get_vocab()
        name = tokenizer.name_or_path
        missing = [token for token in ADDED if token not in vocabulary]
        if missing:
            raise InputError(
                f"the tokenizer `{name}` has no {', '.join(f'`{token}`' for token in missing)}",
                hint="use one that has: `--tokenizer bundled`",
            )
        self._start, self._end, self._think, self._end_think = (vocabulary[t] for t in ADDED)
        self._plain = plain_encoder(tokenizer)
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
        done = Encoded()
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            done.extend([self._start], learn=False)
            if role == "assistant":
                done.extend(self._text("assistant\n"), learn=False)
                self._answer(done, message, is_last=index == len(messages) - 1)
            else:
                done.extend([*self._text(f"{role}\n{content}"), self._end], learn=False)
            done.extend(self._text("\n"), learn=False)
        return done

    def _answer(self, done: Encoded, message: Mapping[str, Any], *, is_last: bool) -> None:
        content, thought = message["content"], message.get("reasoning_content")
        if not isinstance(thought, str):
            thought = ""
        if _END_THINK in content:
            before, _, content = content.partition(_END_THINK)
            thought = thought or before.split(_THINK)[-1]
        thought, content = thought.strip(), content.strip()
        if thought and is_last:
            done.extend([self._think, *self._text("\n")], learn=True)
            done.extend([*self._text(f"{thought}\n"), self._end_think], learn=True)
            content = f"\n\n{content}"
        done.extend([*self._text(content), self._end], learn=True)

    def _text(self, text: str) -> list[int]:
        """Return the ids of text in which nothing is a control token."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

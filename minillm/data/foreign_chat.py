"""Messages to token ids and labels by the chat template of an imported model.

`chat.ChatEncoder` knows the one template of minillm. Here a template is rendered with marks in
place of the messages, so that what is between the marks is the template's own: its special tokens
become control tokens, those that somebody typed into a message stay ordinary characters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from minillm.data.chat import ChatEncoder, Encoded, EncodeTexts
from minillm.data.tokenizer import plain_encoder
from minillm.errors import InputError

_MARK = re.compile("\ue000(\\d+)\ue001")
_PROBE: list[dict[str, str]] = [
    {"role": "user", "content": "Hi \n 你好"},
    {"role": "assistant", "content": "Hello! 你好。"},
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": "2"},
]


def make_encoder(
    tokenizer: PreTrainedTokenizerFast, encode_texts: EncodeTexts | None = None
) -> "ChatEncoder | TemplateEncoder":
    """Return the encoder for dialogues that suits a tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.
        encode_texts: A faster way to encode text, for the template of minillm.

    Raises:
        InputError: It has no chat template, or one that training cannot follow.
    """
    try:
        return ChatEncoder(tokenizer, encode_texts)
    except (InputError, TemplateError):
        if tokenizer.chat_template is None:
            raise
    return TemplateEncoder(tokenizer)


class TemplateEncoder:
    """Encodes dialogues by the template of the tokenizer; thoughts are left out.

    Args:
        tokenizer: One whose template puts a special token after each answer.

    Raises:
        InputError: The template does not, or changes what it is given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._plain = plain_encoder(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._control = {token.content: index for index, token in added if token.special}
        names = sorted(self._control, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)()")
        self._check()

    def _check(self) -> None:
        done = self.encode(_PROBE)
        whole = self._render(_PROBE, tokenize=True, return_dict=False)
        asked = self._render(
            _PROBE[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        start = len(asked)
        is_start = [label >= 0 for label in done.labels[start - 1 : start + 1]] == [False, True]
        if done.token_ids != whole or whole[:start] != asked or not is_start:
            raise self._refusal("gives other tokens than its pieces do")

    def _refusal(self, why: str) -> InputError:
        return InputError(
            f"the chat template of the tokenizer `{self._tokenizer.name_or_path}` {why}, so the "
            "answers in it cannot be told apart",
            hint="use a tokenizer with ChatML: `--tokenizer bundled`",
        )

    def _render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template([dict(m) for m in messages], **options)
        except Exception as err:  # templates raise whatever they like
            raise self._refusal(f"fails ({err})") from err

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> Encoded:
        """Return the tokens of a dialogue; learned are the answers, each up to its special token.

        Args:
            messages: As `chat.check_messages` returns them.
        """
        texts = [_text(message) for message in messages]
        marked = [
            {"role": message["role"], "content": f"\ue000{index}\ue001"}
            for index, message in enumerate(messages)
        ]
        done, is_answer = Encoded(), False
        for piece in self._special.split(self._render(marked, tokenize=False)):
            if piece in self._control:
                done.extend([self._control[piece]], learn=is_answer)
                is_answer = False
                continue
            start = self._find_answer(piece, messages)
            if start is not None:
                done.extend(self._ids(piece[:start], texts), learn=False)
                piece, is_answer = piece[start:], True
            done.extend(self._ids(piece, texts), learn=is_answer)
        if is_answer:
            raise self._refusal("has no special token after an answer")
        return done

    def _find_answer(self, piece: str, messages: Sequence[Mapping[str, Any]]) -> int | None:
        """Return where an answer starts in text between special tokens."""
        marks = list(_MARK.finditer(piece))
        for mark in marks:
            if messages[int(mark[1])]["role"] == "assistant":
                if mark is not marks[-1]:
                    raise self._refusal("has no special token after an answer")
                return mark.start()
        return None

    def _ids(self, piece: str, texts: Sequence[str]) -> list[int]:
        text = _MARK.sub(lambda mark: texts[int(mark[1])], piece)
        return list(self._plain.encode(text, add_special_tokens=False).ids)


def _text(message: Mapping[str, Any]) -> str:
    content = str(message["content"])
    if message["role"] != "assistant":
        return content
    return content.rpartition("</think>")[2].strip()

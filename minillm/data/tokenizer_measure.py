"""How well a tokenizer fits some texts: counts of tokens, by language and by source."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from minillm.data.text_sample import Text

CHINESE, JAPANESE, KOREAN = "Chinese", "Japanese", "Korean"
LATIN, OTHER, NO_LETTERS = "English and other Latin", "other scripts", "no letters"

_BATCH = 256
_HAN, _KANA, _HANGUL = "\u3400-\u9fff\uf900-\ufaff", "\u3040-\u30ff", "\uac00-\ud7af"
_HAN_LETTER, _KANA_LETTER = re.compile(f"[{_HAN}]"), re.compile(f"[{_KANA}]")
_HANGUL_LETTER = re.compile(f"[{_HANGUL}]")
_LATIN_LETTER, _LETTER = re.compile(r"[A-Za-z\u00c0-\u024f]"), re.compile(r"[^\W\d_]")
_WORD = re.compile(rf"[{_HAN}{_KANA}]|[^\W{_HAN}{_KANA}]+")


@dataclass(slots=True)
class Fit:
    """Sums over some texts."""

    text_bytes: int = 0
    characters: int = 0
    words: int = 0
    """Runs of letters and digits; of Chinese and Japanese each letter is one."""
    tokens: int = 0

    @property
    def bytes_per_token(self) -> float:
        """Compression: UTF-8 bytes per token; more is better."""
        return self.text_bytes / max(1, self.tokens)

    @property
    def fertility(self) -> float:
        """Tokens per word; less is better."""
        return self.tokens / max(1, self.words)

    @property
    def tokens_per_character(self) -> float:
        """Tokens per character; less is better."""
        return self.tokens / max(1, self.characters)

    def add(self, text: Text, words: int, tokens: int) -> None:
        """Count a text."""
        self.text_bytes += text.size
        self.characters += len(text.text)
        self.words += words
        self.tokens += tokens


@dataclass(slots=True)
class Fits:
    """One tokenizer on some texts."""

    name: str
    vocab_size: int
    total: Fit = field(default_factory=Fit)
    by_language: dict[str, Fit] = field(default_factory=dict)
    by_source: dict[str, Fit] = field(default_factory=dict)


def measure(name: str, vocab_size: int, encoder: Tokenizer, texts: Sequence[Text]) -> Fits:
    """Encode `texts` and add up; the groups come by size, the largest first."""
    fits = Fits(name, vocab_size)
    for text, ids in _encode(encoder, texts):
        words = len(_WORD.findall(text.text))
        groups = (
            fits.total,
            fits.by_language.setdefault(language_of(text.text), Fit()),
            fits.by_source.setdefault(text.source, Fit()),
        )
        for fit in groups:
            fit.add(text, words, len(ids))
    fits.by_language = _by_size(fits.by_language)
    fits.by_source = _by_size(fits.by_source)
    return fits


def count_tokens(
    encoder: Tokenizer, texts: Sequence[Text], num_tokens: int
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Yield how often each token appears in some texts at a time, and their bytes."""
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        ids = [np.asarray(found, np.int64) for _, found in _encode(encoder, batch)]
        size = sum(text.size for text in batch)
        yield np.bincount(np.concatenate(ids), minlength=num_tokens), size


def language_of(text: str) -> str:
    """Name the script that most of a text is in.

    >>> language_of("Comment ça va 好"), language_of("你好 world")
    ('English and other Latin', 'Chinese')
    """
    text = text[:4096]
    letters = len(_LETTER.findall(text))
    if not letters:
        return NO_LETTERS
    han, kana = len(_HAN_LETTER.findall(text)), len(_KANA_LETTER.findall(text))
    # a Chinese letter carries about as much as four Latin ones
    shares = {
        CHINESE: 4 * han if kana * 8 < han else 0,
        JAPANESE: 4 * (han + kana) if kana * 8 >= han and kana else 0,
        KOREAN: 3 * len(_HANGUL_LETTER.findall(text)),
        LATIN: len(_LATIN_LETTER.findall(text)),
    }
    shares[OTHER] = letters - han - kana - shares[KOREAN] // 3 - shares[LATIN]
    return max(shares, key=lambda name: shares[name])


def _encode(encoder: Tokenizer, texts: Sequence[Text]) -> Iterator[tuple[Text, list[int]]]:
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        found = encoder.encode_batch_fast([text.text for text in batch])
        for text, encoding in zip(batch, found, strict=True):
            yield text, encoding.ids


def _by_size(groups: dict[str, Fit]) -> dict[str, Fit]:
    return dict(sorted(groups.items(), key=lambda item: (-item[1].text_bytes, item[0])))

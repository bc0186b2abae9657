"""Train a byte-level BPE tokenizer on documents, with Qwen2's pre-tokenizer.

Qwen2's pattern takes a whole run of Chinese, up to the next punctuation mark, for one word, and
such words are nearly all different. The price is memory: about 50 bytes per byte of text, which
`--max-bytes` bounds. Cutting the runs for training was tried and bought nothing
(docs/tokenizer.md).

The same text gives the same `tokenizer.json`, byte for byte.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer

from minillm import paths
from minillm.data.documents import find_files, read_batches, total_bytes
from minillm.data.tokenizer import ADDED, PAD, fingerprint, save_tokenizer, wrap
from minillm.errors import InputError
from minillm.files import atomic_folder
from minillm.log import Progress, Silent, task
from minillm.settings import TrainTokenizerConfig

# Behaviour of Qwen2's pre-tokenizer: contractions, letters with one character before them, single
# digits, punctuation with the line ends after it, line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# 8 Chinese characters. Without it legal and help-text formulas become tokens of a whole clause;
# with it, 0.1 % fewer bytes per token on modern Chinese and no loss elsewhere (docs/tokenizer.md).
_MAX_TOKEN_BYTES = 24

_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
_FILES |= {"special_tokens_map.json", "added_tokens.json"}  # older transformers write these too

_NUM_FIRST = 1 + 256  # `<|endoftext|>` and the bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerReport:
    """What came out."""

    folder: Path
    num_tokens: int
    """With the added chat tokens."""
    num_documents: int
    text_bytes: int
    fingerprint: str
    seconds: float


def train_tokenizer(cfg: TrainTokenizerConfig, progress: Progress | None = None) -> TokenizerReport:
    """Train a tokenizer and write its folder.

    Raises:
        InputError: The text is missing, unreadable, or too little for the vocabulary; or
            `cfg.out` holds files of someone else.
    """
    progress = progress or Silent()
    began = time.monotonic()
    files = find_files(_find_data(cfg.data))
    with atomic_folder(cfg.out, ours=lambda entry: entry.name in _FILES) as folder:
        counted = _Counted(files, cfg, progress)
        try:
            backend = train_backend(counted.batches(), cfg.vocab_size)
        finally:
            if counted.is_read:
                progress.finish()
        save_tokenizer(wrap(backend), folder)
        return TokenizerReport(
            folder=cfg.out,
            num_tokens=backend.get_vocab_size(),
            num_documents=counted.num_documents,
            text_bytes=counted.text_bytes,
            fingerprint=fingerprint(folder),
            seconds=time.monotonic() - began,
        )


def train_backend(batches: Iterator[list[str]], vocab_size: int) -> Tokenizer:
    """Train on batches of texts.

    Args:
        batches: The texts; read once.
        vocab_size: Base tokens: `<|endoftext|>`, 256 bytes, merges. The chat tokens come after.

    Raises:
        InputError: The text does not hold enough repeated pairs for `vocab_size`.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = _build_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once saves nothing
        max_token_length=_MAX_TOKEN_BYTES,
        special_tokens=[AddedToken(PAD, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(batches, trainer)
    found = backend.get_vocab_size()
    if found < vocab_size:
        raise InputError(
            f"the text is too little for `--vocab-size {vocab_size}`: it gives {found} tokens, "
            f"{found - _NUM_FIRST} of them merges of pairs that appear at least twice",
            hint=f"use more text, or `--vocab-size {found}`",
        )
    for token in ADDED:
        # `<think>` is text that a reader may see, so decoding keeps it; the turn marks are not
        control = token.startswith("<|")
        backend.add_tokens([AddedToken(token, special=control, normalized=False)])
    return backend


def _build_pre_tokenizer() -> PreTokenizer:
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


def _find_data(given: Path) -> Path:
    if given == paths.SAMPLE and not given.exists():
        raise InputError(
            f"no text to train on: `{given}` does not exist",
            hint="make it with `minillm prepare-tokenizer --data bundled`, or name your own text: "
            "`--data FOLDER`",
        )
    return paths.resolve(given, paths.BUNDLED_CORPUS)


class _Counted:
    """The text to train on, counted as it passes, spread evenly over the corpus if bounded."""

    def __init__(self, files: list[Path], cfg: TrainTokenizerConfig, progress: Progress) -> None:
        self._files, self._column, self._progress = files, cfg.text_column, progress
        self._max_bytes = cfg.max_bytes
        self.num_documents = self.text_bytes = 0
        self.is_read = False

    def batches(self) -> Iterator[list[str]]:
        """Yield the text; when it ends, the long silent part begins, as a task of its own."""
        share, budget = 1.0, float("inf")
        if self._max_bytes:
            share, budget = self._measure(), self._max_bytes
        seen_bytes = 0
        for texts in self._read("read text"):
            kept = []
            for text in texts:
                size = len(text.encode())
                behind = self.text_bytes <= share * seen_bytes
                seen_bytes += size
                if share == 1 or (behind and self.text_bytes + size <= budget):
                    kept.append(text)
                    self.text_bytes += size
            self.num_documents += len(kept)
            yield kept
        self._progress.start("learn merges", None, "tokens")
        self.is_read = True

    def _measure(self) -> float:
        """Return the share of the text that fits the bound, 1 if all of it does."""
        total = sum(len(text.encode()) for texts in self._read("measure text") for text in texts)
        return min(1.0, self._max_bytes / total)

    def _read(self, what: str) -> Iterator[list[str]]:
        with task(self._progress, what, total_bytes(self._files), "bytes"):
            for batch in read_batches(self._files, self._column):
                yield batch.texts
                self._progress.advance(batch.read_bytes)

"""Train a byte-level BPE tokenizer on documents, with Qwen2's pre-tokenizer.

Qwen2's pattern takes a whole run of Chinese, up to the next punctuation mark, for one word, and
such words are nearly all different. The price is memory: about 70 bytes per byte of text, which
`--max-bytes` bounds by a random sample of the whole corpus. Cutting the runs for training was
tried and bought nothing (docs/tokenizer.md).

The same text and seed give the same folder, byte for byte.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer

from minillm import paths
from minillm.data import tokenizer_report as pages
from minillm.data.text_sample import HELD_OUT_BYTES, Text, TextSample, read_sample
from minillm.data.tokenizer import (
    ADDED,
    PAD,
    fingerprint,
    load_tokenizer,
    plain_encoder,
    resolve_tokenizer,
    save_tokenizer,
    token_byte_lengths,
    wrap,
)
from minillm.data.tokenizer_measure import Fits, count_tokens, measure
from minillm.errors import InputError
from minillm.files import atomic_folder
from minillm.log import Progress, Silent, task
from minillm.settings import TrainTokenizerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
_FILES |= {pages.TEXT, pages.CHART}

_NUM_FIRST = 1 + 256  # `<|endoftext|>` and the bytes
_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerReport:
    """What came out."""

    folder: Path
    num_tokens: int
    """With the added chat tokens."""
    num_documents: int
    """In the corpus."""
    corpus_bytes: int
    text_bytes: int
    """Trained on."""
    num_unused: int
    """Merged tokens that never appear in it."""
    is_held_out: bool
    """Whether `fits` are of text that was not trained on."""
    fits: tuple[Fits, ...]
    """The new tokenizer, then those it is compared with."""
    fingerprint: str
    seconds: float


def train_tokenizer(cfg: TrainTokenizerConfig, progress: Progress | None = None) -> TokenizerReport:
    """Train a tokenizer and write its folder, with a report.

    Raises:
        InputError: The text is missing, unreadable, or too little for the vocabulary; a tokenizer
            to compare with is none; or `cfg.out` holds files of someone else.
    """
    progress = progress or Silent()
    began = time.monotonic()
    place = _find_data(cfg.data)
    others = _load_others(cfg)
    with atomic_folder(cfg.out, ours=lambda entry: entry.name in _FILES) as folder:
        sample = read_sample(place, cfg.text_column, cfg.max_bytes, cfg.seed, progress)
        with task(progress, "learn merges", None, "tokens"):
            backend = _beside(
                lambda: train_backend(_batches(sample.chosen), cfg.vocab_size), progress
            )
        tokenizer = wrap(backend)
        save_tokenizer(tokenizer, folder)
        vocabulary = _describe(tokenizer, sample.chosen, progress)
        texts = sample.held_out or _spread(sample)
        fits = tuple(
            measure(name, len(one), plain_encoder(one), texts)
            for name, one in [("this one", tokenizer), *others]
        )
        facts = pages.ReportFacts(
            num_documents=sample.num_documents,
            corpus_bytes=sample.corpus_bytes,
            text_bytes=sample.text_bytes,
            seed=cfg.seed,
            is_held_out=bool(sample.held_out),
            measured_bytes=sum(text.size for text in texts),
        )
        pages.write_tokenizer_report(folder, facts, vocabulary, fits)
        return TokenizerReport(
            folder=cfg.out,
            num_tokens=len(tokenizer),
            num_documents=sample.num_documents,
            corpus_bytes=sample.corpus_bytes,
            text_bytes=sample.text_bytes,
            num_unused=len(vocabulary.unused),
            is_held_out=facts.is_held_out,
            fits=fits,
            fingerprint=fingerprint(folder),
            seconds=time.monotonic() - began,
        )


def _beside(work: Callable[[], Tokenizer], progress: Progress) -> Tokenizer:
    """Run `work` in a thread: a trainer that is deep in Rust would not let Ctrl-C through."""
    done: list[Tokenizer | BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as err:
            done.append(err)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        progress.advance(0)
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


def _load_others(cfg: TrainTokenizerConfig) -> list[tuple[str, "PreTrainedTokenizerFast"]]:
    """Load the bundled tokenizer and those named by `--compare`, before anything is trained."""
    bundled = Path(paths.BUNDLED)
    places = [bundled, *(place for place in cfg.compare if place != bundled)]
    return [(place.name, load_tokenizer(resolve_tokenizer(place))) for place in places]


def _describe(
    tokenizer: "PreTrainedTokenizerFast", texts: list[Text], progress: Progress
) -> pages.Vocabulary:
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    total = sum(text.size for text in texts)
    with task(progress, "count tokens", total, "bytes"):
        for found, size in count_tokens(plain_encoder(tokenizer), texts, len(counts)):
            counts += found
            progress.advance(size)
    backend = tokenizer.backend_tokenizer
    vocab = tokenizer.get_vocab()
    is_step = np.zeros(len(counts), dtype=np.bool_)
    for pair in json.loads(backend.to_str())["model"]["merges"]:
        is_step[[vocab[part] for part in pair]] = True
    return pages.Vocabulary(
        texts=[backend.decode([index], skip_special_tokens=False) for index in range(len(counts))],
        sizes=token_byte_lengths(tokenizer),
        counts=counts,
        is_step=is_step,
    )


def _spread(sample: TextSample) -> list[Text]:
    """Return about `HELD_OUT_BYTES` of the text, evenly from all of it."""
    step = max(1, -(-sample.text_bytes // HELD_OUT_BYTES))
    return sample.chosen[::step]


def _batches(texts: list[Text]) -> Iterator[list[str]]:
    for start in range(0, len(texts), _BATCH):
        yield [text.text for text in texts[start : start + _BATCH]]


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

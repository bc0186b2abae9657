"""Texts to token ids, by gigatoken where it is installed and gives the ids of tokenizers.

gigatoken is many times as fast, and young. So it is never trusted, but compared: at the start over
characters of every kind, and with the first documents of every shard. Where the two differ on a
character (each knows the letters of its own Unicode version), texts that hold it go to tokenizers;
where they differ on a document, `Mismatch` is raised and the run begins anew without gigatoken.

The price: 0.5 s at the start and some 4 % of the time, and a difference that shows neither in the
characters nor in the first documents of any shard would go unseen; none such is known.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from minillm.data.worker_pool import start_pool, worker_died
from minillm.errors import SetupError
from minillm.log import Progress, Silent, logger

_WORTH_BYTES = 4_000_000  # of input on disk: for less, gigatoken takes longer to start than to work
_BATCH_DOCUMENTS = 16  # few at a time stay in the processor's cache
_CACHED_WORDS = 60_000  # of tokenizers, whose own 10,000 are few for Chinese
_CACHED_CHARS = 8_000_000  # gigatoken 0.10 never forgets a word: begin anew after so much text
_SAMPLE_DOCUMENTS = 4
_SAMPLE_CHARS = 2000
_FIRST_SAMPLE_DOCUMENTS = 64

_PROBED = 0x40000  # beyond this plane no character is assigned
_NOT_PROBED = ((0xD800, 0xF8FF), (0x4E00, 0x9EFF), (0xAC00, 0xD79F), (0x20000, 0x2A5FF))
_PROBE = "x{}'s\n"  # splits in another place if the character is a letter
_PROBE_BLOCK = 64
_MOST_ODD = 20_000

_PROBE_TEXTS = (
    "春眠不觉晓，处处闻啼鸟。２０２４年",
    "def f(x):\n\treturn {'a': x**2}  # 注释\r\n\r\n    if not x:  pass",
    "👩\u200d👩\u200d👧 🇨🇳 ❤\ufe0f 1️⃣ 🌍🌍",
    "<|im_start|>system\n<|im_end|><|endoftext|><think></think>",
    "don't WE'LL I'm 'S they’re",
    "e\u0301t\u00e9 ｆｕｌｌ ﬁ Ⅷ ½ ² \u3000\u00a0\u2028\x0b\x85",
    "12345 3.14159 -7e10 0x1F",
    "Ελλάδα Россия עברית العربية हिन्दी ไทย 日本語カタカナ 한국어",
    "   leading\n\n\n\n  trailing   \t\t\n",
)

Ids = npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int64]


class Mismatch(Exception):  # noqa: N818 (caught by `tokenize`, never shown)
    """The two libraries encode a text differently."""


@dataclass(frozen=True, slots=True)
class EncoderPlan:
    """How to encode: decided once, and the same for every worker.

    Attributes:
        tree: The `tokenizer.json` without added tokens.
        is_fast: Whether gigatoken does it.
        odd: Code points on which the two differ.
    """

    tree: str
    is_fast: bool
    odd: tuple[int, ...] = ()


def plan_encoder(
    tree: str,
    backend: str,
    size_bytes: int,
    progress: Progress | None = None,
    *,
    apart: bool = False,
) -> EncoderPlan:
    """Choose the library.

    Args:
        tree: The `tokenizer.json` without added tokens.
        backend: `gigatoken`, `tokenizers`, or `auto`: gigatoken if it is there and it pays.
        size_bytes: Of the input, on disk.
        progress: Told which it is.
        apart: Compare the libraries in another process, for this one shall not encode.

    Raises:
        RunError: That process died.
        SetupError: gigatoken is asked for by name and not installed.
    """
    plain, say = EncoderPlan(tree, is_fast=False), (progress or Silent()).line
    if backend == "tokenizers" or (backend == "auto" and size_bytes < _WORTH_BYTES):
        return plain
    if importlib.util.find_spec("gigatoken") is None:
        if backend == "gigatoken":
            raise SetupError(
                "gigatoken is not installed",
                hint="install it: `pip install 'minillm-lab[fast]'`, or leave out `--backend`",
            )
        say(
            "encoding with tokenizers; `pip install 'minillm-lab[fast]'` makes it several times "
            "as fast"
        )
        return plain
    odd, why = _probe_apart(tree) if apart else _probe(tree)
    if why:
        logger.warning("encoding with tokenizers, for gigatoken will not do: %s", why)
        return plain
    say("encoding with gigatoken, compared with tokenizers all along")
    return EncoderPlan(tree, is_fast=True, odd=odd)


def _probe(tree: str) -> tuple[tuple[int, ...], str]:
    """Return the characters on which the libraries differ, and why gigatoken will not do."""
    try:
        fast, slow = _load_fast(tree), _load_slow(tree)
        _compare(fast, slow, list(_PROBE_TEXTS))
        return _find_odd(fast, slow), ""
    except (Mismatch, RuntimeError, ValueError, TypeError) as err:
        why = str(err).strip().splitlines() or [type(err).__name__]
        return (), why[0]


def _probe_apart(tree: str) -> tuple[tuple[int, ...], str]:
    """Do `_probe` in a process whose 200 MB go when it ends."""
    with tempfile.TemporaryDirectory(prefix="minillm-") as scratch, start_pool(1) as pool:
        place = Path(scratch) / "tokenizer.json"  # a file: see `workers.worker_pool`
        place.write_text(tree, encoding="utf-8")
        try:
            return pool.submit(_probe_file, place).result()
        except BrokenProcessPool as err:
            raise worker_died() from err


def _probe_file(place: Path) -> tuple[tuple[int, ...], str]:
    return _probe(place.read_text(encoding="utf-8"))


class Encoder:
    """Encodes texts as `plan` says; texts are characters only, they cannot spell a token."""

    def __init__(self, plan: EncoderPlan) -> None:
        self._plan = plan
        self._slow = _load_slow(plan.tree)
        self._fast: Any = None
        self._is_odd = np.zeros(0x110000, dtype=bool)
        self._is_odd[list(plan.odd)] = True
        self._cached_chars = 0
        self._sample_documents = _FIRST_SAMPLE_DOCUMENTS

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """Encode texts.

        Returns:
            The ids of all, one after the other, of shape (lengths.sum(),); and how many each has,
            of shape (len(texts),).

        Raises:
            Mismatch: gigatoken differs from tokenizers in a sample.
        """
        if not self._plan.is_fast:
            return _encode_slowly(self._slow, texts)
        joined = "".join(texts)
        if self._fast is None or self._cached_chars >= _CACHED_CHARS:
            self._fast, self._cached_chars = _load_fast(self._plan.tree), 0
        self._cached_chars += len(joined)
        sample = [text[:_SAMPLE_CHARS] for text in texts[: self._sample_documents]]
        _compare(self._fast, self._slow, [t for t in sample if not self._holds_odd(t)])
        self._sample_documents = _SAMPLE_DOCUMENTS
        ids, lengths = _encode_fast(self._fast, texts)
        if self._plan.odd and self._holds_odd(joined):
            return self._mend(texts, ids, lengths)
        return ids, lengths

    def _holds_odd(self, text: str) -> bool:
        if text.isascii():
            return False
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        return bool(self._is_odd[codes].any())

    def _mend(self, texts: Sequence[str], ids: Ids, lengths: Lengths) -> tuple[Ids, Lengths]:
        """Encode the texts with odd characters again, with tokenizers."""
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        for index, text in enumerate(texts):
            if self._holds_odd(text):
                rows[index], _ = _encode_slowly(self._slow, [text])
        return np.concatenate(rows), np.array([len(row) for row in rows], dtype=np.int64)


def _load_slow(tree: str) -> Tokenizer:
    tokenizer: Tokenizer = Tokenizer.from_str(tree)
    with contextlib.suppress(AttributeError):  # not a documented method
        tokenizer.model._resize_cache(_CACHED_WORDS)
    return tokenizer


def _load_fast(tree: str) -> Any:
    import gigatoken

    return gigatoken.Tokenizer.from_json(tree)


def _encode_slowly(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Ids, Lengths]:
    rows = []
    for begin in range(0, len(texts), _BATCH_DOCUMENTS):
        batch = tokenizer.encode_batch_fast(list(texts[begin : begin + _BATCH_DOCUMENTS]))
        rows += [np.array(encoding.ids, dtype=np.uint32) for encoding in batch]
    return np.concatenate(rows), np.array([len(row) for row in rows], dtype=np.int64)


def _encode_fast(tokenizer: Any, texts: Sequence[str]) -> tuple[Ids, Lengths]:
    import awkward

    rows = tokenizer.encode_batch(list(texts), parallel=False)  # the processes are the parallelism
    lengths = awkward.to_numpy(awkward.num(rows)).astype(np.int64)
    return awkward.to_numpy(awkward.flatten(rows)), lengths


def _compare(fast: Any, slow: Tokenizer, texts: list[str]) -> None:
    """Raise Mismatch unless both encode `texts` alike."""
    if not texts:
        return
    ids, lengths = _encode_fast(fast, texts)
    expected, expected_lengths = _encode_slowly(slow, texts)
    if np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected):
        return
    rows = zip(_split(ids, lengths), _split(expected, expected_lengths), texts, strict=True)
    text = next(text for row, right, text in rows if not np.array_equal(row, right))
    raise Mismatch(f"its ids differ in a text that begins {text[:40]!r}")


def _split(ids: Ids, lengths: Lengths) -> list[Ids]:
    return np.split(ids, np.cumsum(lengths)[:-1])


def _find_odd(fast: Any, slow: Tokenizer) -> tuple[int, ...]:
    """Return the code points that the two libraries take for characters of different kinds.

    Raises:
        Mismatch: There are too many.
    """
    ranges = [range(begin, end + 1) for begin, end in _NOT_PROBED]
    probed = [c for c in range(0x80, _PROBED) if not any(c in known for known in ranges)]
    blocks = [probed[begin : begin + _PROBE_BLOCK] for begin in range(0, len(probed), _PROBE_BLOCK)]
    suspects = [c for block in _differing(fast, slow, blocks) for c in block]
    odd = tuple(block[0] for block in _differing(fast, slow, [[c] for c in suspects]))
    if len(odd) > _MOST_ODD:
        raise Mismatch(f"its ids differ for {len(odd)} characters")
    return odd


def _differing(fast: Any, slow: Tokenizer, blocks: list[list[int]]) -> list[list[int]]:
    if not blocks:
        return []
    texts = ["".join(_PROBE.format(chr(c)) for c in block) for block in blocks]
    rows = _split(*_encode_fast(fast, texts))
    right = _split(*_encode_slowly(slow, texts))
    return [
        block for block, a, b in zip(blocks, rows, right, strict=True) if not np.array_equal(a, b)
    ]

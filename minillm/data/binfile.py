"""Token files: `NAME.bin`, little-endian token ids and nothing else, beside `NAME.bin.json`.

The ids are `uint16` where the vocabulary fits, else `uint32`; each document ends with the
separator. The manifest says which tokenizer made them, so ids of two tokenizers never meet. It is
written last: a `.bin` with a manifest is whole. A `.bin` without one (the published sets) is
accepted after a full scan, at about 0.3 s per 100 MB.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from minillm.data.manifest import Manifest, TokenizerFacts, manifest_path, require_content
from minillm.data.tokenizer import fingerprint, token_byte_lengths
from minillm.errors import InputError
from minillm.files import atomic_write, human_bytes, sha256_file
from minillm.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SCAN_TOKENS = 1 << 22
_BUFFER_BYTES = 1 << 20

Ids = Sequence[int] | npt.NDArray[np.integer]
"""Token ids of one document."""


class BinWriter:
    """Write a token file document by document; it appears, with its manifest, when all went well.

    Args:
        path: The .bin.
        facts: The tokenizer's facts.
        sources: Where the text came from.
        is_durable: False where the sha256 will be checked before the file is used.
    """

    def __init__(
        self,
        path: Path,
        facts: TokenizerFacts,
        sources: Sequence[str] = (),
        *,
        is_durable: bool = True,
    ) -> None:
        self.path, self._facts, self._sources = path, facts, tuple(sources)
        self._is_durable = is_durable
        self._dtype = np.dtype(facts.dtype).newbyteorder("<")
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._num_tokens = self._num_documents = self._text_bytes = 0
        self.manifest: Manifest | None = None

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self._stream: IO[bytes] = self._stack.enter_context(
            atomic_write(self.path, is_durable=self._is_durable)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:  # the last write may fail like any other
            self._flush()
            manifest_path(self.path).unlink(missing_ok=True)  # must not vouch for the new file
        self.manifest = Manifest(
            dtype=self._facts.dtype,
            vocab_size=self._facts.vocab_size,
            tokenizer_sha256=self._facts.sha256,
            separator_id=self._facts.separator_id,
            num_tokens=self._num_tokens,
            num_documents=self._num_documents,
            text_bytes=self._text_bytes,
            sha256=self._hash.hexdigest(),
            sources=self._sources,
        )
        self.manifest.write(manifest_path(self.path), is_durable=self._is_durable)

    def append(self, ids: Ids, text_bytes: int) -> None:
        """Add one document; the separator is put after it.

        Args:
            ids: The document's tokens, without the separator.
            text_bytes: UTF-8 length of its text.

        Raises:
            InputError: An id lies outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64)
        self.extend(array, np.array([array.size]), text_bytes)

    def extend(
        self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64], text_bytes: int
    ) -> None:
        """Add documents; the separator is put after each.

        Args:
            ids: The tokens of all, one after the other, of shape (lengths.sum(),).
            lengths: Tokens of each document.
            text_bytes: UTF-8 length of all their texts.

        Raises:
            InputError: An id lies outside the vocabulary.
        """
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._facts.vocab_size:
            raise InputError(
                f"`{self.path}`: token ids {ids.min()} to {ids.max()} do not fit the "
                f"vocabulary of {self._facts.vocab_size}",
                hint="use the tokenizer that made the ids",
            )
        block = np.empty(ids.size + len(lengths), dtype=self._dtype)
        is_separator = np.zeros(block.size, dtype=bool)
        is_separator[np.cumsum(lengths + 1) - 1] = True
        block[is_separator] = self._facts.separator_id
        block[~is_separator] = ids
        self._buffer += block.tobytes()
        self._num_tokens += block.size
        self._num_documents += len(lengths)
        self._text_bytes += text_bytes
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._hash.update(self._buffer)
        self._stream.write(self._buffer)
        self._buffer.clear()


class TokenFile:
    """A token file, open for reading.

    Attributes:
        path: The .bin.
        manifest: Its manifest, read or made by a scan.
        tokens: All ids, a memory map of shape (num_tokens,).
    """

    def __init__(self, path: Path, manifest: Manifest, tokens: "np.memmap[Any, Any]") -> None:
        self.path, self.manifest, self.tokens = path, manifest, tokens
        self._inode = path.stat().st_ino

    def __len__(self) -> int:
        """Tokens in the file."""
        return self.manifest.num_tokens

    def require_whole(self) -> None:
        """Check that the file was not cut short since: the kernel kills who reads on (SIGBUS).

        Raises:
            InputError: It was. One that was deleted or replaced is still there for its readers.
        """
        found = self.path.stat() if self.path.exists() else None
        if found and found.st_ino == self._inode and found.st_size < self.tokens.nbytes:
            raise InputError(
                f"`{self.path}` was cut while it was read: {found.st_size} bytes are left of "
                f"{self.tokens.nbytes}",
                hint="make it again with `minillm tokenize`",
            )

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        tokenizer: "PreTrainedTokenizerFast | None" = None,
        verify: bool = False,
    ) -> Self:
        """Open a token file and check it.

        Args:
            path: The .bin.
            tokenizer: The tokenizer in use; must be the one that made the file. Needed for a file
                without a manifest, which is then scanned in full.
            verify: Also read the whole file and compare its sha256 and ids.

        Raises:
            InputError: No such file, a length or an id that cannot be, a manifest that
                disagrees, another tokenizer.
        """
        if not path.is_file():
            raise InputError(f"no token file at `{path}`", hint="make one with `minillm tokenize`")
        if not manifest_path(path).is_file():
            return cls._scan_named(path, tokenizer)
        manifest = Manifest.read(manifest_path(path))
        if tokenizer is not None:
            require_same_tokenizer(path, manifest.tokenizer_sha256, tokenizer)
        found = path.stat().st_size
        if found != manifest.size_bytes:
            raise InputError(
                f"`{path}` has {found} bytes, its manifest says {manifest.size_bytes}",
                hint="make it again with `minillm tokenize`",
            )
        tokens = _map(path, manifest.dtype)
        if verify:
            _verify(path, manifest, tokens)
        return cls(path, manifest, tokens)

    @staticmethod
    def read_fingerprint(path: Path) -> str | None:
        """Return the fingerprint of the tokenizer that made a .bin; None without a manifest."""
        beside = manifest_path(path)
        return Manifest.read(beside).tokenizer_sha256 if beside.is_file() else None

    @classmethod
    def _scan_named(cls, path: Path, tokenizer: "PreTrainedTokenizerFast | None") -> Self:
        if tokenizer is None:
            raise InputError(
                f"`{path}` has no manifest `{manifest_path(path).name}`, so its tokenizer is not "
                "known",
                hint="name the folder of the tokenizer that made it: `--tokenizer FOLDER`",
            )
        size = human_bytes(path.stat().st_size)
        logger.warning("`%s` has no manifest: scanning its %s with the given tokenizer", path, size)
        return cls.scan(path, tokenizer)

    @classmethod
    def scan(
        cls,
        path: Path,
        tokenizer: "PreTrainedTokenizerFast",
        advance: Callable[[int], None] = lambda _: None,
    ) -> Self:
        """Read a whole token file that has no manifest, to make one; told of scanned bytes.

        Raises:
            InputError: A length, an id or a lack of separators that the tokenizer cannot have made.
        """
        facts = TokenizerFacts.of(tokenizer)
        tokens = _map(path, facts.dtype)
        lengths = token_byte_lengths(tokenizer)
        num_documents = text_bytes = 0
        for begin in range(0, len(tokens), _SCAN_TOKENS):
            piece = tokens[begin : begin + _SCAN_TOKENS]
            _check_ids(path, piece, facts.vocab_size)
            num_documents += int(np.count_nonzero(piece == facts.separator_id))
            text_bytes += int(lengths[piece].sum(dtype=np.int64))
            advance(piece.nbytes)
        if num_documents == 0:
            raise InputError(
                f"`{path}` holds no separator {facts.separator_id}: it was made with another "
                "tokenizer or layout",
                hint="name the folder of the tokenizer that made it: `--tokenizer FOLDER`",
            )
        manifest = Manifest(
            dtype=facts.dtype,
            vocab_size=facts.vocab_size,
            tokenizer_sha256=facts.sha256,
            separator_id=facts.separator_id,
            num_tokens=len(tokens),
            num_documents=num_documents,
            text_bytes=text_bytes,
            sha256=sha256_file(path),
            sources=(path.name,),
        )
        return cls(path, manifest, tokens)


def require_same_tokenizer(
    path: Path, made_with: str, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Refuse to mix the ids of two tokenizers.

    Raises:
        InputError: `tokenizer` is not the one with fingerprint `made_with`.
    """
    here = fingerprint(tokenizer)
    if here != made_with:
        raise InputError(
            f"`{path}` was made with tokenizer {made_with[:12]}…, but "
            f"`{tokenizer.name_or_path or 'the tokenizer in use'}` is {here[:12]}…",
            hint="make the data again with `minillm tokenize`, or name the other `--tokenizer`",
        )


def _map(path: Path, dtype: str) -> "np.memmap[Any, Any]":
    kind = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if size == 0 or size % kind.itemsize:
        what = "is empty" if size == 0 else f"has {size} bytes, not a multiple of {kind.itemsize}"
        raise InputError(f"`{path}` {what}", hint="make it again with `minillm tokenize`")
    return np.memmap(path, dtype=kind, mode="r")


def _verify(path: Path, manifest: Manifest, tokens: "np.memmap[Any, Any]") -> None:
    require_content(path, manifest)
    for begin in range(0, len(tokens), _SCAN_TOKENS):
        _check_ids(path, tokens[begin : begin + _SCAN_TOKENS], manifest.vocab_size)


def _check_ids(path: Path, ids: npt.NDArray[np.integer], vocab_size: int) -> None:
    largest = int(ids.max())
    if largest >= vocab_size:
        raise InputError(
            f"`{path}` holds id {largest}, but the vocabulary has {vocab_size} tokens",
            hint="name the folder of the tokenizer that made it: `--tokenizer FOLDER`",
        )

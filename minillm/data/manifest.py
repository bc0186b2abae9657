"""`NAME.bin.json`: what a token file is, which tokenizer made it, and the hash of its content."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from minillm.data.tokenizer import find_separator, fingerprint
from minillm.errors import InputError
from minillm.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT_VERSION = 1

_HASH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """What a token file needs to know of its tokenizer."""

    vocab_size: int
    sha256: str
    separator_id: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> Self:
        """Read the facts from a loaded tokenizer."""
        return cls(
            vocab_size=len(tokenizer),
            sha256=fingerprint(tokenizer),
            separator_id=find_separator(tokenizer),
        )

    @property
    def dtype(self) -> str:
        """The narrowest of `uint16` and `uint32` that holds every id."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a token file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`NAME.bin.json`, field by field."""

    format_version: int = FORMAT_VERSION
    dtype: str
    vocab_size: int
    tokenizer_sha256: str
    separator_id: int
    num_tokens: int
    num_documents: int
    text_bytes: int
    """UTF-8 bytes of the source text, for bits per byte."""
    sha256: str
    """Of the .bin; empty where `parts` stands for it."""
    sources: tuple[str, ...]
    made_from: str = ""
    """`minillm tokenize`'s fingerprint of the input files' contents and its settings."""
    parts: tuple[Part, ...] = ()
    """Stretches of the file, in order, each with its own hash: what `merge-bin` joined."""

    @property
    def size_bytes(self) -> int:
        """Length of the .bin."""
        return self.num_tokens * np.dtype(self.dtype).itemsize

    @property
    def stretches(self) -> tuple[Part, ...]:
        """What a check of the content has to hash: the parts, or the whole as one."""
        return self.parts or (Part(size_bytes=self.size_bytes, sha256=self.sha256),)

    @property
    def content_id(self) -> str:
        """A hash that stands for the content: that of the file, or of its parts' hashes."""
        joined = "".join(f"{part.size_bytes}:{part.sha256};" for part in self.parts)
        return self.sha256 or hashlib.sha256(joined.encode()).hexdigest()

    @property
    def facts(self) -> TokenizerFacts:
        """The tokenizer's part."""
        return TokenizerFacts(
            vocab_size=self.vocab_size,
            sha256=self.tokenizer_sha256,
            separator_id=self.separator_id,
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest.

        Raises:
            InputError: It is not JSON, lacks a field, or is of a later format.
        """
        hint = f"make it again with `minillm tokenize`, or remove `{path}` to have the .bin scanned"
        try:
            tree = json.loads(path.read_bytes())
            version = tree.get("format_version")
            if version != FORMAT_VERSION:
                raise InputError(
                    f"`{path}` is of format {version}, this minillm reads {FORMAT_VERSION}",
                    hint="update minillm: `pip install -U minillm-lab`",
                )
            known = {item.name for item in dataclasses.fields(cls)}
            found = cls(**{key: value for key, value in tree.items() if key in known})
            parts = tuple(Part(**part) for part in tree.get("parts", ()))
        except (ValueError, TypeError, AttributeError) as err:
            raise InputError(f"`{path}` is not a manifest: {err}", hint=hint) from err
        numbers = (found.vocab_size, found.separator_id, found.num_tokens, found.num_documents)
        if found.dtype not in ("uint16", "uint32") or not all(isinstance(n, int) for n in numbers):
            raise InputError(f"`{path}` is not a manifest: wrong types", hint=hint)
        if parts and sum(part.size_bytes for part in parts) != found.size_bytes:
            raise InputError(f"`{path}` is not a manifest: its parts are not the whole", hint=hint)
        return dataclasses.replace(found, sources=tuple(found.sources), parts=parts)

    def write(self, path: Path, *, is_durable: bool = True) -> None:
        """Write the manifest atomically."""
        tree = dataclasses.asdict(self)
        if not self.parts:
            del tree["parts"]
        text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
        write_text(path, text, is_durable=is_durable)


def manifest_path(path: Path) -> Path:
    """Return the manifest's place: `NAME.bin` → `NAME.bin.json`."""
    return path.with_name(path.name + ".json")


def require_content(
    path: Path, manifest: Manifest, is_over: Callable[[], bool] = lambda: False
) -> None:
    """Hash a token file and compare it with its manifest.

    Args:
        path: The .bin.
        manifest: What it must be.
        is_over: Asked now and then whether to stop early.

    Raises:
        InputError: The content differs, or the file is shorter.
    """
    buffer = memoryview(bytearray(_HASH_BYTES))
    with path.open("rb", buffering=0) as stream:
        for part in manifest.stretches:
            digest, left = hashlib.sha256(), part.size_bytes
            while left and not is_over():
                count = stream.readinto(buffer[: min(left, _HASH_BYTES)])
                if not count:
                    raise InputError(
                        f"`{path}` became shorter while it was read",
                        hint="run the same command again when nothing writes that file",
                    )
                digest.update(buffer[:count])
                left -= count
            found = digest.hexdigest()
            if found != part.sha256 and not is_over():
                raise InputError(
                    f"`{path}` has sha256 {found[:12]}…, its manifest says {part.sha256[:12]}…",
                    hint="make it again with `minillm tokenize`",
                )

"""Tokenizers around a file: which one made it, and whether its neighbours say the same."""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from minillm.data.inspect_report import Report
from minillm.data.sft_rows import METADATA_KEY
from minillm.data.tokenizer import (
    find_tokenizer,
    fingerprint,
    load_tokenizer,
    resolve_tokenizer,
)
from minillm.errors import InputError

_MAX_FILES = 1000


@dataclass(frozen=True, slots=True)
class Found:
    """A tokenizer, where it lies, and its fingerprint."""

    tokenizer: PreTrainedTokenizerFast
    place: str
    sha256: str


def pick_tokenizer(given: Path, near: Path, made_with: str | None = None) -> Found | str:
    """Return the tokenizer to read a file with, or a sentence that says why there is none.

    Args:
        given: `auto`, `bundled` or a folder, which is taken whatever made the file.
        near: The folder of the file.
        made_with: Fingerprint of the tokenizer that made the file, if it says so.

    Raises:
        InputError: `given` is no tokenizer.
    """
    if given.as_posix() != "auto":
        folder = resolve_tokenizer(given)
    elif made_with:
        try:
            folder = find_tokenizer(made_with, near=[near, near.parent])
        except InputError as error:
            return str(error)
    else:
        beside = [f for f in (near, near / "tokenizer") if (f / "tokenizer.json").is_file()]
        folder = beside[0] if beside else resolve_tokenizer(given)
    return Found(load_tokenizer(folder), folder.as_posix(), fingerprint(folder))


def report_tokenizer(
    found: Found | str, made_with: str | None, report: Report
) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer to decode with; tell where it is missing or another one."""
    if isinstance(found, str):
        report.notes.append(f"no text is shown: {found}")
        return None
    if made_with and found.sha256 != made_with:
        report.problems.append(
            f"made with tokenizer {made_with[:12]}…, but `{found.place}` is {found.sha256[:12]}…"
        )
        return None
    return found.tokenizer


def sft_metadata(path: Path) -> dict[str, object]:
    """Return what a parquet's schema, or a `NAME.parquet.json` beside it, says of its making."""
    found: dict[str, object] = {}
    beside = path.with_name(f"{path.name}.json")
    try:
        if beside.is_file():
            found |= json.loads(beside.read_bytes())
        found |= json.loads((pq.read_schema(path).metadata or {}).get(METADATA_KEY, b"{}"))
    except (pa.ArrowException, OSError, ValueError, TypeError):
        return found
    return found


def fingerprints_in(folder: Path) -> dict[str, str]:
    """Return name → tokenizer fingerprint of the data and tokenizers that lie in a folder."""
    found: dict[str, str] = {}
    for place in (folder, folder / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            try:
                found["tokenizer.json" if place == folder else "tokenizer"] = fingerprint(place)
            except InputError:  # reported where it is inspected
                continue
    for path in sorted(folder.glob("*.bin.json"))[:_MAX_FILES]:
        try:
            made_with = json.loads(path.read_bytes())["tokenizer_sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found[path.name.removesuffix(".json")] = str(made_with)
    for path in sorted(folder.glob("*.parquet"))[:_MAX_FILES]:
        made_with = sft_metadata(path).get("tokenizer_sha256")
        if isinstance(made_with, str) and made_with:
            found[path.name] = made_with
    return found


def odd_neighbours(path: Path, made_with: str) -> str | None:
    """Return a sentence about what lies beside `path` and was made with another tokenizer."""
    others = {
        name: found
        for name, found in fingerprints_in(path.parent).items()
        if name != path.name and found != made_with
    }
    if not others:
        return None
    name, found = next(iter(others.items()))
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return (
        f"made with tokenizer {made_with[:12]}…, but its neighbour `{name}`{more} with "
        f"{found[:12]}…: their ids must not be mixed"
    )

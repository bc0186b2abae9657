import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from minillm.data.binfile import BinWriter, TokenFile
from minillm.data.manifest import Manifest, TokenizerFacts, manifest_path
from minillm.data.tokenizer import fingerprint, plain_encoder
from minillm.data.windows import Windows
from minillm.errors import InputError, SetupError

FACTS = TokenizerFacts(vocab_size=300, sha256="f" * 64, separator_id=1)
WIDE = TokenizerFacts(vocab_size=70_000, sha256="f" * 64, separator_id=1)
DOCUMENTS = st.lists(st.lists(st.integers(0, 299), max_size=9), min_size=1, max_size=9)


def write(
    path: Path, documents: list[list[int]], facts: TokenizerFacts = FACTS, text_bytes: int = 7
) -> Manifest:
    with BinWriter(path, facts, ["a.txt"]) as writer:
        for ids in documents:
            writer.append(ids, text_bytes)
    assert writer.manifest is not None
    return writer.manifest


@given(documents=DOCUMENTS, wide=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_file_is_the_ids_with_a_separator_after_each_document(
    tmp_path: Path, documents: list[list[int]], wide: bool
) -> None:
    path = tmp_path / "a.bin"
    manifest = write(path, documents, WIDE if wide else FACTS)
    expected = [i for ids in documents for i in [*ids, 1]]
    raw = b"".join(i.to_bytes(4 if wide else 2, "little") for i in expected)
    assert path.read_bytes() == raw
    opened = TokenFile.open(path, verify=True)
    assert opened.tokens.tolist() == expected
    assert opened.manifest == manifest
    assert len(opened) == len(expected)


def test_manifest_tells_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, [[5, 6], [7]])
    assert json.loads((tmp_path / "a.bin.json").read_text()) == {
        "format_version": 1,
        "dtype": "uint16",
        "vocab_size": 300,
        "tokenizer_sha256": "f" * 64,
        "separator_id": 1,
        "num_tokens": 5,
        "num_documents": 2,
        "text_bytes": 14,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "sources": ["a.txt"],
        "made_from": "",
    }
    assert TokenFile.read_fingerprint(path) == "f" * 64


def test_ids_of_65536_tokens_still_fit_two_bytes() -> None:
    assert dataclasses.replace(FACTS, vocab_size=65_536).dtype == "uint16"
    assert dataclasses.replace(FACTS, vocab_size=65_537).dtype == "uint32"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    before = write(path, [[1, 2]])

    def fail() -> None:
        with BinWriter(path, FACTS) as writer:
            writer.append([3], 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert TokenFile.open(path, verify=True).manifest == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.bin.json"]


@pytest.mark.parametrize("ids", [[300], [-1], [5, 70_000]])
def test_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(InputError, match="300"), BinWriter(tmp_path / "a.bin", FACTS) as writer:
        writer.append(ids, 1)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_at_the_end_is_named(tmp_path: Path) -> None:
    writer = BinWriter(tmp_path / "a.bin", TokenizerFacts(vocab_size=9, sha256="x", separator_id=1))

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.__enter__()
    writer.append([2, 3], 2)
    writer._flush = full  # type: ignore[method-assign]
    with pytest.raises(SetupError, match=r"disk is full while writing .*a\.bin"):
        writer.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no token file at .*a\.bin"):
        TokenFile.open(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "change", [lambda raw: raw[:-1], lambda raw: raw + b"\0\0", lambda raw: b""]
)
def test_a_length_other_than_the_manifests_is_refused(tmp_path: Path, change) -> None:
    path = tmp_path / "a.bin"
    write(path, [[5, 6], [7]])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match="its manifest says 10"):
        TokenFile.open(path)


@given(place=st.integers(0, 9), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_verify_finds_any_flipped_bit(tmp_path: Path, place: int, bit: int) -> None:
    path = tmp_path / "a.bin"
    write(path, [[5, 6], [7]])
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1 << bit
    path.write_bytes(raw)
    with pytest.raises(InputError, match="sha256"):
        TokenFile.open(path, verify=True)


def test_verify_finds_ids_beyond_the_manifests_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    manifest = write(path, [[250]])
    dataclasses.replace(manifest, vocab_size=200).write(manifest_path(path))
    with pytest.raises(InputError, match="holds id 250"):
        TokenFile.open(path, verify=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a manifest"),
        ("[]", "is not a manifest"),
        ('{"format_version": 2}', "is of format 2"),
        ('{"format_version": 1}', "is not a manifest"),
        (None, "wrong types"),
    ],
)
def test_a_broken_manifest_is_an_input_error(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "a.bin"
    write(path, [[5]])
    beside = manifest_path(path)
    if content is None:
        tree = json.loads(beside.read_text()) | {"dtype": "object"}
        content = json.dumps(tree)
    beside.write_text(content)
    with pytest.raises(InputError, match=message):
        TokenFile.open(path)


def test_another_tokenizer_is_refused(
    tmp_path: Path, small: PreTrainedTokenizerFast, bundled: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "a.bin"
    write(path, [[5]], TokenizerFacts.of(small))
    assert TokenFile.open(path, tokenizer=small).tokens.tolist() == [5, small.eos_token_id]
    with pytest.raises(InputError, match=fingerprint(bundled)[:12]):
        TokenFile.open(path, tokenizer=bundled)


def test_a_file_without_manifest_is_scanned(
    tmp_path: Path,
    small: PreTrainedTokenizerFast,
    make_texts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, texts = tmp_path / "a.bin", make_texts(50)
    with BinWriter(path, TokenizerFacts.of(small), ["a.bin"]) as writer:
        for text in texts:
            writer.append(plain_encoder(small).encode(text).ids, len(text.encode()))
    manifest_path(path).unlink()
    assert TokenFile.read_fingerprint(path) is None
    assert TokenFile.open(path, tokenizer=small).manifest == writer.manifest
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not manifest_path(path).exists()


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"", "is empty"), (b"abc", "3 bytes"), (b"\xff\xff", "65535"), (b"\5\0", "no separator")],
)
def test_a_file_without_manifest_that_cannot_be_one_is_refused(
    tmp_path: Path, small: PreTrainedTokenizerFast, raw: bytes, message: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        TokenFile.open(path, tokenizer=small)


def test_a_file_without_manifest_needs_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.array([1, 2], dtype="<u2").tofile(path)
    with pytest.raises(InputError, match="no manifest") as caught:
        TokenFile.open(path)
    assert "--tokenizer" in str(caught.value.hint)


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, [[5, 6, 7]])
    rows = Windows(TokenFile.open(path), 1, seed=0, val_windows=0, doc_mask=False)
    assert rows.rows(0, 3).input_ids.sum() == 5 + 6 + 7
    os.truncate(path, 2)
    with pytest.raises(InputError, match=r"cut while it was read: 2 bytes are left of 8"):
        rows.rows(0, 3)


def test_a_file_that_is_replaced_or_deleted_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, [[5, 6, 7]])
    rows = Windows(TokenFile.open(path), 1, seed=0, val_windows=0, doc_mask=False)
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "b").replace(path)
    assert rows.rows(0, 3).input_ids.sum() == 5 + 6 + 7
    path.unlink()
    assert rows.rows(0, 3).input_ids.sum() == 5 + 6 + 7

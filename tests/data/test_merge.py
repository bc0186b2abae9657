import dataclasses
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minillm import paths
from minillm.data import merge as module
from minillm.data import shuffle
from minillm.data.binfile import BinWriter, TokenFile
from minillm.data.manifest import Manifest, TokenizerFacts, manifest_path
from minillm.data.merge import merge_bin
from minillm.errors import InputError, SetupError
from minillm.settings import MergeBinConfig

FACTS = TokenizerFacts(vocab_size=300, sha256="f" * 64, separator_id=1)


def write(path: Path, documents: list[list[int]], facts: TokenizerFacts = FACTS) -> Manifest:
    with BinWriter(path, facts, [path.stem + ".txt"]) as writer:
        for ids in documents:
            writer.append(ids, 10)
    assert writer.manifest is not None
    return writer.manifest


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    write(folder / "b.bin", [[7], [8, 9]])
    write(folder / "a.bin", [[5, 6]])
    draw = np.random.default_rng(0)
    write(folder / "c.bin", [draw.integers(2, 300, 3000).tolist() for _ in range(20)])
    return folder


def expected(folder: Path) -> bytes:
    return b"".join((folder / name).read_bytes() for name in ("a.bin", "b.bin", "c.bin"))


def test_files_are_joined_in_the_order_of_their_names(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "all.bin"
    merged = merge_bin(MergeBinConfig(data=tokens, out=out))
    assert out.read_bytes() == expected(tokens)
    assert TokenFile.open(out, verify=True).manifest == merged
    assert (merged.num_tokens, merged.num_documents, merged.text_bytes) == (60_028, 23, 230)
    hashes = [hashlib.sha256((tokens / f"{n}.bin").read_bytes()).hexdigest() for n in "abc"]
    assert [part.sha256 for part in merged.parts] == hashes
    assert merged.sources == ("a.txt", "b.txt", "c.txt")
    whole = merge_bin(MergeBinConfig(data=tokens, out=out, verify=True))
    assert (whole.sha256, whole.parts) == (hashlib.sha256(expected(tokens)).hexdigest(), ())
    assert Manifest.read(manifest_path(out)) == whole


def test_hashes_of_the_parts_go_with_them(tokens: Path, tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner" / "m.bin", tmp_path / "outer.bin"
    merge_bin(MergeBinConfig(data=tokens, out=inner))
    write(inner.with_name("z.bin"), [[3, 4]])
    merged = merge_bin(MergeBinConfig(data=inner.parent, out=outer))
    assert [part.size_bytes for part in merged.parts] == [6, 10, 120_040, 6]
    assert TokenFile.open(outer, verify=True).manifest == merged
    raw = bytearray(outer.read_bytes())
    raw[20] ^= 1  # in what was c.bin
    outer.write_bytes(raw)
    with pytest.raises(InputError, match=rf"sha256 .* manifest says {merged.parts[2].sha256[:12]}"):
        TokenFile.open(outer, verify=True)


def test_damage_that_hides_from_the_clock_is_found_by_verify(tokens: Path, tmp_path: Path) -> None:
    part, out = tokens / "b.bin", tmp_path / "all.bin"
    raw, stat = bytearray(part.read_bytes()), part.stat()
    raw[2] ^= 1
    part.write_bytes(raw)
    os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InputError, match=r"b\.bin` has sha256"):
        merge_bin(MergeBinConfig(data=tokens, out=out, verify=True))
    merge_bin(MergeBinConfig(data=tokens, out=out))
    with pytest.raises(InputError, match=r"all\.bin` has sha256"):
        TokenFile.open(out, verify=True)


def fail_with(code: int) -> Callable[..., int]:
    def call(*_args: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("broken", [["copy_file_range"], ["copy_file_range", "sendfile"]])
@pytest.mark.parametrize("how", ["missing", "refuses"])
def test_slower_ways_to_copy_give_the_same_file(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: list[str], how: str
) -> None:
    for name in broken:
        if how == "missing":
            monkeypatch.delattr(os, name)
        else:
            monkeypatch.setattr(os, name, fail_with(errno.EXDEV))
    merge_bin(MergeBinConfig(data=tokens, out=tmp_path / "all.bin"))
    assert (tmp_path / "all.bin").read_bytes() == expected(tokens)


def test_copies_in_pieces(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1000)
    merge_bin(MergeBinConfig(data=tokens, out=tmp_path / "all.bin"))
    assert (tmp_path / "all.bin").read_bytes() == expected(tokens)


def test_the_output_is_not_its_own_input(tokens: Path) -> None:
    cfg = MergeBinConfig(data=tokens, out=tokens / "all.bin")
    assert merge_bin(cfg) == merge_bin(cfg)
    assert (tokens / "all.bin").read_bytes() == expected(tokens)


def test_two_tokenizers_are_never_mixed(tokens: Path, tmp_path: Path) -> None:
    other = TokenizerFacts(vocab_size=300, sha256="e" * 64, separator_id=1)
    write(tokens / "d.bin", [[1]], other)
    with pytest.raises(InputError, match=r"a\.bin` was made .* f{12}….*d\.bin` with e{12}…"):
        merge_bin(MergeBinConfig(data=tokens, out=tmp_path / "all.bin"))
    assert not (tmp_path / "all.bin").exists()


def test_two_dtypes_are_never_mixed(tokens: Path, tmp_path: Path) -> None:
    wide = TokenizerFacts(vocab_size=70_000, sha256="f" * 64, separator_id=1)
    write(tokens / "d.bin", [[1]], wide)
    with pytest.raises(InputError, match=r"a\.bin` holds uint16 .*d\.bin` uint32"):
        merge_bin(MergeBinConfig(data=tokens, out=tmp_path / "all.bin"))


def test_a_damaged_part_is_named_and_leaves_the_earlier_output(
    tokens: Path, tmp_path: Path
) -> None:
    out = tmp_path / "all.bin"
    before = merge_bin(MergeBinConfig(data=tokens, out=out))
    raw = bytearray((tokens / "b.bin").read_bytes())
    raw[2] ^= 1
    (tokens / "b.bin").write_bytes(raw)
    with pytest.raises(InputError, match=r"b\.bin` has sha256"):
        merge_bin(MergeBinConfig(data=tokens, out=out))
    assert TokenFile.open(out, verify=True).manifest == before
    (tokens / "b.bin").write_bytes(raw[:-2])
    with pytest.raises(InputError, match=r"b\.bin` has 8 bytes"):
        merge_bin(MergeBinConfig(data=tokens, out=out))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["all.bin", "all.bin.json", "tokens"]


def test_a_full_disk_is_found_before_copying(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(SetupError, match=r"`all\.bin` needs 120\.1 kB"):
        merge_bin(MergeBinConfig(data=tokens, out=tmp_path / "all.bin"))


def test_a_disk_that_fills_up_leaves_nothing(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", fail_with(errno.ENOSPC))
    with pytest.raises(SetupError, match="disk is full"):
        merge_bin(MergeBinConfig(data=tokens, out=tmp_path / "out" / "all.bin"))
    assert not list((tmp_path / "out").iterdir())


def test_files_without_manifest_need_the_tokenizer(
    small_folder: Path, small, tmp_path: Path
) -> None:
    write(tmp_path / "a.bin", [[5, 6]], TokenizerFacts.of(small))
    made = write(tmp_path / "b.bin", [[7]], TokenizerFacts.of(small))
    manifest_path(tmp_path / "b.bin").unlink()
    out = tmp_path / "out.bin"
    with pytest.raises(InputError, match="no manifest"):
        merge_bin(MergeBinConfig(data=tmp_path, out=out))
    merged = merge_bin(MergeBinConfig(data=tmp_path, out=out, tokenizer=small_folder))
    assert merged.tokenizer_sha256 == made.tokenizer_sha256
    assert TokenFile.open(out).tokens.tolist() == [5, 6, small.eos_token_id, 7, small.eos_token_id]


def test_nothing_to_merge_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for data in (paths.TOKENS, Path("other"), Path()):
        with pytest.raises(InputError) as caught:
            merge_bin(MergeBinConfig(data=data))
        assert "minillm tokenize" in str(caught.value.hint)


def documents_of(path: Path) -> list[tuple[int, ...]]:
    found: list[list[int]] = [[]]
    for token in np.fromfile(path, dtype="<u2").tolist():
        if token == FACTS.separator_id:
            found.append([])
        else:
            found[-1].append(token)
    assert found.pop() == []
    return [tuple(ids) for ids in found]


def shuffled(tokens: Path, out: Path, seed: int = 0) -> Manifest:
    return merge_bin(MergeBinConfig(data=tokens, out=out, shuffle_documents=True, seed=seed))


def test_shuffling_keeps_every_document_whole_and_repeats_with_its_seed(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(1)
    write(tokens / "d.bin", [draw.integers(2, 300, n).tolist() for n in draw.integers(0, 90, 900)])
    plain = merge_bin(MergeBinConfig(data=tokens, out=tmp_path / "plain.bin", verify=True))
    monkeypatch.setattr(shuffle, "_BUCKET_BYTES", 20_000)
    monkeypatch.setattr(shuffle, "_CHUNK_TOKENS", 1000)
    made = shuffled(tokens, tmp_path / "out" / "a.bin")
    before, after = (
        documents_of(tmp_path / "plain.bin"),
        documents_of(tmp_path / "out" / "a.bin"),
    )
    assert sorted(after) == sorted(before)
    moved = sum(a != b for a, b in zip(before, after, strict=True))
    assert moved > 0.9 * len(before)
    assert TokenFile.open(tmp_path / "out" / "a.bin", verify=True).manifest == made
    assert dataclasses.replace(made, sha256=plain.sha256) == plain
    assert shuffled(tokens, tmp_path / "out" / "b.bin") == made
    assert shuffled(tokens, tmp_path / "out" / "c.bin", seed=1).sha256 != made.sha256
    names = {"a.bin", "b.bin", "c.bin"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names | {
        f"{name}.json" for name in names
    }


def test_every_order_of_three_documents_comes_up(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    write(folder / "a.bin", [[5], [6]])
    write(folder / "b.bin", [[7]])
    seen = set()
    for seed in range(40):
        shuffled(folder, tmp_path / "all.bin", seed)
        seen.add(tuple(documents_of(tmp_path / "all.bin")))
    assert len(seen) == 6


def test_document_starts_beside_a_file_go_before_separators(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    write(folder / "a.bin", [[5], [6], [7], [8]])  # 5 1 6 1 7 1 8 1
    np.array([0, 4], dtype="<u8").tofile(folder / "a.bin.docs")
    seen = set()
    for seed in range(20):
        assert shuffled(folder, tmp_path / "all.bin", seed).num_documents == 2
        seen.add(tuple(documents_of(tmp_path / "all.bin")))
    assert seen == {((5,), (6,), (7,), (8,)), ((7,), (8,), (5,), (6,))}
    for wrong in ([1, 4], [0, 4, 4], [0, 8]):
        np.array(wrong, dtype="<u8").tofile(folder / "a.bin.docs")
        with pytest.raises(InputError, match=r"a\.bin\.docs` does not hold the starts"):
            shuffled(folder, tmp_path / "all.bin")


def test_shuffling_refuses_what_merging_refuses(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "all.bin"
    raw = bytearray((tokens / "b.bin").read_bytes())
    raw[2] ^= 1
    (tokens / "b.bin").write_bytes(raw)
    with pytest.raises(InputError, match=r"b\.bin` has sha256 .*, its manifest says"):
        shuffled(tokens, out)
    write(tokens / "b.bin", [[1]], TokenizerFacts(vocab_size=300, sha256="e" * 64, separator_id=1))
    with pytest.raises(InputError, match="was made with tokenizer"):
        shuffled(tokens, out)
    manifest = write(tokens / "b.bin", [[7]])
    (tokens / "b.bin").write_bytes(np.array([7, 8], dtype="<u2").tobytes())
    digest = hashlib.sha256((tokens / "b.bin").read_bytes()).hexdigest()
    dataclasses.replace(manifest, sha256=digest).write(manifest_path(tokens / "b.bin"))
    with pytest.raises(InputError, match="does not end with the separator"):
        shuffled(tokens, out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("place", ["first", "last"])
def test_each_part_is_checked_against_its_manifest(
    tokens: Path, tmp_path: Path, place: str
) -> None:
    damaged = tokens / ("a.bin" if place == "first" else "c.bin")
    raw = bytearray(damaged.read_bytes())
    raw[-3] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(InputError, match=rf"{damaged.name}` has sha256"):
        merge_bin(MergeBinConfig(data=tokens, out=tmp_path / "out" / "all.bin"))
    assert list((tmp_path / "out").iterdir()) == []

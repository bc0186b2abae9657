"""Tokenizers of GGUF files: the ids of the real llama.cpp, for every pre-tokenizer we know."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minillm.data.tokenizer import PAD, wrap
from minillm.errors import InputError
from minillm.models.interop.gguf_tokenizer import (
    _SAME,
    NAMES,
    add_tokenizer,
    make_pre_tokenizer,
    read_tokenizer,
)
from minillm.models.verify import TEXTS

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is built from source")

ALPHABET = (
    "abc XYZ 你好\n\r\t 12 ½²٣ 'sS 'LL 👩‍👩‍👧‍👦🏽 éà ü.,!?()[]{}<>_-+*/=\\|~`@#$%^&"
    "\u3000\u00a0\u200b\u0301αβ Я日本語ひらカタ한국"
)


def texts() -> list[str]:
    draw = random.Random(0)
    more = ["".join(draw.choices(ALPHABET, k=60)) for _ in range(150)]
    return [*TEXTS, "it's 12345 O'Clock, I'LL 2026", "x" * 30, "", " ", *more]


def write(tokenizer: PreTrainedTokenizerFast, path: Path, pre: str | None = None) -> Path:
    """Write a GGUF file without weights."""
    writer: Any = gguf.GGUFWriter(path, "llama")
    for name in ("block_count", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{name}")(8)
    writer.add_context_length(2048)
    writer.add_layer_norm_rms_eps(1e-5)
    config = SimpleNamespace(vocab_size=len(tokenizer) + 3, eos_token_id=None)
    add_tokenizer(writer, tokenizer, config)
    if pre is not None:
        writer.kv_data[0]["tokenizer.ggml.pre"].value = pre
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def read(path: Path) -> PreTrainedTokenizerFast:
    fields = gguf.GGUFReader(path).fields.items()
    return read_tokenizer({name: field.contents() for name, field in fields})


def assert_same_ids(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    theirs = [engine.tokenize(text.encode(), add_bos=True, special=True) for text in texts()]
    engine.close()
    for text, ids in zip(texts(), theirs, strict=True):
        assert tokenizer.encode(text) == ids, text
    return theirs


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerFast:
    """A tokenizer whose merges cross words, digits and spaces, so that any split shows."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1_200,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([text for text in texts() for _ in range(3)], trainer)
    backend.pre_tokenizer = make_pre_tokenizer("qwen2")
    backend.decoder = decoders.ByteLevel()
    return wrap(backend)


def test_every_known_pre_tokenizer_is_llama_cpps(small: Any, tmp_path: Path) -> None:
    found = {}
    for name in (*NAMES, *_SAME):
        path = write(small, tmp_path / "vocab.gguf", name)
        ids = assert_same_ids(path, read(path))
        found.setdefault(json.dumps(ids), []).append(name)
    groups = [set(names) for names in found.values()]
    wanted = [{name, *(other for other, same in _SAME.items() if same == name)} for name in NAMES]
    assert sorted(groups, key=sorted) == sorted(wanted, key=sorted)  # the texts tell them apart


def test_what_is_read_is_written_back(small: Any, tmp_path: Path) -> None:
    for name in NAMES:
        path = write(small, tmp_path / f"{name}.gguf", name)
        again = write(read(path), tmp_path / "again.gguf")
        first, second = (gguf.GGUFReader(p).fields for p in (path, again))
        keys = {key for key in first if key.startswith("tokenizer")}
        assert keys == {key for key in second if key.startswith("tokenizer")}
        for key in keys - {"tokenizer.ggml.token_type", "tokenizer.ggml.tokens"}:
            assert first[key].contents() == second[key].contents(), key
        tokens = first["tokenizer.ggml.tokens"].contents()
        assert second["tokenizer.ggml.tokens"].contents()[: len(small)] == tokens[: len(small)]


def test_bos_that_a_tokenizer_adds(small: Any, tmp_path: Path) -> None:
    backend = Tokenizer.from_str(small.backend_tokenizer.to_str())
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=PAD)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{PAD} $A", special_tokens=[(PAD, made.bos_token_id)]
    )
    path = write(made, tmp_path / "bos.gguf")
    ids = assert_same_ids(path, made)
    assert ids == assert_same_ids(path, read(path))
    assert all(row[:1] == [made.bos_token_id] for row in ids)
    assert_same_ids(write(small, tmp_path / "none.gguf"), small)


def test_tokens_that_merges_do_not_reach(small: Any, tmp_path: Path) -> None:
    tree = json.loads(small.backend_tokenizer.to_str())
    tree["pre_tokenizer"] = json.loads(make_pre_tokenizer("llama-bpe").__getstate__())
    vocabulary = tree["model"]["vocab"]
    # a word as a token although nothing merges to it: llama.cpp finds it under `llama-bpe`
    word = "qzxqzx"
    vocabulary[word] = vocabulary.pop(max(vocabulary, key=lambda token: vocabulary[token]))
    merges = [pair for pair in tree["model"]["merges"] if "".join(pair) in vocabulary]
    tree["model"]["merges"] = merges
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)))
    with pytest.raises(InputError, match=word):
        write(plain, tmp_path / "a.gguf")
    tree["model"]["ignore_merges"] = True
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)))
    path = write(whole, tmp_path / "b.gguf")
    assert_same_ids(path, read(path))
    assert read(path).encode(word) == [vocabulary[word]]

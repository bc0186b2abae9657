import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minillm import paths
from minillm.data import tokenizer as module
from minillm.data.tokenizer import (
    CHAT_TEMPLATE,
    find_tokenizer,
    fingerprint,
    load_tokenizer,
    plain_encoder,
    resolve_tokenizer,
    token_byte_lengths,
)
from minillm.errors import InputError

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
TEXT = st.lists(
    ANY_TEXT | st.sampled_from([*SPECIALS, "你好世界", " hello", "\r\n", "é", "👩‍👩‍👧"])
).map("".join)
TALK = st.text(st.sampled_from("ab 你好\n\t?<>/"), max_size=12)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_decoding_gives_back_any_text_and_lengths_count_its_bytes(text: str) -> None:
    tokenizer = load()
    ids = plain_encoder_of_bundled().encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert int(lengths()[ids].sum()) == len(text.encode())


@given(TEXT)
@settings(max_examples=200, deadline=None)
def test_no_text_can_spell_a_control_token(text: str) -> None:
    control = set(load().convert_tokens_to_ids(SPECIALS))
    assert not control & set(plain_encoder_of_bundled().encode(text).ids)


def test_bundled_tokenizer_has_the_designed_ids(bundled: PreTrainedTokenizerFast) -> None:
    assert len(bundled) == 32_004
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert bundled.convert_tokens_to_ids(names) == [0, 32_000, 32_001, 32_002, 32_003]
    assert (bundled.eos_token, bundled.pad_token, bundled.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )


def test_bundled_tokenizer_loads_with_auto_tokenizer(bundled: PreTrainedTokenizerFast) -> None:
    other = AutoTokenizer.from_pretrained(paths.BUNDLED_TOKENIZER)
    assert other.encode("你好 hello") == bundled.encode("你好 hello")
    assert other.chat_template == CHAT_TEMPLATE


def test_bundled_tokenizer_is_small_enough_for_a_package() -> None:
    size = sum(file.stat().st_size for file in paths.BUNDLED_TOKENIZER.iterdir())
    assert size < 3_000_000


def test_turn_marks_are_hidden_in_decoded_text_and_thoughts_are_not(
    bundled: PreTrainedTokenizerFast,
) -> None:
    ids = bundled.encode("<|im_start|><think>a</think><|im_end|>")
    assert bundled.decode(ids, skip_special_tokens=True) == "<think>a</think>"


def test_chat_template_renders_chatml(bundled: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " hi \n"},
        {"role": "assistant", "content": "\n hello "},
    ]
    assert render(bundled, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n hi \n<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "message",
    [
        {"content": "4", "reasoning_content": "2+2"},
        {"content": "<think>2+2</think>4"},
        {"content": "<think>\n2+2\n</think>\n\n4"},
        {"content": "2+2\n</think>\n\n4"},
    ],
    ids=["field", "inline", "as generated", "as generated after an open think"],
)
def test_only_the_last_answer_keeps_its_thought(
    bundled: PreTrainedTokenizerFast, message: dict[str, str]
) -> None:
    answer = {"role": "assistant", **message}
    ask = {"role": "user", "content": "?"}
    text = render(bundled, [ask, answer, ask, answer])
    short = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    long = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n<think>\n2+2\n</think>\n\n4"
    assert text == short + long + "<|im_end|>\n"


def test_enable_think_opens_a_thought(bundled: PreTrainedTokenizerFast) -> None:
    ask = [{"role": "user", "content": "?"}]
    plain = render(bundled, ask, add_generation_prompt=True)
    assert plain.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert render(bundled, ask, add_generation_prompt=True, enable_think=False) == plain
    thinking = render(bundled, ask, add_generation_prompt=True, enable_think=True)
    assert thinking == plain + "<think>\n"


@given(question=TALK, answer=TALK, thought=TALK)
@settings(max_examples=150, deadline=None)
def test_training_form_begins_with_the_tokens_of_the_inference_form(
    question: str, answer: str, thought: str
) -> None:
    tokenizer = load()
    ask = [{"role": "user", "content": question}]
    whole = [*ask, {"role": "assistant", "content": answer, "reasoning_content": thought}]
    trained = tokens(tokenizer, whole)
    asked = tokens(tokenizer, ask, add_generation_prompt=True, enable_think=bool(thought.strip()))
    assert trained[: len(asked)] == asked


def test_assistant_mask_covers_what_the_model_says(bundled: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two", "reasoning_content": "hm"},
    ]
    out = bundled.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [i for i, mine in zip(out["input_ids"], out["assistant_masks"], strict=True) if mine]
    assert bundled.decode(said) == "one<|im_end|><think>\nhm\n</think>\n\ntwo<|im_end|>"


def test_fingerprint_is_the_sha256_of_the_canonical_json(tmp_path: Path) -> None:
    tree = {"model": {"vocab": {"b": 1, "a": 0}, "merges": [["a", "b"]], "dropout": None}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree, indent=3))
    canonical = '{"model":{"merges":[["a","b"]],"vocab":{"a":0,"b":1}}}'
    assert fingerprint(tmp_path) == hashlib.sha256(canonical.encode()).hexdigest()


def test_fingerprint_survives_loading_padding_and_saving(
    tmp_path: Path, bundled: PreTrainedTokenizerFast
) -> None:
    wanted = fingerprint(paths.BUNDLED_TOKENIZER)
    assert fingerprint(bundled) == wanted
    other = load_tokenizer(paths.BUNDLED_TOKENIZER)
    other(["a", "b c d"], padding=True, truncation=True, max_length=4)
    other.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) == wanted


def test_fingerprint_survives_the_older_way_to_write_merges(tmp_path: Path) -> None:
    tree = json.loads((paths.BUNDLED_TOKENIZER / "tokenizer.json").read_bytes())
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert fingerprint(tmp_path) == fingerprint(paths.BUNDLED_TOKENIZER)


def test_fingerprint_tells_two_tokenizers_apart(small_folder: Path) -> None:
    assert fingerprint(small_folder) != fingerprint(paths.BUNDLED_TOKENIZER)


def test_find_tokenizer_looks_near_then_in_the_package(small_folder: Path, tmp_path: Path) -> None:
    assert find_tokenizer(fingerprint(paths.BUNDLED_TOKENIZER)) == paths.BUNDLED_TOKENIZER
    near = [tmp_path, small_folder]
    assert find_tokenizer(fingerprint(small_folder), near) == small_folder
    shutil.copytree(
        small_folder, tmp_path / "tokenizer"
    )  # as the demo lays it beside its token file
    assert find_tokenizer(fingerprint(tmp_path / "tokenizer"), [tmp_path]) == tmp_path / "tokenizer"
    with pytest.raises(InputError, match="000000000000") as caught:
        find_tokenizer("0" * 64)
    assert "--tokenizer" in str(caught.value.hint)


def test_auto_prefers_the_tokenizer_trained_here(
    tmp_path: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_tokenizer(Path("auto")) == paths.BUNDLED_TOKENIZER
    shutil.copytree(small_folder, paths.TOKENIZER)
    assert resolve_tokenizer(Path("auto")) == paths.TOKENIZER
    assert resolve_tokenizer(Path("bundled")) == paths.BUNDLED_TOKENIZER
    assert resolve_tokenizer(paths.TOKENIZER / "tokenizer.json") == paths.TOKENIZER


def test_a_folder_without_tokenizer_is_an_input_error(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=place.name):
            load_tokenizer(place)
        with pytest.raises(InputError, match=place.name):
            resolve_tokenizer(place)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"model": {"type": "BPE"}}', "\xff"])
def test_a_broken_tokenizer_json_is_an_input_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_bare_tokenizer_json_gets_eos_pad_and_template(tmp_path: Path) -> None:
    shutil.copy(paths.BUNDLED_TOKENIZER / "tokenizer.json", tmp_path)
    bare = load_tokenizer(tmp_path)
    assert (bare.eos_token_id, bare.pad_token_id) == (32_001, 0)
    assert bare.chat_template == CHAT_TEMPLATE
    assert fingerprint(bare) == fingerprint(tmp_path)


def test_byte_lengths_need_a_byte_level_tokenizer() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(InputError, match="not byte-level"):
        token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=words))


def test_separator_is_im_end_or_else_the_eos(bundled: PreTrainedTokenizerFast) -> None:
    assert module.find_separator(bundled) == 32_001
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with_eos = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert module.find_separator(with_eos) == 1
    with pytest.raises(InputError, match="neither"):
        module.find_separator(PreTrainedTokenizerFast(tokenizer_object=words))


@functools.cache
def load() -> PreTrainedTokenizerFast:
    return load_tokenizer(paths.BUNDLED_TOKENIZER)


@functools.cache
def plain_encoder_of_bundled() -> Tokenizer:
    return plain_encoder(load())


@functools.cache
def lengths() -> np.ndarray:
    return token_byte_lengths(load())


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **extra) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **extra)


def tokens(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **extra
) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **extra)

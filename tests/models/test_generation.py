"""Decoding with real models: ours against transformers' `generate`, and `generate` itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, StaticCache

from minillm.models.generator import Generator
from minillm.models.sampling import SamplingParams

PROMPT = [5, 9, 13, 40, 41, 7]


def hf_generate(model: Any, prompt: list[int], **kwargs: Any) -> list[int]:
    ids = torch.tensor([prompt])
    kwargs = {"do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)[0].tolist()


@pytest.mark.parametrize(("seed", "num"), [(0, 200), (1, 200), (2, 200)])
def test_greedy_tokens_are_those_of_generate(
    make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, seed: int, num: int
) -> None:
    model = make_model(seed, vocab_size=len(tokenizer))
    params = SamplingParams(temperature=0, max_tokens=num, min_tokens=num)
    ours = Generator(model, tokenizer).generate(PROMPT, params)
    theirs = hf_generate(model, PROMPT, max_new_tokens=num, min_new_tokens=num)
    assert list(ours.token_ids) == theirs[len(PROMPT) :]
    assert ours.completion_tokens == num


def test_greedy_answer_in_a_chat_is_that_of_generate(
    make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = Generator(make_model(vocab_size=len(tokenizer)), tokenizer)
    messages = [{"role": "user", "content": "hello"}]
    for _ in range(3):
        prompt = generator.encode_chat(messages)
        params = SamplingParams(temperature=0, max_tokens=12)
        done = generator.generate(prompt, params)
        theirs = hf_generate(generator.model, prompt, max_new_tokens=12)
        assert list(done.token_ids) == theirs[len(prompt) :]
        messages += [
            {"role": "assistant", "content": done.text},
            {"role": "user", "content": "the quick brown fox"},
        ]


def test_repetition_penalty_answer_is_that_of_generate(
    make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(vocab_size=len(tokenizer))
    params = SamplingParams(temperature=0, max_tokens=60, repetition_penalty=1.3)
    ours = Generator(model, tokenizer).generate(PROMPT, params)
    theirs = hf_generate(model, PROMPT, max_new_tokens=60, repetition_penalty=1.3)
    assert list(ours.token_ids) == theirs[len(PROMPT) :]


def test_generator_takes_an_official_model_too(
    make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(vocab_size=len(tokenizer))
    official = model.export_official()
    assert isinstance(official, LlamaForCausalLM)
    params = SamplingParams(temperature=0, max_tokens=30)
    answers = [
        Generator(m, tokenizer).generate(PROMPT, params).token_ids for m in (model, official)
    ]
    assert answers[0] == answers[1]


def test_seeded_answers_repeat(
    make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = Generator(make_model(vocab_size=len(tokenizer)), tokenizer)
    answers = [
        generator.generate(PROMPT, SamplingParams(seed=seed, max_tokens=20)).token_ids
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_training_works_after_generating(
    make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(vocab_size=len(tokenizer))
    Generator(model, tokenizer).generate(PROMPT, SamplingParams(max_tokens=5))
    ids = torch.tensor([PROMPT])
    model.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_left_padding_does_not_change_an_answer(model: Any) -> None:
    alone = hf_generate(model, PROMPT, max_new_tokens=20)
    batch = torch.tensor([[0, 0, 0, *PROMPT], [5, 6, 7, 8, 9, 10, 11, 12, 13]])
    mask = (batch != 0).long()
    both = model.generate(
        batch, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    assert both[0, 3 : 3 + len(alone)].tolist() == alone


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_from_embeddings_is_generate_from_ids(model: Any, num_beams: int) -> None:
    embeddings = model.model.embed_tokens(torch.tensor([PROMPT]))
    kwargs = {"do_sample": False, "max_new_tokens": 12, "num_beams": num_beams, "pad_token_id": 0}
    from_embeddings = model.generate(
        inputs_embeds=embeddings, attention_mask=torch.ones(1, len(PROMPT)), **kwargs
    )
    assert from_embeddings[0].tolist() == hf_generate(model, PROMPT, **kwargs)[len(PROMPT) :]


def test_static_cache_gives_the_tokens_of_a_dynamic_one(model: Any) -> None:
    cache = StaticCache(config=model.config, max_cache_len=64)
    static = hf_generate(
        model, PROMPT, max_new_tokens=30, past_key_values=cache, disable_compile=True
    )
    assert static == hf_generate(model, PROMPT, max_new_tokens=30)


def test_reserved_cache_works_with_beam_search(model: Any) -> None:
    kwargs = {"num_beams": 3, "max_new_tokens": 15}
    reserved = hf_generate(model, PROMPT, past_key_values=model.make_cache(3, 8), **kwargs)
    assert reserved == hf_generate(model, PROMPT, **kwargs)


def test_conversation_continues_from_its_cache(model: Any) -> None:
    cache = model.make_cache(1, 64)
    first = hf_generate(model, PROMPT, max_new_tokens=10, past_key_values=cache)
    longer = [*first, 50, 51, 52]
    continued = hf_generate(model, longer, max_new_tokens=10, past_key_values=cache)
    assert continued == hf_generate(model, longer, max_new_tokens=10)


def test_prompt_lookup_gives_the_greedy_tokens(model: Any) -> None:
    looked_up = hf_generate(model, PROMPT * 3, max_new_tokens=20, prompt_lookup_num_tokens=3)
    assert looked_up == hf_generate(model, PROMPT * 3, max_new_tokens=20)


def test_scores_of_generate_are_the_logits_of_forward(model: Any) -> None:
    ids = torch.tensor([PROMPT])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=6,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    logits = model(output.sequences).logits[0, len(PROMPT) - 1 : -1]
    torch.testing.assert_close(torch.cat(output.scores), logits, atol=1e-5, rtol=0)

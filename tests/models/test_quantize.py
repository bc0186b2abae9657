"""Packed weights and the decoding step made of them."""

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from minillm.errors import ConfigError
from minillm.models import cpu_kernels, quantize, registry
from minillm.models.fast_decode import LlamaStep, make_decode_step
from minillm.models.quantize import KINDS, PackedLinear, quantize_model, rounded, rounded_input
from minillm.models.slot_cache import SlotCache

# largest distance from the weight, as a share of the largest weight of its group
STEPS = {"none": 0.0, "fp16": 2**-11, "int8": 0.5 / 127 * 1.1, "int4": 1 / 15 * 1.1}


def build(name: str, **fields: Any) -> Any:
    torch.manual_seed(1)
    config = registry.build_config(name, vocab_size=300, **fields)
    return registry.build_model(config).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 50])
@pytest.mark.parametrize("shape", [(16, 32), (40, 64), (100, 100), (5, 4), (33, 130)])
def test_a_packed_product_is_that_of_rounded_weights_and_inputs(
    kind: Any, tokens: int, shape: tuple[int, int]
) -> None:
    linear = nn.Linear(shape[1], shape[0], bias=tokens == 2)
    x = torch.randn(tokens, shape[1])
    with torch.inference_mode():
        found = PackedLinear(linear, kind)(x)
        expected = nn.functional.linear(
            rounded_input(x, kind).double(), rounded(linear.weight, kind).double(),
            None if linear.bias is None else linear.bias.double(),
        )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_as_fine_as_its_bits_allow(kind: Any) -> None:
    weight = torch.randn(48, 96) * torch.logspace(-3, 1, 48).unsqueeze(1)
    error = (rounded(weight, kind) - weight).abs().unflatten(1, (-1, 32)).amax(-1)
    reach = weight.abs().unflatten(1, (-1, 32)).amax(-1)
    assert (error <= STEPS[kind] * reach * 1.0001).all()
    assert torch.equal(rounded(torch.zeros(16, 32), kind), torch.zeros(16, 32))


def greedy(step: Any, model: Any, prompt: torch.Tensor, num: int) -> tuple[list[int], Any]:
    cache, ids, found = model.make_cache(1, 8), prompt, []
    for _ in range(num):
        logits = step(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(ids))
    return found, logits


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_attention_heads": 4, "num_key_value_heads": 1}, {"tie_word_embeddings": False}],
)
def test_a_step_gives_the_tokens_of_transformers(fields: dict[str, Any]) -> None:
    model = build("mini_llama3:tiny", **fields)
    prompt = torch.randint(0, 300, (1, 21))
    expected = model.generate(prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    step = make_decode_step(quantize_model(model, "none"))
    assert isinstance(step, LlamaStep)
    assert greedy(step, model, prompt, 40)[0] == expected[0, 21:].tolist()


class HalfCache(DynamicCache):
    """Keys and values rounded to fp16 on their way in."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any) -> Any:
        return super().update(key_states.half().float(), value_states.half().float(), *args)


def round_layers(reference: Any, kind: Any) -> None:
    """Round the weights of all linear layers, and what goes into them."""
    for module in reference.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data, kind)
            module.register_forward_pre_hook(lambda _, args: rounded_input(args[0], kind))


@pytest.mark.parametrize("kind", ["fp16", "int8", "int4"])
def test_a_quantized_step_is_a_model_with_rounded_weights_and_cache(kind: Any) -> None:
    reference, model = build("mini_llama3:tiny"), build("mini_llama3:tiny")
    reference.lm_head.weight = nn.Parameter(reference.lm_head.weight.detach().clone())
    round_layers(reference, kind)
    step = make_decode_step(quantize_model(model, kind))
    prompt = torch.randint(0, 300, (1, 9))
    found, logits = greedy(step, model, prompt, 12)
    with torch.inference_mode():
        ids = torch.cat((prompt, torch.tensor([found[:-1]])), dim=1)
        cache = HalfCache(config=reference.config)
        expected = reference(ids, past_key_values=cache, use_cache=True).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_rows_of_a_slot_cache_decode_as_alone() -> None:
    model = build("mini_llama3:tiny")
    prompts = [torch.randint(0, 300, (1, n)) for n in (5, 17, 9)]
    expected = [
        model.generate(p, max_new_tokens=9, min_new_tokens=9, do_sample=False)[0, p.shape[1] :]
        for p in prompts
    ]
    step = make_decode_step(quantize_model(model, "none"))
    cache, last = SlotCache(model, 3, 64), []
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    for slot, prompt in enumerate(prompts):
        places = cache.begin_chunk(slot, 0, prompt.shape[1])
        logits = step(input_ids=prompt, position_ids=places, attention_mask=None, **options)
        last.append(logits[:, -1].argmax(-1))
    found = [last]
    for past in range(8):
        ids = torch.stack(found[-1])
        places, mask = cache.begin_batch([p.shape[1] + past for p in prompts], 1)
        logits = step(input_ids=ids, position_ids=places, attention_mask=mask, **options)
        found.append(list(logits[:, -1].argmax(-1, keepdim=True)))
    assert torch.equal(torch.stack([torch.stack(x) for x in found]).squeeze(-1).T,
                       torch.stack(expected))  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "fp16"])
def test_all_logits_of_several_tokens_of_several_rows(kind: Any) -> None:
    model = build("mini_llama3:tiny")
    rows = [torch.randint(0, 300, (1, n)) for n in (13, 6)]
    reference = build("mini_llama3:tiny")
    reference.lm_head.weight = nn.Parameter(reference.lm_head.weight.detach().clone())
    round_layers(reference, kind)
    caches = [HalfCache(config=reference.config) if kind == "fp16" else None for _ in rows]
    with torch.inference_mode():
        expected = [
            reference(row, past_key_values=cache, use_cache=cache is not None).logits
            for row, cache in zip(rows, caches, strict=True)
        ]
    step = make_decode_step(quantize_model(model, kind))
    forward, cache = model.forward, SlotCache(model, 2, 32)
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    for slot, row in enumerate(rows):
        places = cache.begin_chunk(slot, 0, row.shape[1] - 3)
        # the very first call makes the layers; after it there is no other way than the kernel
        model.forward = forward if slot == 0 else None
        found = step(input_ids=row[:, :-3], position_ids=places, attention_mask=None,
                     logits_to_keep=0, **options)  # fmt: skip
        torch.testing.assert_close(found, expected[slot][:, :-3], atol=1e-4, rtol=1e-4)
    places, mask = cache.begin_batch([row.shape[1] - 3 for row in rows], 3)
    found = step(input_ids=torch.cat([row[:, -3:] for row in rows]), position_ids=places,
                 attention_mask=mask, logits_to_keep=3, **options)  # fmt: skip
    ends = torch.cat([logits[:, -3:] for logits in expected])
    torch.testing.assert_close(found, ends, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mini_deepseekv3:tiny", "mini_qwen3_next:tiny"])
def test_other_models_take_packed_layers(name: str) -> None:
    model = build(name)
    ids = torch.randint(0, 300, (2, 12))
    with torch.inference_mode():
        expected = model(ids).logits
        packed = quantize_model(model, "none")
        assert sum(isinstance(m, PackedLinear) for m in packed.modules()) > 8
        found = make_decode_step(packed)(input_ids=ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_without_a_compiler_the_answers_are_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.randint(0, 300, (1, 12))
    with torch.inference_mode():
        expected = quantize_model(build("mini_llama3:tiny"), "int8")(ids).logits
        cpu_kernels.load_kernels.cache_clear()
        monkeypatch.setenv("CXX", "/no/compiler")
        with caplog.at_level(logging.WARNING, "minillm"):
            found = quantize_model(build("mini_llama3:tiny"), "int8")(ids).logits
    cpu_kernels.load_kernels.cache_clear()
    assert "slower" in caplog.text
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_only_a_cpu_is_served() -> None:
    model = build("mini_llama3:tiny").to("meta")
    with pytest.raises(ConfigError, match="is for CPUs"):
        quantize_model(model, "int8")
    assert quantize.quantize_model(model, "none") is model

"""mini_llama3 against transformers' own LlamaForCausalLM with the same weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minillm.models import MiniLlama3ForCausalLM

TOLERANCE = 1e-5
VARIANTS = {
    "default": {},
    "untied": {"tie_word_embeddings": False},
    "one_kv_head": {"num_key_value_heads": 1},
    "no_grouping": {"num_key_value_heads": 4},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "narrow_heads": {"head_dim": 4},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.fixture(params=VARIANTS, ids=str)
def pair(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> tuple[Any, Any]:
    ours = make_model(**VARIANTS[request.param])
    official = ours.export_official()
    assert type(official) is LlamaForCausalLM
    return ours, official


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: torch.Tensor, official: torch.Tensor) -> None:
    torch.testing.assert_close(ours, official, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_logits_are_those_of_llama(pair: tuple[Any, Any]) -> None:
    ours, official = pair
    assert_close(ours(ids(2, 40)).logits, official(ids(2, 40)).logits)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_after_left_padding_are_those_of_llama(pair: tuple[Any, Any], batch: int) -> None:
    ours, official = pair
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[0, :5] = 0
    kwargs = {"input_ids": ids(batch, 12), "attention_mask": mask}
    kept = mask.bool()
    assert_close(ours(**kwargs).logits[kept], official(**kwargs).logits[kept])


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 5])
def test_cached_logits_are_those_of_llama(pair: tuple[Any, Any], step: int) -> None:
    tokens = ids(2, 20)
    caches: list[Any] = [None, None]
    for start in range(0, 20, step):
        piece = tokens[:, start : start + step]
        outputs = [
            model(piece, past_key_values=cache, use_cache=True)
            for model, cache in zip(pair, caches, strict=True)
        ]
        assert_close(outputs[0].logits, outputs[1].logits)
        caches = [output.past_key_values for output in outputs]


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(50)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_are_those_of_llama(pair: tuple[Any, Any], num_items: Any) -> None:
    labels = ids(2, 24)
    labels[:, :6] = -100
    losses = []
    for model in pair:
        model.zero_grad()
        loss = model(ids(2, 24), labels=labels, num_items_in_batch=num_items).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)
    official = dict(pair[1].named_parameters())
    for name, parameter in pair[0].named_parameters():
        torch.testing.assert_close(parameter.grad, official[name].grad, atol=1e-5, rtol=1e-4)


def test_greedy_answers_are_those_of_llama(pair: tuple[Any, Any]) -> None:
    answers = [
        model.generate(
            ids(1, 8),
            attention_mask=torch.ones(1, 8),
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=0,
        ).tolist()
        for model in pair
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "longrope"])
@torch.no_grad()
def test_other_rope_scalings_are_those_of_llama(
    make_model: Callable[..., Any], rope_type: str
) -> None:
    rope: dict[str, Any] = {
        "rope_type": rope_type,
        "rope_theta": 10_000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    }
    if rope_type == "longrope":
        rope |= {"short_factor": [1.5] * 8, "long_factor": [3.0] * 8}
    if rope_type in ("linear", "dynamic"):
        del rope["original_max_position_embeddings"]
    ours = make_model(rope_parameters=rope, max_position_embeddings=64)
    official = ours.export_official()
    for length in (20, 90):  # before and beyond the original length
        assert_close(ours(ids(1, length)).logits, official(ids(1, length)).logits)


@torch.no_grad()
def test_exported_folder_loads_as_llama(model: Any, tmp_path: Path) -> None:
    model.export_official().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert_close(model(ids(2, 9)).logits, loaded(ids(2, 9)).logits)


@torch.no_grad()
def test_own_folder_with_model_type_rewritten_loads_as_llama(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    path.write_text(json.dumps(fields), encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert_close(model(ids(2, 9)).logits, loaded(ids(2, 9)).logits)


@torch.no_grad()
def test_llama_folder_with_model_type_rewritten_loads_as_ours(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    official = LlamaForCausalLM(config).eval()
    official.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {"model_type": "mini_llama3", "architectures": ["MiniLlama3ForCausalLM"]}
    path.write_text(json.dumps(fields), encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MiniLlama3ForCausalLM
    assert_close(loaded(ids(2, 9)).logits, official(ids(2, 9)).logits)


@torch.no_grad()
def test_from_official_takes_a_llama_and_nothing_else(model: Any) -> None:
    official = model.export_official()
    back = MiniLlama3ForCausalLM.from_official(official)
    assert_close(back(ids(2, 9)).logits, official(ids(2, 9)).logits)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    with pytest.raises(ValueError, match="mini_llama3"):
        MiniLlama3ForCausalLM.from_official(model)


@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_llama_in_bf16(model: Any) -> None:
    exact = model(ids(2, 40)).logits
    ours = model.to(torch.bfloat16)
    # `.to` rounds the frequencies too; loading in bf16 does not
    ours.model.rotary_emb.inv_freq = ours.model.rotary_emb.inv_freq.float()
    official = ours.export_official()
    errors = [
        (m(ids(2, 40)).logits.float() - exact).square().mean().sqrt() for m in (ours, official)
    ]
    assert errors[0] < 1.3 * errors[1]

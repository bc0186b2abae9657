"""Prediction of the token after the next: against transformers' block, and label by label."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)

from minillm.models.base import flop_parts
from minillm.models.mtp import next_labels

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 4,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))


def make(**overrides: Any) -> Any:
    from minillm.models import registry

    torch.manual_seed(0)
    model: Any = registry.build_model(registry.build_config("mini_deepseekv3", **SHAPE | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.15).add_(1.0 if "norm" in name else 0.0)
        for gate in model.gates:
            gate.weight.normal_(0, 0.7)
            gate.e_score_correction_bias.normal_(0, 0.2)
    return model.train()


def official_block(model: Any, depth: int) -> Any:
    """Return transformers' block with our weights, by the names of a checkpoint."""
    config = model.export_official().config.get_mtp_config()
    config._attn_implementation = "eager"
    block = MtpLayer(config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, 0)
    prefix = f"model.layers.{model.config.num_hidden_layers + depth}."
    weights = {
        key.removeprefix(prefix): value
        for key, value in model.state_dict().items()
        if key.startswith(prefix)
    }
    weights["post_norm.weight"] = weights.pop("shared_head.norm.weight")
    own = ("enorm", "hnorm", "eh_proj", "post_norm")
    block.load_state_dict(
        {k if k.startswith(own) else f"mtp_block.{k}": v for k, v in weights.items()}
    )
    return block


@pytest.mark.parametrize("depths", [1, 2])
def test_loss_is_that_of_the_official_block(depths: int) -> None:
    model = make(num_nextn_predict_layers=depths, aux_loss_alpha=0.0)
    labels = IDS.clone()
    labels[0, :9] = -100
    model(IDS, labels=labels)
    hidden = model.model(IDS).last_hidden_state
    embeds, total, count = model.model.embed_tokens(IDS), 0.0, 0
    for depth in range(depths):
        block = official_block(model, depth)
        hidden, embeds = hidden[:, :-1], embeds[:, 1:]
        positions = torch.arange(depth + 1, 20)[None]
        cos, sin = model.model.rotary_emb(hidden, positions)
        mask = create_causal_mask(
            config=block.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
        )
        # ours has half of sin negated, for its own form of the rotation
        sin = torch.cat((-sin[..., :4], sin[..., 4:]), -1)
        hidden = block(embeds, hidden, (cos.squeeze(2), sin.squeeze(2)), mask, positions, None)
        logits = model.lm_head(hidden)[:, :-1]
        target = labels[:, depth + 2 :]
        total = total + F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        count += int((target != -100).sum())
    torch.testing.assert_close(model.metrics["mtp_loss"], (total / count).detach())
    # and its gradient, divided as the cross entropy is
    weight = 0.3 / depths / int((labels[:, 1:] != -100).sum())
    probe = [model.model.layers[0].self_attn.o_proj.weight, model.model.embed_tokens.weight]
    with_it = torch.autograd.grad(model(IDS, labels=labels).loss, probe)
    model.config.mtp_loss_weight = 0.0
    without = torch.autograd.grad(model(IDS, labels=labels).loss, probe)
    expected = torch.autograd.grad(total * weight, probe)
    for a, b, c in zip(with_it, without, expected, strict=True):
        torch.testing.assert_close(a - b, c, atol=2e-6, rtol=1e-3)


def test_no_label_lies_in_another_document_or_beyond_the_row() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3, 12):
        document = (torch.rand(50, length, generator=generator) < 0.3).cumsum(-1)
        tokens = torch.arange(length).expand(50, -1)
        labels = F.pad(tokens[:, 1:], (0, 1), value=77)  # 77: the token after the row
        for depth in (2, 3):
            labels = next_labels(labels, document)
            for row in range(50):
                for i in range(length):
                    seen = document[row, i : i + depth + 1].unique()
                    fits = i + depth < length and len(seen) == 1
                    assert int(labels[row, i]) == (i + depth if fits else -100)


def test_blocks_are_not_part_of_decoding_and_learn_only_in_training() -> None:
    model = make().eval()
    block = model.model.layers[-1]
    block.register_forward_pre_hook(lambda *_: pytest.fail("block ran"))
    model(IDS, labels=IDS)
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    model.model(IDS)


def test_further_blocks_do_not_hold_the_table_or_the_head() -> None:
    model = make()
    model.resize_token_embeddings(101)
    assert sum(p.shape[0] == 101 for p in model.parameters()) == 1
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_flops_of_the_blocks_are_those_that_run() -> None:
    """Three times the multiplications that the forward pass of training has more with blocks."""

    def count_grouped(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * int(x[0]) * int(weight[-1]) * int(weight[-2])

    mapping = {torch.ops.aten._grouped_mm: count_grouped}
    ran, parts, vectors = [], [], 0
    for blocks in (0, 2):
        model = make(num_nextn_predict_layers=blocks)
        model.set_attn_implementation("eager")
        counter = FlopCounterMode(display=False, custom_mapping=mapping)
        with counter, torch.no_grad():
            model(IDS, labels=IDS, use_cache=False)
        ran.append(3 * counter.get_total_flops() / IDS.numel())
        parts.append(flop_parts(model, 20))
        vectors = sum(p.numel() for p in model.model.layers[2:].parameters() if p.ndim == 1)
    assert "further tokens" not in parts[0]
    assert parts[0]["matrices"] == parts[1]["matrices"]
    # the convention counts vectors as if they were multiplied like matrices, and the head for
    # every token; here it runs for those with a label, 18 and 17 of a row's 20
    unlabelled = 6 * 97 * 32 * (2 + 3) / 20
    assert parts[1]["further tokens"] == pytest.approx(ran[1] - ran[0] + 6 * vectors + unlabelled)

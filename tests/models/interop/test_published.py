"""Checkpoints in the published layout, whose logits a plain implementation here computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from minillm.models.load import load_model

State = dict[str, Tensor]
D, H, EPS = 32, 4, 1e-6


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def turn(x: Tensor) -> Tensor:
    """Rotary positions over halves; x is (T, heads, K)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None, None] * 10_000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("thk,shk->hts", q, k) / q.shape[-1] ** 0.5
    mask = torch.ones(len(q), len(q)).triu(1).bool()
    return torch.einsum("hts,shk->thk", scores.masked_fill(mask, -1e30).softmax(-1), v).flatten(1)


def mlp(x: Tensor, w: State, name: str) -> Tensor:
    gate = F.silu(x @ w[f"{name}.w1.weight"].T) * (x @ w[f"{name}.w3.weight"].T)
    return gate @ w[f"{name}.w2.weight"].T


def llama_attention(x: Tensor, w: State, a: str) -> Tensor:
    q, k, v = ((x @ w[f"{a}.{n}_proj.weight"].T).unflatten(-1, (-1, 8)) for n in "qkv")
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    return attend(turn(q), turn(k), v) @ w[f"{a}.o_proj.weight"].T


def deepseek_attention(x: Tensor, w: State, a: str) -> Tensor:
    q = norm(x @ w[f"{a}.wq_a.weight"].T, w[f"{a}.q_norm.weight"]) @ w[f"{a}.wq_b.weight"].T
    q_nope, q_rope = q.unflatten(-1, (H, 16)).split([8, 8], -1)
    latent, k_rope = (x @ w[f"{a}.wkv_a.weight"].T).split([16, 8], -1)
    kv = norm(latent, w[f"{a}.kv_norm.weight"]) @ w[f"{a}.wkv_b.weight"].T
    k_nope, v = kv.unflatten(-1, (H, 16)).split([8, 8], -1)
    k = torch.cat([k_nope, turn(k_rope[:, None]).expand(-1, H, -1)], -1)
    return attend(torch.cat([q_nope, turn(q_rope)], -1), k, v) @ w[f"{a}.wo.weight"].T


def moe(x: Tensor, w: State, m: str) -> Tensor:
    out = mlp(x, w, f"{m}.shared_experts")
    for t, row in enumerate(x):
        score = (w[f"{m}.gate.weight"] @ row).sigmoid()
        choice = score + w[f"{m}.gate.e_score_correction_bias"]
        groups = choice.view(2, 2).sum(-1)  # the two best of the two in each group
        choice = choice.masked_fill((groups < groups.max()).repeat_interleave(2), -1e30)
        chosen = choice.topk(2).indices
        for e in chosen:
            share = 1.5 * score[e] / score[chosen].sum()
            out[t] = out[t] + share * mlp(row, w, f"{m}.experts.{e}")
    return out


def forward(ids: Tensor, w: State, is_deepseek: bool) -> Tensor:
    x = w["model.embed_tokens.weight"][ids]
    for i in range(2):
        p = f"model.layers.{i}"
        h = norm(x, w[f"{p}.input_layernorm.weight"])
        x = x + (deepseek_attention if is_deepseek else llama_attention)(h, w, f"{p}.self_attn")
        h = norm(x, w[f"{p}.post_attention_layernorm.weight"])
        x = x + (moe if is_deepseek and i else mlp)(h, w, f"{p}.mlp")
    return norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def shapes(is_deepseek: bool, vocab: int) -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, D), "model.norm": (D,)}
    ffn = {"w1": (48, D), "w3": (48, D), "w2": (D, 48)}
    for i in range(2):
        p = f"model.layers.{i}"
        made |= {f"{p}.input_layernorm": (D,), f"{p}.post_attention_layernorm": (D,)}
        mla = {"wq_a": (24, D), "q_norm": (24,), "wq_b": (64, 24), "wkv_a": (24, D)}
        mla |= {"kv_norm": (16,), "wkv_b": (64, 16), "wo": (D, 32)}
        gqa = {"q_proj": (D, D), "k_proj": (16, D), "v_proj": (16, D), "o_proj": (D, D)}
        made |= {f"{p}.self_attn.{n}": s for n, s in (mla if is_deepseek else gqa).items()}
        places = ["mlp"]
        if is_deepseek and i:
            places = [f"mlp.experts.{e}" for e in range(4)] + ["mlp.shared_experts"]
            made[f"{p}.mlp.gate"] = (4, D)
        made |= {f"{p}.{place}.{n}": s for place in places for n, s in ffn.items()}
    return made


COMMON = {
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "rms_norm_eps": EPS,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "attn_impl": "sdpa",
}
FIELDS: dict[str, dict[str, Any]] = {
    "mini_llama3": {"num_key_value_heads": 2, "head_dim": 8},
    "mini_deepseekv3": {
        "moe_intermediate_size": 48,
        "num_dense_layers": 1,
        "n_routed_experts": 4,
        "n_activated_experts": 2,
        "n_shared_experts": 1,
        "n_expert_groups": 2,
        "n_limited_groups": 1,
        "route_scale": 1.5,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "use_mtp": True,
        "mtp_loss_lambda": 1e-4,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("kind", FIELDS)
def test_published_checkpoint_gives_its_own_logits(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    is_deepseek, vocab = kind == "mini_deepseekv3", len(tokenizer)
    torch.manual_seed(0)
    w = {f"{n}.weight": torch.randn(s) * 0.3 for n, s in shapes(is_deepseek, vocab).items()}
    if is_deepseek:
        w["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.randn(4) * 0.3
        w["model.mtp.eh_proj.weight"] = torch.randn(D, 2 * D)
    save_file(w, tmp_path / "model.safetensors", {"format": "pt"})
    fields = COMMON | FIELDS[kind] | {"model_type": kind, "vocab_size": vocab}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    ids = torch.randint(3, vocab, (30,))
    torch.testing.assert_close(
        model(ids[None]).logits[0], forward(ids, w, is_deepseek), atol=2e-5, rtol=0
    )

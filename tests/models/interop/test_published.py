"""Checkpoints in the published layout, whose logits a plain implementation here computes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from minillm.errors import InputError
from minillm.models.load import load_model
from tests.data.loopback_hub import LoopbackHub, running_hub

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


def gated_attention(x: Tensor, w: State, a: str) -> Tensor:
    """Qwen3-Next's attention, every feature turned, whatever its config says."""
    q, gate = (x @ w[f"{a}.q_proj.weight"].T).unflatten(-1, (H, 16)).chunk(2, -1)
    k, v = ((x @ w[f"{a}.{n}_proj.weight"].T).unflatten(-1, (2, 8)) for n in "kv")
    q, k = norm(q, 1 + w[f"{a}.q_norm.weight"]), norm(k, 1 + w[f"{a}.k_norm.weight"])
    k, v = (t.repeat_interleave(2, 1) for t in (turn(k), v))
    out = attend(turn(q), k, v) * gate.flatten(1).sigmoid()
    return out @ w[f"{a}.o_proj.weight"].T


def delta_rule(x: Tensor, w: State, a: str) -> Tensor:
    """Gated DeltaNet, token by token: 2 key heads and 4 value heads of 8."""
    # by key head: query 8, key 8, values 2 * 8, gates 2 * 8
    parts = (x @ w[f"{a}.in_proj_qkvz.weight"].T).unflatten(-1, (2, 48)).split([8, 8, 16, 16], -1)
    q, k, v, z = (part.flatten(1) for part in parts)
    b, decay = (x @ w[f"{a}.in_proj_ba.weight"].T).unflatten(-1, (2, 4)).split([2, 2], -1)
    mixed, kernel = torch.cat([q, k, v], -1), w[f"{a}.conv1d.weight"][:, 0]
    rows = torch.cat([torch.zeros(3, mixed.shape[1]), mixed])
    mixed = F.silu(torch.stack([(rows[t : t + 4].T * kernel).sum(1) for t in range(len(x))]))
    q, k, v = (part.unflatten(-1, (-1, 8)) for part in mixed.split([16, 16, 32], -1))
    q, k = (t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q, k = (t.repeat_interleave(2, 1) for t in (q / 8**0.5, k))
    step = F.softplus(decay.flatten(1) + w[f"{a}.dt_bias"])
    keep, beta = (-w[f"{a}.A_log"].exp() * step).exp(), b.flatten(1).sigmoid()
    state, out = torch.zeros(4, 8, 8), []
    for t in range(len(x)):
        state = state * keep[t][:, None, None]
        missing = (v[t] - torch.einsum("hk,hkv->hv", k[t], state)) * beta[t][:, None]
        state = state + torch.einsum("hk,hv->hkv", k[t], missing)
        out.append(torch.einsum("hk,hkv->hv", q[t], state))
    mixed = norm(torch.stack(out), w[f"{a}.norm.weight"]) * F.silu(z.unflatten(-1, (4, 8)))
    return mixed.flatten(1) @ w[f"{a}.out_proj.weight"].T


def softmax_moe(x: Tensor, w: State, m: str) -> Tensor:
    gate = (x @ w[f"{m}.shared_expert_gate.weight"].T).sigmoid()
    out = mlp(x, w, f"{m}.shared_expert") * gate
    for t, row in enumerate(x):
        score = (w[f"{m}.gate.weight"] @ row).softmax(-1)
        chosen = score.topk(2).indices
        for e in chosen:
            out[t] = out[t] + score[e] / score[chosen].sum() * mlp(row, w, f"{m}.experts.{e}")
    return out


def forward(ids: Tensor, w: State, kind: str) -> Tensor:
    """The first feed-forward of DeepSeek and of Qwen3-Next is dense, as are both of Llama."""
    is_qwen = kind == "mini_qwen3_next"
    attention, sparse, one = {
        "mini_llama3": ((llama_attention, llama_attention), mlp, 0),
        "mini_deepseekv3": ((deepseek_attention, deepseek_attention), moe, 0),
        "mini_qwen3_next": ((delta_rule, gated_attention), softmax_moe, 1),
    }[kind]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(2):
        p = f"model.layers.{i}"
        h = norm(x, one + w[f"{p}.input_layernorm.weight"])
        place = "linear_attn" if is_qwen and i == 0 else "self_attn"
        x = x + attention[i](h, w, f"{p}.{place}")
        h = norm(x, one + w[f"{p}.post_attention_layernorm.weight"])
        x = x + (sparse if i else mlp)(h, w, f"{p}.mlp")
    return norm(x, one + w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


MIXERS: dict[str, dict[str, tuple[int, ...]]] = {
    "mini_llama3": {"q_proj": (D, D), "k_proj": (16, D), "v_proj": (16, D), "o_proj": (D, D)},
    "mini_deepseekv3": {
        "wq_a": (24, D),
        "q_norm": (24,),
        "wq_b": (64, 24),
        "wkv_a": (24, D),
        "kv_norm": (16,),
        "wkv_b": (64, 16),
        "wo": (D, 32),
    },
    "mini_qwen3_next": {
        "q_proj": (64, D),
        "k_proj": (16, D),
        "v_proj": (16, D),
        "o_proj": (D, D),
        "q_norm": (8,),
        "k_norm": (8,),
    },
}
LINEAR = {"in_proj_qkvz": (96, D), "in_proj_ba": (8, D), "conv1d": (64, 1, 4)}
LINEAR |= {"norm": (8,), "out_proj": (D, 32)}


def shapes(kind: str, vocab: int) -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, D), "model.norm": (D,)}
    ffn = {"w1": (48, D), "w3": (48, D), "w2": (D, 48)}
    shared = {"mini_deepseekv3": "shared_experts", "mini_qwen3_next": "shared_expert"}
    for i in range(2):
        p = f"model.layers.{i}"
        made |= {f"{p}.input_layernorm": (D,), f"{p}.post_attention_layernorm": (D,)}
        if kind == "mini_qwen3_next" and i == 0:
            made |= {f"{p}.linear_attn.{n}": s for n, s in LINEAR.items()}
        else:
            made |= {f"{p}.self_attn.{n}": s for n, s in MIXERS[kind].items()}
        places = ["mlp"]
        if kind in shared and i:
            places = [f"mlp.experts.{e}" for e in range(4)] + [f"mlp.{shared[kind]}"]
            made[f"{p}.mlp.gate"] = (4, D)
        if kind == "mini_qwen3_next" and i:
            made[f"{p}.mlp.shared_expert_gate"] = (1, D)
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
    "mini_qwen3_next": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "mlp_only_layers": [0],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
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


def save(kind: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> State:
    """Write a checkpoint as published, and return its weights."""
    vocab = len(tokenizer)
    torch.manual_seed(0)
    w = {f"{n}.weight": torch.randn(s) * 0.3 for n, s in shapes(kind, vocab).items()}
    if kind == "mini_deepseekv3":
        w["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.randn(4) * 0.3
        w["model.mtp.eh_proj.weight"] = torch.randn(D, 2 * D)
    if kind == "mini_qwen3_next":
        w |= {f"model.layers.0.linear_attn.{name}": torch.randn(4) for name in ("A_log", "dt_bias")}
    folder.mkdir()
    save_file(w, folder / "model.safetensors", {"format": "pt"})
    fields = COMMON | FIELDS[kind] | {"model_type": kind, "vocab_size": vocab}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return w


@torch.no_grad()
@pytest.mark.parametrize("kind", FIELDS)
def test_published_checkpoint_gives_its_own_logits(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    w = save(kind, tokenizer, tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    ids = torch.randint(3, len(tokenizer), (30,))
    torch.testing.assert_close(model(ids[None]).logits[0], forward(ids, w, kind), atol=2e-5, rtol=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with running_hub() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


@torch.no_grad()
def test_published_checkpoint_comes_from_the_hub_too(
    hub: LoopbackHub, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    w = save("mini_deepseekv3", tokenizer, tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.repos["lab/published"] = files | {"pytorch_model.bin": b"cos\nsystem", "evil.py": b"1/0"}
    model, _ = load_model("lab/published")
    ids = torch.randint(3, len(tokenizer), (30,))
    torch.testing.assert_close(
        model(ids[None]).logits[0], forward(ids, w, "mini_deepseekv3"), atol=2e-5, rtol=0
    )
    asked = {request.path.rpartition("/")[2] for request in hub.bodies()}
    assert not asked & {"pytorch_model.bin", "evil.py"}
    with pytest.raises(InputError, match=r"no `config\.json`"):
        load_model("lab/not-there")

"""mini_deepseekv3 against transformers' own DeepseekV3ForCausalLM with the same weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    StaticCache,
)

from minillm.errors import ConfigError
from minillm.models import MiniDeepseekV3Config, MiniDeepseekV3ForCausalLM, registry

TOLERANCE = 2e-5
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "routed_scaling_factor": 2.5, "max_position_embeddings": 256,
    "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "mscale": 0.7,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 32,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "untied": {"tie_word_embeddings": False},
    "one_group": {"n_group": 1, "topk_group": 1},
    "not_normed": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "bias_and_whole_query": {"attention_bias": True, "q_lora_rank": None},
    "query_bias": {"attention_bias": True},
    "yarn": {"rope_parameters": YARN},
    "rotate_half": {"rope_interleave": False},
    "two_shared_experts": {"n_shared_experts": 2, "first_k_dense_replace": 0},
}
LENGTHS = (5, 1, 9, 7)


def make(seed: int = 0, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    model = registry.build_model(registry.build_config("mini_deepseekv3", **SHAPE | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.15).add_(1.0 if "norm" in name else 0.0)
        for gate in model.gates:
            gate.weight.normal_(0, 0.7)
            gate.e_score_correction_bias.normal_(0, 0.2)
    return model.eval()


@pytest.fixture
def model() -> Any:
    return make()


@pytest.fixture(params=VARIANTS, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    ours = make(**VARIANTS[request.param])
    official = ours.export_official()
    assert type(official) is DeepseekV3ForCausalLM
    return ours, official


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


IDS = ids(2, 20)


def assert_close(ours: torch.Tensor, official: torch.Tensor, atol: float = TOLERANCE) -> None:
    torch.testing.assert_close(ours, official, atol=atol, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_deepseek(pair: tuple[Any, Any], implementation: str) -> None:
    ours, official = pair
    for each in pair:
        each.set_attn_implementation(implementation)
    logits = official(ids(2, 90)).logits
    assert logits.std() > 0.3  # else nothing is told apart
    assert_close(ours(ids(2, 90)).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_after_left_padding_are_those_of_deepseek(pair: tuple[Any, Any], batch: int) -> None:
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[0, :5] = 0
    kept = mask.bool()
    ours, official = (m(ids(batch, 12), attention_mask=mask).logits[kept] for m in pair)
    assert_close(ours, official)


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cached_logits_are_those_of_deepseek(
    pair: tuple[Any, Any], step: int, implementation: str
) -> None:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    caches: list[Any] = [None, None]
    for each in pair:
        each.set_attn_implementation(implementation)
    for start in range(0, 20, step):
        end = start + step
        outputs = [
            each(IDS[:, start:end], attention_mask=mask[:, :end], past_key_values=cache,
                 use_cache=True)
            for each, cache in zip(pair, caches, strict=True)
        ]  # fmt: skip
        kept = mask[:, start:end].bool()
        assert_close(outputs[0].logits[kept], outputs[1].logits[kept])
        caches = [output.past_key_values for output in outputs]
    for ours, official in zip(caches[0].layers, caches[1].layers, strict=True):
        assert ours.keys.shape == (2, 1, 20, 16)
        assert_close(ours.keys[1], official.keys[1])
        assert_close(ours.values[1], official.values[1])


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(50)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_are_those_of_deepseek(pair: tuple[Any, Any], num_items: Any) -> None:
    labels = ids(2, 24)
    labels[:, :6] = -100
    losses = []
    for each in pair:
        losses.append(each(ids(2, 24), labels=labels, num_items_in_batch=num_items).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)
    ours = dict(pair[0].named_parameters())
    for name, parameter in pair[1].named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=2e-5, rtol=1e-4)


def test_greedy_answers_are_those_of_deepseek(pair: tuple[Any, Any]) -> None:
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    ours, official = (
        each.generate(
            ids(2, 8), attention_mask=mask, do_sample=False, max_new_tokens=16, pad_token_id=0
        ).tolist()
        for each in pair
    )
    assert ours == official


@torch.no_grad()
def test_router_logits_and_hidden_states_are_those_of_deepseek(pair: tuple[Any, Any]) -> None:
    for each in pair:
        each.set_attn_implementation("eager")
    asked = dict.fromkeys(
        ("output_router_logits", "output_hidden_states", "output_attentions"), True
    )
    ours, official = (each(IDS, **asked) for each in pair)
    for name in ("router_logits", "hidden_states", "attentions"):
        for a, b in zip(getattr(ours, name), getattr(official, name), strict=True):
            assert_close(a, b)


def rewrite(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields), encoding="utf-8")


@torch.no_grad()
def test_own_folder_with_model_type_rewritten_loads_as_deepseek(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is MiniDeepseekV3ForCausalLM
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    rewrite(tmp_path, model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"])
    official = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(official) is DeepseekV3ForCausalLM
    assert_close(model(IDS).logits, official(IDS).logits)


@torch.no_grad()
def test_official_folder_with_model_type_rewritten_loads_as_ours(tmp_path: Path) -> None:
    official = make().export_official()
    official.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["scoring_func"] == "sigmoid"
    rewrite(
        tmp_path, model_type="mini_deepseekv3", architectures=["MiniDeepseekV3ForCausalLM"],
        num_nextn_predict_layers=0,
    )  # fmt: skip
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(ours) is MiniDeepseekV3ForCausalLM
    assert_close(ours(IDS).logits, official(IDS).logits)


@torch.no_grad()
def test_from_official_takes_a_deepseek_and_nothing_else(pair: tuple[Any, Any]) -> None:
    back = MiniDeepseekV3ForCausalLM.from_official(pair[1])
    assert torch.equal(back(IDS).logits, pair[0](IDS).logits)
    with pytest.raises(ValueError, match="mini_deepseekv3"):
        MiniDeepseekV3ForCausalLM.from_official(pair[0])


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_to_latents_is_attention_to_heads(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    from minillm.models.mla import MiniDeepseekV3Attention as Attention

    model = make(rope_parameters=YARN)
    model.set_attn_implementation(implementation)
    called = []
    latent = Attention.attend_to_latents
    monkeypatch.setattr(
        Attention, "attend_to_latents", lambda *a, **k: called.append(1) or latent(*a, **k)
    )
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    logits = {}
    for way in (True, False):
        if not way:
            monkeypatch.setattr(Attention, "is_short", lambda *_: False)
        cache, parts = None, []
        for piece, end in zip(IDS.split((6, 1, 1, 5, 7), 1), (6, 7, 8, 13, 20), strict=True):
            output = model(
                piece, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True,
                output_attentions=implementation == "eager",
            )  # fmt: skip
            cache = output.past_key_values
            parts.append(output.logits)
            if implementation == "eager":
                assert output.attentions[0].shape == (2, 4, piece.shape[1], end)
        logits[way] = torch.cat(parts, 1)[mask.bool()]
        assert bool(called) is way
        called.clear()
    assert_close(logits[True], logits[False], atol=1e-5)
    assert_close(logits[True], model(IDS, attention_mask=mask).logits[mask.bool()], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(20,), (1,) * 20, (8, 1, 11)])
def test_reserved_and_static_caches_give_the_logits_of_no_cache(
    model: Any, pieces: tuple[int, ...]
) -> None:
    reserved, static = model.make_cache(2, 4), StaticCache(model.config, max_cache_len=32)
    for cache in (reserved, static):
        logits = [model(p, past_key_values=cache).logits for p in IDS.split(pieces, 1)]
        assert_close(torch.cat(logits, 1), model(IDS).logits, atol=1e-5)
    assert reserved.layers[0].keys.shape == (2, 1, 20, 16)
    assert reserved.layers[0].values.shape == (2, 1, 20, 8)


def packed() -> tuple[torch.Tensor, dict[str, dict[str, Any]]]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    return ids(1, sum(LENGTHS), seed=3), {
        "position_ids": {"position_ids": positions},
        "cu_seq_lens": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
        "both": {"position_ids": positions, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
    }


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch and transformers
@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens", "both"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_logits_are_those_of_each_document_alone(
    model: Any, kind: str, implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    tokens, kinds = packed()
    together = model(tokens, use_cache=False, **kinds[kind]).logits
    alone = torch.cat([model(p, use_cache=False).logits for p in tokens.split(LENGTHS, 1)], 1)
    assert_close(together, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens"])
def test_packed_gradients_are_those_of_each_document_alone(kind: str) -> None:
    """In training: with the balance loss and the loss of the token after the next."""
    tokens, kinds = packed()
    together, alone = (make(aux_loss_alpha=0.5, mtp_loss_weight=0.7).train() for _ in range(2))
    labels = tokens.clone()
    labels[kinds["position_ids"]["position_ids"] == 0] = -100
    num = (labels != -100).sum()
    options = {"num_items_in_batch": num, "use_cache": False}
    together(tokens, labels=labels, **options, **kinds[kind]).loss.backward()
    for piece in tokens.split(LENGTHS, 1):
        # a document of one token has no label, but its experts are counted
        alone(piece, labels=piece, **options).loss.backward()
    for (name, ours), theirs in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert all(p.grad.any() for p in alone.parameters())


def test_micro_batches_make_the_gradient_of_the_whole() -> None:
    whole, parts = (make(aux_loss_alpha=0.5).train() for _ in range(2))
    num = torch.tensor(38)
    whole(IDS, labels=IDS).loss.backward()
    for row in IDS.split(1):
        parts(row, labels=row, num_items_in_batch=num, skip_logits=True).loss.backward()
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    assert torch.equal(*(m.gates[0].tokens_per_expert for m in (whole, parts)))


def test_balance_loss_is_that_of_the_paper() -> None:
    model = make(aux_loss_alpha=1.0, mtp_loss_weight=0.0, num_nextn_predict_layers=0).train()
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    output = model(IDS, attention_mask=mask, labels=IDS, output_router_logits=True)
    expected = 0.0
    for logits in output.router_logits:
        for scores, bias, kept in zip(
            logits.view(2, 20, 8).sigmoid(), [0, 0], mask.bool(), strict=True
        ):
            assert bias == 0
            gate = model.gates[len(model.gates) - 1 if logits is output.router_logits[-1] else 0]
            choice = (scores + gate.e_score_correction_bias).view(20, 4, 2)
            best = choice.sum(-1).topk(2).indices
            for t in range(20):
                out = [g for g in range(4) if g not in best[t].tolist()]
                choice[t, out] = -9.0
            chosen = torch.zeros(20, 8).scatter(1, choice.view(20, 8).topk(2).indices, 1.0)[kept]
            share = (scores / scores.sum(-1, keepdim=True))[kept]
            f = chosen.mean(0) * 8 / 2
            expected = expected + (f * share.mean(0)).sum() * kept.sum()
    tokens = mask.sum() * len(model.gates)
    torch.testing.assert_close(model.metrics["sequence_aux_loss"], (expected / tokens).detach())
    want = torch.autograd.grad(expected / 38, model.gates[0].weight, retain_graph=True)[0]
    total = torch.autograd.grad(output.loss, model.gates[0].weight)[0]
    model.config.aux_loss_alpha = 0.0
    plain = torch.autograd.grad(
        model(IDS, attention_mask=mask, labels=IDS).loss, model.gates[0].weight
    )[0]
    torch.testing.assert_close(total - plain, want, atol=1e-6, rtol=1e-4)


def test_biases_move_against_the_load_and_counters_start_anew() -> None:
    model = make(router_bias_update_speed=0.01).train()
    before = [gate.e_score_correction_bias.clone() for gate in model.gates]
    model(IDS, labels=IDS, use_cache=False)
    model(IDS, labels=IDS, use_cache=False)
    counts = [gate.tokens_per_expert.clone() for gate in model.gates]
    assert [int(count.sum()) for count in counts] == [2 * 2 * 20 * 2] * 3
    model.update_router_bias()
    for gate, old, count in zip(model.gates, before, counts, strict=True):
        step = torch.tensor([0.01 if c < count.mean() else -0.01 for c in count])
        step[count == count.mean()] = 0.0
        torch.testing.assert_close(gate.e_score_correction_bias - old, step - step.mean())
        assert not gate.tokens_per_expert.any()
    expected = {f"expert_load/layer_{n}": c / c.mean() for n, c in enumerate(counts, 1)}
    torch.testing.assert_close({k: v for k, v in model.metrics.items() if k in expected}, expected)
    after = model.gates[0].e_score_correction_bias.clone()
    model.update_router_bias()  # nothing counted, nothing moved
    model.eval()(IDS, labels=IDS)  # nothing counted outside training
    assert not model.gates[0].tokens_per_expert.any()
    assert torch.equal(model.gates[0].e_score_correction_bias, after)


def test_bias_updates_even_out_a_lopsided_router_within_a_short_run() -> None:
    model = make(n_group=1, topk_group=1).train()  # at the default speed
    for gate in model.gates:
        gate.e_score_correction_bias.copy_(torch.linspace(-0.5, 0.5, 8))
    tokens, loads = ids(8, 60), []
    with torch.no_grad():
        for _ in range(120):
            model(tokens, labels=tokens, use_cache=False)
            model.update_router_bias()
            loads.append(float(model.metrics["expert_load/layer_1"].max()))
    assert loads[0] > 1.8
    assert max(loads[-10:]) < 1.25


def test_activation_checkpointing_gives_the_same_gradients_and_counts() -> None:
    plain, checkpointed = make().train(), make().train()
    checkpointed.activation_checkpointing_enable()
    for each in (plain, checkpointed):
        each(IDS, labels=IDS, use_cache=False).loss.backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(checkpointed.gates, plain.gates, strict=True):
        assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its compiler
def test_training_step_with_activation_checkpointing_is_one_graph() -> None:
    plain, compiled = make().train(), make().train()
    compiled.activation_checkpointing_enable()
    forward = torch.compile(compiled, fullgraph=True, dynamic=False, backend="aot_eager")
    positions = torch.tensor([[*range(4), *range(16)], [*range(12), *range(8)]])
    for seed, places in ((1, positions), (2, positions.flip(0))):
        tokens = ids(2, 20, seed=seed)
        kwargs = {"labels": tokens, "position_ids": places, "use_cache": False}
        with torch.compiler.set_stance("fail_on_recompile" if seed == 2 else "default"):
            forward(tokens, skip_logits=True, **kwargs).loss.backward()
        plain(tokens, **kwargs).loss.backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)
    for name, value in plain.metrics.items():
        torch.testing.assert_close(compiled.metrics[name], value)
    assert torch.equal(compiled.gates[0].tokens_per_expert, plain.gates[0].tokens_per_expert)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_decoding_step_with_static_cache_is_one_graph(model: Any) -> None:
    cache = StaticCache(model.config, max_cache_len=32)
    model(IDS[:, :10], past_key_values=cache)
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for n in range(10, 20):
        logits = step(IDS[:, n : n + 1], past_key_values=cache).logits
        assert_close(logits, model(IDS[:, : n + 1]).logits[:, -1:], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])], ids=["last", "three", "positions"])
def test_logits_to_keep_are_rows_of_all_logits(model: Any, keep: Any) -> None:
    every = model(IDS).logits
    expected = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
    torch.testing.assert_close(model(IDS, logits_to_keep=keep).logits, expected)


def test_loss_without_logits_is_the_loss_with_them(model: Any) -> None:
    shifted = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = model(IDS, labels=IDS).loss
    for options in ({"labels": IDS}, {"shift_labels": shifted}):
        output = model.train()(IDS, skip_logits=True, **options)
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected)  # the value is the cross entropy alone


def test_count_of_parameters_is_that_of_a_walk_through_the_layers() -> None:
    config = registry.build_config("mini_deepseekv3")
    with torch.device("meta"):
        model: Any = registry.build_model(config)
    attention = 768 * 384 + 384 + 384 * 12 * 96 + 768 * 288 + 256 + 256 * 12 * 128 + 768 * 768
    expert, router, norms = 3 * 768 * 512, 8 * 768, 2 * 768
    dense = attention + norms + 3 * 768 * 3_072
    mixed = attention + norms + router + 9 * expert
    block = mixed + 2 * 768 * 768 + 3 * 768
    trunk = 32_004 * 768 + 768
    count = model.param_count()
    assert count.total == trunk + 3 * dense + 9 * mixed + block
    assert count.active == trunk + 3 * dense + 9 * (mixed - 6 * expert)
    assert round(count.active / 1e6) == 101
    width = 12 * 12 * (96 + 64) / 2
    trunk_flops = 6 * count.active + 12 * width * 512
    block_params = block - 6 * expert + 32_004 * 768  # with the head, once more
    block_flops = 6 * block_params + 12 * (width / 12) * 512
    assert model.flops_per_token(512) == trunk_flops + block_flops


def test_no_field_is_one_of_generation() -> None:
    shared = set(MiniDeepseekV3Config().to_dict()) & set(GenerationConfig().to_dict())
    assert shared == {
        "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "output_attentions",
        "output_hidden_states", "transformers_version",
    }  # fmt: skip


@pytest.mark.parametrize(
    "field",
    [
        {"n_group": 8}, {"topk_group": 5}, {"num_experts_per_tok": 5}, {"qk_rope_head_dim": 7},
        {"scoring_func": "softmax"}, {"hidden_act": "gelu"}, {"num_key_value_heads": 2},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_shapes_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        registry.build_config("mini_deepseekv3", **field)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_checkpoint_loads_under_every_head(
    model: Any, tmp_path: Path, auto: Callable[..., Any]
) -> None:
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)  # type: ignore[attr-defined]
    assert not {key for key in info["unexpected_keys"] if "layers" in str(key)}
    base = loaded if auto is AutoModel else loaded.model
    assert len(base.layers) == 3
    assert torch.equal(base.norm.weight, model.model.norm.weight)
    expected = model(IDS, output_hidden_states=True).hidden_states[-1]
    assert_close(base(IDS).last_hidden_state, expected)
    if auto is not AutoModel:
        loaded(IDS).logits.sum().backward()


@torch.no_grad()
def test_router_bias_stays_in_fp32_in_a_bf16_model(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gate = half.gates[0]
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    model.export_official().save_pretrained(tmp_path)
    official = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact, errors = model(ids(4, 60)).logits, []
    for each in (half, official):
        error = (each(ids(4, 60)).logits.float() - exact).norm(dim=-1)
        errors.append(error.median())  # a token that changes experts is another matter
    assert errors[0] < 1.3 * errors[1]


def test_training_checkpoint_restores_experts_biases_and_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from minillm.settings import BatchConfig, OptimConfig, ReportConfig
    from minillm.train import checkpoint as module
    from minillm.train.checkpoint import (
        CheckpointWriter,
        load_optimizers,
        load_weights,
        newest_checkpoint,
    )
    from minillm.train.job import Job
    from minillm.train.optim import build_optimizers
    from minillm.train.state import TrainState

    (tmp_path / "tokenizer").mkdir()
    models = [make(seed, router_bias_update_speed=0.01).train() for seed in (0, 1)]
    optimizers = [build_optimizers(m, OptimConfig(), torch.device("cpu")) for m in models]

    def job(n: int) -> Job:
        unused: Any = None
        return Job(
            stage="pretrain", run=tmp_path, model=models[n], tokenizer=unused,
            tokenizer_folder=tmp_path / "tokenizer", byte_lengths=unused, source=unused,
            optim=OptimConfig(), batch=BatchConfig(), report=ReportConfig(), total_steps=1,
            device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip

    def step(n: int) -> None:
        models[n](IDS, labels=IDS, use_cache=False).loss.backward()
        models[n].update_router_bias()
        for optimizer in optimizers[n]:
            optimizer.step()
            optimizer.zero_grad()

    step(0)
    stepped, write = threading.Event(), module.write_folder
    monkeypatch.setattr(module, "write_folder", lambda *a: stepped.wait(60) and write(*a))
    writer = CheckpointWriter(job(0))
    writer.save_checkpoint(optimizers[0], TrainState())
    step(0)  # before it is written: what is saved is what was there before
    stepped.set()
    writer.wait()
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    load_weights(checkpoint, job(1))
    load_optimizers(checkpoint, job(1), optimizers[1])
    step(1)
    for (name, ours), theirs in zip(
        models[1].state_dict().items(), models[0].state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name

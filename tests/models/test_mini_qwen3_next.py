"""mini_qwen3_next against transformers' own Qwen3NextForCausalLM, and what it promises beyond."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3NextForCausalLM,
    StaticCache,
)
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from minillm.models import MiniQwen3NextConfig, MiniQwen3NextForCausalLM, mini_qwen3_next, registry
from minillm.models.cache import ReservedLayer
from minillm.models.generator import Generator
from minillm.models.sampling import SamplingParams

TOLERANCE = 2e-5
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def rope(share: float, **more: Any) -> dict[str, Any]:
    fields = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    return {"rope_parameters": fields | more}


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "half_rotary": rope(0.5),
    "full_rotary": rope(1.0),
    "yarn": rope(0.5, rope_type="yarn", factor=8.0, original_max_position_embeddings=32),
    "dense_first": {"mlp_only_layers": [0, 1]},
    "untied_unnormed": {"tie_word_embeddings": False, "norm_topk_prob": False},
    "one_key_head": {"linear_num_key_heads": 1, "num_key_value_heads": 1},
    "no_grouping": {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 3, "attention_bias": True},
    "own_order": {
        "layer_types": ["full_attention", "linear_attention"] * 2,
        "decoder_sparse_step": 2,
    },
}


def make(seed: int = 0, **overrides: Any) -> Any:
    """A model in which every weight, norms and decays included, differs from its default."""
    torch.manual_seed(seed)
    model = registry.build_model(registry.build_config("mini_qwen3_next", **SHAPE | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # weak keys scaled to length 1, layer after layer, would make rounding noise loud
            is_strong = name.endswith(("conv1d.weight", "norm.weight"))
            parameter.normal_(0, 0.3 if is_strong else 0.07)
            if name.endswith("linear_attn.norm.weight"):
                parameter.add_(1)
            if name.endswith("A_log"):
                parameter.uniform_(-4, 1.5)
    return model.eval()


@pytest.fixture
def model() -> Any:
    return make()


@pytest.fixture(params=VARIANTS, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    ours = make(**VARIANTS[request.param])
    official = ours.export_official()
    assert type(official) is Qwen3NextForCausalLM
    return ours, official


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: torch.Tensor, official: torch.Tensor, atol: float = TOLERANCE) -> None:
    torch.testing.assert_close(ours, official, atol=atol, rtol=0)


# ------------------------------------------------------------------------- equality with Qwen3-Next


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 40, 150])
def test_logits_are_those_of_qwen(pair: tuple[Any, Any], length: int) -> None:
    ours, official = pair
    assert_close(ours(ids(2, length)).logits, official(ids(2, length)).logits)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_after_left_padding_are_those_of_qwen(pair: tuple[Any, Any], batch: int) -> None:
    ours, official = pair
    mask = torch.ones(batch, 70, dtype=torch.long)
    mask[0, :5] = 0
    kwargs = {"input_ids": ids(batch, 70), "attention_mask": mask}
    kept = mask.bool()
    logits = ours(**kwargs).logits
    assert_close(logits[kept], official(**kwargs).logits[kept])
    assert_close(logits[0, 5:], ours(ids(batch, 70)[:1, 5:]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 2, 5])
def test_cached_logits_are_those_of_qwen(pair: tuple[Any, Any], step: int) -> None:
    tokens = ids(2, 30)
    caches: list[Any] = [None, None]
    whole = pair[1](tokens).logits
    for start in range(0, 30, step):
        outputs = [
            model(tokens[:, start : start + step], past_key_values=cache, use_cache=True)
            for model, cache in zip(pair, caches, strict=True)
        ]
        assert_close(outputs[0].logits, outputs[1].logits)
        assert_close(outputs[0].logits, whole[:, start : start + step])
        caches = [output.past_key_values for output in outputs]


@pytest.mark.parametrize("num_items", [None, 200, torch.tensor(300)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("with_router", [False, True])
def test_loss_and_gradients_are_those_of_qwen(
    pair: tuple[Any, Any], num_items: Any, with_router: bool
) -> None:
    labels, mask = ids(2, 70), torch.ones(2, 70, dtype=torch.long)
    labels[:, :6], mask[0, :3] = -100, 0
    outputs = []
    for model in pair:
        output = model(
            ids(2, 70),
            attention_mask=mask,
            labels=labels,
            num_items_in_batch=num_items,
            output_router_logits=with_router,
        )
        output.loss.backward()
        outputs.append(output)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, atol=1e-5, rtol=1e-6)
    assert (outputs[0].router_logits is None) == (not with_router)
    if with_router:
        assert_close(outputs[0].aux_loss, outputs[1].aux_loss)
        for ours, theirs in zip(*(output.router_logits for output in outputs), strict=True):
            assert_close(ours, theirs)
    official = dict(pair[1].named_parameters())
    for name, parameter in pair[0].named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            official[name].grad,
            atol=TOLERANCE,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_greedy_answers_are_those_of_qwen(pair: tuple[Any, Any]) -> None:
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


@torch.no_grad()
def test_official_folder_loads_and_comes_back(pair: tuple[Any, Any], tmp_path: Path) -> None:
    ours, official = pair
    official.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is Qwen3NextForCausalLM
    back = MiniQwen3NextForCausalLM.from_official(loaded)
    assert torch.equal(back(ids(2, 9)).logits, ours(ids(2, 9)).logits)
    assert ours.config.rope_parameters == back.config.rope_parameters
    with pytest.raises(ValueError, match="mini_qwen3_next"):
        MiniQwen3NextForCausalLM.from_official(ours)


@torch.no_grad()
@pytest.mark.parametrize("to_official", [True, False])
def test_folder_with_model_type_rewritten_loads_as_the_other(
    pair: tuple[Any, Any], tmp_path: Path, to_official: bool
) -> None:
    source, target = pair if to_official else pair[::-1]
    source.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {"model_type": target.config.model_type, "architectures": [type(target).__name__]}
    path.write_text(json.dumps(fields), encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(target)
    assert_close(loaded(ids(2, 9)).logits, source(ids(2, 9)).logits)


@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_qwen_in_bf16(model: Any) -> None:
    exact = model(ids(2, 40)).logits
    ours = model.to(torch.bfloat16)
    ours.model.rotary_emb.inv_freq = ours.model.rotary_emb.inv_freq.float()
    official = ours.export_official()
    errors = [
        (m(ids(2, 40)).logits.float() - exact).square().mean().sqrt() for m in (ours, official)
    ]
    assert errors[0] < 1.3 * errors[1]


# ------------------------------------------------------------------------------------------ packing

PACKS = [(37, 27, 1, 65, 20), (64, 1, 2, 3, 64), (65, 65, 1), (7,) * 20]


@torch.no_grad()
@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens_q", "lengths_win"])
@pytest.mark.parametrize("use_cache", [False, None])
def test_packed_logits_are_those_of_each_document_alone(
    model: Any, lengths: tuple[int, ...], kind: str, use_cache: bool | None
) -> None:
    row = ids(1, sum(lengths))
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    kwargs: dict[str, Any] = {"cu_seq_lens_q": ends}
    if kind == "position_ids":
        kwargs = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if kind == "lengths_win":
        kwargs["position_ids"] = torch.arange(sum(lengths))[None]
    together = model(row, use_cache=use_cache, **kwargs).logits
    alone = torch.cat([model(piece).logits for piece in row.split(lengths, 1)], 1)
    assert_close(together, alone, 1e-5)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_packed_gradients_are_those_of_each_document_alone(lengths: tuple[int, ...]) -> None:
    row = ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = row.masked_fill(positions == 0, -100)
    num = (labels != -100).sum()
    # the balance of experts is one over all tokens, and no sum of documents
    together, alone = (make(router_aux_loss_coef=0.0).train() for _ in range(2))
    together(row, position_ids=positions, labels=labels, num_items_in_batch=num).loss.backward()
    for piece in row.split(lengths, 1):
        if piece.shape[1] > 1:
            alone(piece, labels=piece, num_items_in_batch=num).loss.backward()
    for (name, ours), theirs in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def test_rows_of_a_batch_may_be_packed_differently(model: Any) -> None:
    rows = ids(2, 100)
    positions = torch.stack([torch.cat([torch.arange(30), torch.arange(70)]), torch.arange(100)])
    together = model(rows, position_ids=positions).logits
    assert_close(together[1:], model(rows[1:]).logits, 1e-5)
    assert_close(together[:1, 30:], model(rows[:1, 30:]).logits, 1e-5)


# ---------------------------------------------------------------------------------- caches, answers


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(20,), (1,) * 20, (8, 1, 11)])
@pytest.mark.parametrize("kind", ["ours", "static"])
def test_every_cache_gives_the_logits_of_none(
    model: Any, pieces: tuple[int, ...], kind: str
) -> None:
    tokens = ids(2, 20)
    cache = model.make_cache(2, 4)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=32)
    for _ in range(2):
        parts = [model(p, past_key_values=cache).logits for p in tokens.split(pieces, dim=1)]
        assert_close(torch.cat(parts, 1), model(tokens).logits, 1e-5)
        assert int(cache.get_seq_length()) == 20
        cache.reset()


def test_cache_has_memory_where_there_is_no_attention(model: Any) -> None:
    kinds = [type(layer) for layer in model.make_cache(1, 8).layers]
    assert kinds == [LinearAttentionLayer] * 3 + [ReservedLayer]


@torch.no_grad()
def test_padding_inside_a_continued_batch_leaves_no_trace(model: Any) -> None:
    tokens, cache = ids(2, 20), model.make_cache(2, 32)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 8:11] = 0
    model(tokens[:, :8], past_key_values=cache, attention_mask=mask[:, :8])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        tokens[:, 8:], past_key_values=cache, attention_mask=mask, position_ids=places[:, 8:]
    ).logits
    assert_close(logits[1], model(tokens[1:]).logits[0, 8:], 1e-5)
    assert torch.isfinite(logits).all()


def test_generator_streams_the_tokens_of_generate(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make(vocab_size=len(tokenizer))
    prompt = [5, 9, 13, 40, 41, 7]
    params = SamplingParams(temperature=0, max_tokens=80, min_tokens=80)
    deltas = list(Generator(model, tokenizer).stream(prompt, params))
    tokens = [token for delta in deltas for token in delta.token_ids]
    given = torch.tensor([prompt])
    theirs = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=80,
        min_new_tokens=80,
        pad_token_id=0,
    )
    assert tokens == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batched_left_padded_answers_are_those_alone(model: Any, num_beams: int) -> None:
    kwargs = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "num_beams": num_beams}
    batch = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids(1, 6)], 1)
    batch = torch.cat([batch, ids(1, 10, seed=2)])
    both = model.generate(batch, attention_mask=(batch != 0).long(), **kwargs)
    alone = model.generate(batch[:1, 4:], attention_mask=torch.ones(1, 6), **kwargs)[0]
    assert both[0, 4 : 4 + len(alone)].tolist() == alone.tolist()


# ----------------------------------------------------------------------------------------- training


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_training_step_without_packing_is_one_graph() -> None:
    torch._dynamo.reset()
    tokens = ids(2, 70)
    plain, compiled = make().train(), make().train()
    kwargs: dict[str, Any] = {"shift_labels": tokens, "num_items_in_batch": 140, "use_cache": False}
    forward = torch.compile(compiled, fullgraph=True, dynamic=False, backend="aot_eager")
    losses = [plain(tokens, **kwargs).loss, forward(tokens, skip_logits=True, **kwargs).loss]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    assert compiled.metrics.keys() == plain.metrics.keys()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-5, rtol=1e-4)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = make().train(), make().train()
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(ids(2, 20), labels=ids(2, 20), use_cache=False).loss.backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_every_weight_has_a_gradient_and_eight_rows_are_learned() -> None:
    torch.manual_seed(0)
    model = registry.build_model(registry.build_config("mini_qwen3_next", **SHAPE)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids(8, 12), labels=ids(8, 12), use_cache=False).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert float(loss.detach()) < 0.2


def test_router_loss_is_added_in_training_and_weighed_by_the_share_of_labels() -> None:
    tokens, model = ids(2, 20), make(router_aux_loss_coef=0.5)
    plain = model(tokens, labels=tokens)
    trained = model.train()(tokens, labels=tokens)
    torch.testing.assert_close(trained.loss, plain.loss + 0.5 * trained.aux_loss)
    assert plain.aux_loss is None
    assert trained.router_logits is None
    part = model(tokens, labels=tokens, num_items_in_batch=4 * 38)  # a quarter of the labels
    torch.testing.assert_close(part.loss, trained.loss / 4)
    assert float(model.metrics["router_loss"]) == pytest.approx(float(trained.aux_loss.detach()))
    assert sorted(model.metrics)[:4] == [f"expert_load/layer_{layer}" for layer in range(4)]
    for layer in range(4):
        assert float(model.metrics[f"expert_load/layer_{layer}"].mean()) == pytest.approx(1.0)


def test_router_metrics_at_perfect_balance_and_at_collapse() -> None:
    model = make(num_experts_per_tok=1).train()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
    model(ids(2, 20), labels=ids(2, 20))
    # equal probabilities: the loss is 1 whoever wins the tie; all tokens go to that one expert
    assert float(model.metrics["router_loss"]) == pytest.approx(1.0)
    assert sorted(model.metrics["expert_load/layer_0"].tolist()) == [0.0, 0.0, 0.0, 4.0]


# ----------------------------------------------------------------------------- counts, declarations


def test_parameters_are_counted_by_formula(model: Any) -> None:
    conv = 2 * 2 * 8 + 4 * 16
    linear = 32 * (conv + 64) + 32 * 8 + conv * 4 + 4 + 4 + 16 + 64 * 32
    full = 32 * 128 + 2 * 32 * 32 + 64 * 32 + 2 * 16
    sparse = 4 * 32 + 4 * 3 * 32 * 24 + 3 * 32 * 16 + 32
    total = 97 * 32 + 3 * linear + full + 4 * (sparse + 64) + 32
    count = model.param_count()
    assert (count.total, count.active) == (total, total - 4 * 2 * 3 * 32 * 24)
    delta = model.flops_per_token(128) - 6 * count.active - 12 * 4 * 16 * 128

    def count_system(a: Any, b: Any, *_: Any, **__: Any) -> int:
        return a[0] * a[1] * a[2] * a[-1] * a[-1] * b[-1]  # half a product

    mapping = {torch.ops.aten.linalg_solve_triangular: count_system}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:  # 4 heads in each of 3 layers, 2 chunks
        q, k, v = torch.randn(3, 1, 128, 4, 16).unbind()
        given = q[..., :8], k[..., :8], v, torch.randn(1, 128, 4), torch.rand(1, 128, 4)
        torch_chunk_gated_delta_rule(*given, chunk_size=64)
    assert delta == 3 * 3 * counter.get_total_flops() / 128


@pytest.mark.parametrize(
    ("name", "vocab_size", "total", "active"),
    [
        ("mini_qwen3_next", 32_004, 179_437_464, 94_502_808),
        ("mini_qwen3_next:published", 32_004, 161_832_600, 98_131_608),
        ("mini_qwen3_next:small", 8_196, 29_082_184, 14_926_408),
        ("mini_qwen3_next:tiny", 6_148, 5_591_640, 4_411_992),
    ],
)
def test_presets_have_their_size(name: str, vocab_size: int, total: int, active: int) -> None:
    with torch.device("meta"):
        model = registry.build_model(registry.build_config(name, vocab_size=vocab_size))
    assert (model.param_count().total, model.param_count().active) == (total, active)
    assert bool(model.config.mlp_only_layers) == name.endswith("published")
    assert set(registry.ARCHITECTURES["mini_qwen3_next"][1]) == set(mini_qwen3_next.PRESETS)


def test_no_config_field_leaks_into_generation() -> None:
    shared = set(MiniQwen3NextConfig().to_dict()) & set(GenerationConfig().to_dict())
    assert shared == {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "transformers_version",
    }


@torch.no_grad()
def test_inner_values_can_be_looked_at(model: Any) -> None:
    model.set_attn_implementation("eager")
    output = model(
        ids(2, 20), output_attentions=True, output_hidden_states=True, output_router_logits=True
    )
    assert [a.shape for a in output.attentions] == [(2, 4, 20, 20)]
    assert [h.shape for h in output.hidden_states] == [(2, 20, 32)] * 5
    assert [r.shape for r in output.router_logits] == [(40, 4)] * 4


@pytest.mark.parametrize(
    ("auto", "shape"),
    [(AutoModelForSequenceClassification, (2, 3)), (AutoModelForTokenClassification, (2, 20, 3))],
)
@torch.no_grad()
def test_classification_heads(auto: Any, shape: tuple[int, ...]) -> None:
    config = registry.build_config("mini_qwen3_next", **SHAPE)
    config.num_labels = 3
    assert auto.from_config(config)(ids(2, 20)).logits.shape == shape


def test_fresh_weights_have_the_declared_spread() -> None:
    torch.manual_seed(0)
    model = registry.build_model(registry.build_config("mini_qwen3_next:tiny", vocab_size=300))
    for name, parameter in model.named_parameters():
        if name.endswith(("linear_attn.norm.weight", "dt_bias")):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif "norm" in name:
            assert not parameter.any(), name
        elif name.endswith("A_log"):
            assert parameter.min() > -4.7
            assert parameter.max() < 2.8
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.2), name


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_key_value_heads": 5}, "not a multiple"),
        ({"linear_num_key_heads": 5}, "not a multiple"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 of num_experts 8"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"layer_types": ["full_attention"] * 12}, "must have both"),
        ({"hidden_size": "32"}, "expected int"),
    ],
)
def test_config_refuses_what_cannot_be_built(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        MiniQwen3NextConfig(**fields)


def test_forward_wants_ids_or_embeddings_not_both(model: Any) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        model()

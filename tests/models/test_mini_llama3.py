"""What mini_llama3 promises beyond equality with Llama, and what it declares to transformers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    StaticCache,
)

from minillm.models import MiniLlama3Config, MiniLlama3ForCausalLM, registry

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 7, 18])
def test_logits_do_not_depend_on_later_tokens(model: Any, position: int) -> None:
    changed = IDS.clone()
    changed[:, position + 1 :] = 5
    kept = slice(0, position + 1)
    torch.testing.assert_close(
        model(IDS).logits[:, kept], model(changed).logits[:, kept], atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_logits_depend_on_every_earlier_token(model: Any) -> None:
    last = model(IDS[:1]).logits[:, -1]
    for position in range(IDS.shape[1]):
        changed = IDS[:1].clone()
        changed[0, position] = 3 + (int(changed[0, position]) + 1) % 90
        assert (model(changed).logits[:, -1] - last).abs().max() > 1e-5


@torch.no_grad()
def test_eager_and_sdpa_agree(model: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    logits = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits.append(model(IDS, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_weights_and_hidden_states_can_be_looked_at(model: Any) -> None:
    model.set_attn_implementation("eager")
    output = model(IDS, output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in output.attentions] == [(2, 4, 20, 20)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 20))
    assert [h.shape for h in output.hidden_states] == [(2, 20, 32)] * 3


@pytest.mark.parametrize("kind", ["labels", "shift_labels"])
@pytest.mark.parametrize("num_items", [None, 11])
def test_loss_without_logits_is_the_loss_with_them(
    make_model: Callable[..., Any], kind: str, num_items: int | None
) -> None:
    labels = IDS.clone()
    labels[0, :9] = -100
    kwargs = {kind: labels, "num_items_in_batch": num_items}
    plain, fused = make_model().train(), make_model().train()
    expected, output = plain(IDS, **kwargs).loss, fused(IDS, skip_logits=True, **kwargs)
    expected.backward()
    output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_shifted_labels_are_labels_moved_by_one(model: Any) -> None:
    shifted = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], dim=1)
    torch.testing.assert_close(model(IDS, shift_labels=shifted).loss, model(IDS, labels=IDS).loss)


def test_loss_is_the_mean_negative_log_probability(model: Any) -> None:
    logp = model(IDS).logits.log_softmax(-1)
    terms = [-logp[b, t, IDS[b, t + 1]] for b in range(2) for t in range(19)]
    torch.testing.assert_close(model(IDS, labels=IDS).loss, torch.stack(terms).mean())


def test_accumulated_micro_batches_make_the_gradient_of_the_whole(
    make_model: Callable[..., Any],
) -> None:
    whole, parts = make_model().train(), make_model().train()
    labels = IDS.clone()
    labels[0, :15] = -100  # uneven: a mean of means would be wrong
    num_items = (labels[:, 1:] != -100).sum()
    whole(IDS, labels=labels).loss.backward()
    for row in range(2):
        parts(
            IDS[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=num_items
        ).loss.backward()
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_activation_checkpointing_gives_the_same_gradients(make_model: Callable[..., Any]) -> None:
    plain, checkpointed = make_model().train(), make_model().train()
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@torch.no_grad()
@pytest.mark.parametrize(
    "keep",
    [1, 3, torch.tensor([0, 5]), torch.tensor([[1], [4]]), torch.rand(2, 20) > 0.5],
    ids=["last", "last_three", "positions", "positions_by_row", "mask"],
)
def test_logits_to_keep_are_rows_of_all_logits(model: Any, keep: Any) -> None:
    every = model(IDS).logits
    if isinstance(keep, int):
        expected = every[:, -keep:]
    elif keep.dtype == torch.bool:
        expected = every[keep]
    elif keep.ndim == 2:
        expected = torch.stack([every[row, keep[row]] for row in range(2)])
    else:
        expected = every[:, keep]
    torch.testing.assert_close(model(IDS, logits_to_keep=keep).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(20,), (1,) * 20, (8, 1, 11)])
def test_reserved_cache_gives_the_logits_of_no_cache(model: Any, pieces: tuple[int, ...]) -> None:
    cache = model.make_cache(2, 4)  # too small on purpose: it has to grow
    logits = [model(p, past_key_values=cache).logits for p in IDS.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(IDS).logits, atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_reserved_cache_can_be_cropped_reset_and_reordered(model: Any) -> None:
    cache = model.make_cache(2, 32)
    model(IDS, past_key_values=cache)
    cache.crop(-8)
    again = model(IDS[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(IDS).logits[:, 12:], atol=1e-5, rtol=0)

    cache.crop(-8)
    cache.reorder_cache(torch.tensor([1, 1]))
    swapped = model(IDS[[1, 1], 12:], past_key_values=cache).logits
    torch.testing.assert_close(swapped[0], model(IDS).logits[1, 12:], atol=1e-5, rtol=0)

    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = model(IDS, past_key_values=cache).logits
    torch.testing.assert_close(fresh, model(IDS).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_static_cache_gives_the_logits_of_no_cache(model: Any) -> None:
    cache = StaticCache(config=model.config, max_cache_len=32)
    logits = [model(p, past_key_values=cache).logits for p in IDS.split((12, 1, 7), dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(IDS).logits, atol=1e-5, rtol=0)


def test_training_step_without_packing_is_one_graph(make_model: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    plain, compiled = make_model().train(), make_model().train()
    kwargs: dict[str, Any] = {"shift_labels": IDS, "num_items_in_batch": 40, "use_cache": False}
    # graph capture is what may break; aot_eager leaves out the minutes of code generation
    forward = torch.compile(compiled, fullgraph=True, dynamic=False, backend="aot_eager")
    losses = [plain(IDS, **kwargs).loss, forward(IDS, skip_logits=True, **kwargs).loss]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_step_compiles_to_machine_code(make_model: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    plain, compiled = make_model().train(), make_model().train()
    forward = torch.compile(compiled, fullgraph=True, dynamic=False)
    for model in (plain, forward):
        model(IDS, shift_labels=IDS, use_cache=False).loss.backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_as_it_was(
    make_model: Callable[..., Any], tmp_path: Path, tied: bool
) -> None:
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MiniLlama3ForCausalLM
    written, kept = loaded.config.to_dict(), model.config.to_dict()
    changed = {"_name_or_path", "architectures"}
    assert {k: v for k, v in written.items() if k not in changed} == {
        k: v for k, v in kept.items() if k not in changed
    }
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_keep_the_old_tokens(make_model: Callable[..., Any], tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    before = model(IDS).logits
    model.resize_token_embeddings(105, mean_resizing=False)
    after = model(IDS).logits
    assert after.shape[-1] == model.config.vocab_size == 105
    torch.testing.assert_close(after[..., :97], before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_by_formula(make_model: Callable[..., Any], tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    attention = 32 * (4 * 16) * 2 + 32 * (2 * 16) * 2
    layer = attention + 3 * 32 * 48 + 2 * 32
    expected = 97 * 32 * (1 if tied else 2) + 2 * layer + 32
    count = model.param_count()
    assert (count.total, count.active, count.embedding) == (expected, expected, 97 * 32)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_are_six_per_multiplied_weight_and_attention(
    make_model: Callable[..., Any], tied: bool
) -> None:
    model = make_model(tie_word_embeddings=tied)
    matmuls = 2 * (32 * 64 * 2 + 32 * 32 * 2 + 3 * 32 * 48) + 32 * 97
    norms = 5 * 32
    assert model.flops_per_token(100) == 6 * (matmuls + norms) + 12 * 2 * 4 * 16 * 100


def test_published_shape_has_a_hundred_million_parameters() -> None:
    with torch.device("meta"):
        model = registry.build_model(registry.build_config("mini_llama3"))
    assert model.param_count().total == 100_538_112


def test_official_model_can_be_counted_too(model: Any) -> None:
    from minillm.models.base import flops_per_token, param_count

    official = model.export_official()
    assert param_count(official) == model.param_count()
    assert flops_per_token(official, 64) == model.flops_per_token(64)


def test_no_config_field_leaks_into_generation() -> None:
    shared = set(MiniLlama3Config().to_dict()) & set(GenerationConfig().to_dict())
    assert shared == {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "transformers_version",
    }


@pytest.mark.parametrize(
    ("auto", "shape"),
    [(AutoModelForSequenceClassification, (2, 3)), (AutoModelForTokenClassification, (2, 20, 3))],
)
@torch.no_grad()
def test_classification_heads(model: Any, auto: Any, shape: tuple[int, ...]) -> None:
    config = copy.deepcopy(model.config)
    config.num_labels = 3
    assert auto.from_config(config)(IDS).logits.shape == shape


def test_fresh_weights_have_the_declared_spread() -> None:
    torch.manual_seed(0)
    model = registry.build_model(registry.build_config("mini_llama3:tiny", vocab_size=300))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05), name


def test_forward_wants_ids_or_embeddings_not_both(model: Any) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        model(IDS, inputs_embeds=model.model.embed_tokens(IDS))
    with pytest.raises(ValueError, match="exactly one"):
        model()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("hidden_size", 33, "not a multiple"),
        ("num_key_value_heads", 3, "not a multiple"),
        ("hidden_size", "32", "expected int"),
        ("hidden_act", "gelu", "silu"),
    ],
)
def test_config_refuses_what_cannot_be_built(field: str, value: Any, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        MiniLlama3Config(**{"num_attention_heads": 4, field: value})


def test_config_fills_in_heads() -> None:
    config = MiniLlama3Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=None, head_dim=None
    )
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)


def test_config_knows_its_type() -> None:
    assert isinstance(AutoConfig.for_model("mini_llama3"), MiniLlama3Config)
    assert MiniLlama3Config().auto_map == {}

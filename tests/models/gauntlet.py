"""What every architecture has to pass. A new one subclasses `Gauntlet` and names its `model_type`.

Expected values come from brute force: one document, one token, one row at a time, or a count of
the operations that really ran.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)

import minillm.models.moe  # noqa: F401 - its operation is counted
from minillm.models import train_kernels
from minillm.models.base import flop_parts
from minillm.models.verify import randomize

VOCAB = 97
IDS = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
PROMPT = IDS[:1, :9]
LENGTHS = (5, 1, 9, 5)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 2,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    # experts
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    # linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SHARED_WITH_GENERATION = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("output_attentions", "output_hidden_states", "transformers_version"),
}
INSIDE_TORCH = pytest.mark.filterwarnings("ignore::DeprecationWarning")
Make = Callable[..., Any]


def count_grouped(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Two operations for each row and each number of its expert's matrix."""
    return 2 * int(x[0]) * int(weight[-1]) * int(weight[-2])


GROUPED = {
    torch.ops.aten._grouped_mm: count_grouped,
    torch.ops.minillm.grouped_mm: count_grouped,
}


def assert_same_gradients(ours: Any, expected: Any) -> None:
    for (name, a), b in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            scale = max(1.0, b.grad.abs().max().item())
            assert (a.grad - b.grad).abs().max() <= 1e-5 * scale, name


def close(ours: torch.Tensor, expected: torch.Tensor, error: float = 2e-5) -> None:
    """Compare, as `minillm verify` does, in parts of the largest value (if that is above 1)."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(ours, expected, atol=error * scale, rtol=0)


def small_config(model_type: str, **overrides: Any) -> Any:
    """Shrink the fields that an architecture has, by their names."""
    config_class = CONFIG_MAPPING[model_type]
    fields = set(config_class().to_dict())
    small = {name: value for name, value in SMALL.items() if name in fields}
    if "kv_lora_rank" in fields:  # as many latent keys as queries; head sizes have other names
        small.pop("head_dim", None)
        small["num_key_value_heads"] = small["num_attention_heads"]
    kinds = list(dict.fromkeys(getattr(config_class(), "layer_types", None) or []))
    if len(kinds) > 1:  # one layer of each kind
        small |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return config_class(**small | overrides)


class Gauntlet:
    """Tests of one architecture; `model_type` comes from the subclass."""

    num_decoding_graphs = 1
    """Of a step with a static cache."""

    @pytest.fixture
    def make(self, model_type: str) -> Make:
        def make(**overrides: Any) -> Any:
            torch.manual_seed(0)
            config = small_config(model_type, **overrides)
            return randomize(AutoModelForCausalLM.from_config(config)).eval()

        return make

    @pytest.fixture
    def model(self, make: Make) -> Any:
        return make()

    # ------------------------------------------------------------------ shapes and dtypes

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_shapes_and_dtypes(self, make: Make, dtype: torch.dtype) -> None:
        exact = make()
        model = copy.deepcopy(exact).to(dtype)
        output = model(IDS, labels=IDS, output_hidden_states=True)
        assert (output.logits.shape, output.logits.dtype) == ((2, 20, VOCAB), dtype)
        assert {h.shape for h in output.hidden_states} == {(2, 20, 32)}
        assert len(output.hidden_states) == model.config.num_hidden_layers + 1
        expected = exact(IDS).logits
        error = (output.logits.float() - expected).square().mean().sqrt() / expected.std()
        assert error < (1e-5 if dtype == torch.float32 else 0.15)

    @torch.no_grad()
    def test_empty_and_single_inputs(self, model: Any) -> None:
        close(model(IDS[:1, :1]).logits, model(IDS[:1]).logits[:, :1])
        with pytest.raises(ValueError, match="exactly one"):
            model()

    # ------------------------------------------------------------------ causality

    @torch.no_grad()
    def test_logits_depend_on_all_earlier_tokens_and_on_no_later(self, model: Any) -> None:
        full = model(IDS[:1]).logits
        for position in range(20):
            changed = IDS[:1].clone()
            changed[0, position] = 3 + (int(changed[0, position]) + 1) % (VOCAB - 3)
            moved = (model(changed).logits - full).abs().amax(-1)[0]
            assert moved[:position].max().item() < 1e-5 if position else True
            assert moved[position] > 1e-4
            assert moved[-1] > 1e-6

    # ------------------------------------------------------------------ cache

    @torch.no_grad()
    @pytest.mark.parametrize("pieces", [(1,) * 20, (8, 1, 11), (5, 5, 5, 5), (19, 1)])
    @pytest.mark.parametrize("kind", ["dynamic", "static", "own"])
    def test_cached_logits_are_those_of_one_pass(
        self, model: Any, kind: str, pieces: tuple[int, ...]
    ) -> None:
        cache = {
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=32),
            "own": lambda: model.make_cache(2, 4),  # too small on purpose: it has to grow
        }[kind]()
        logits = [model(p, past_key_values=cache).logits for p in IDS.split(pieces, dim=1)]
        close(torch.cat(logits, 1), model(IDS).logits)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["dynamic", "own"])
    def test_cache_follows_reordered_rows(self, model: Any, kind: str) -> None:
        cache = DynamicCache(config=model.config) if kind == "dynamic" else model.make_cache(2, 32)
        model(IDS[:, :12], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        logits = model(IDS[[1, 1], 12:], past_key_values=cache).logits
        close(logits[0], model(IDS[1:]).logits[0, 12:])

    @torch.no_grad()
    def test_reset_cache_is_an_empty_one(self, model: Any) -> None:
        cache = model.make_cache(2, 32)
        model(IDS.flip(1), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        close(model(IDS, past_key_values=cache).logits, model(IDS).logits)

    # ------------------------------------------------------------------ packing and padding

    @torch.no_grad()
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_packed_logits_are_those_of_each_document_alone(
        self, model: Any, implementation: str
    ) -> None:
        model.set_attn_implementation(implementation)
        alone = [model(p, use_cache=False).logits for p in IDS[:1].split(LENGTHS, 1)]
        expected = torch.cat(alone, 1)
        close(model(IDS[:1], position_ids=POSITIONS, use_cache=False).logits, expected, 1e-5)
        ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        seen = model(
            IDS[:1],
            position_ids=POSITIONS,
            use_cache=False,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=max(LENGTHS),
            max_length_k=max(LENGTHS),
        )
        close(seen.logits, expected, 1e-5)

    def test_packed_gradients_are_those_of_each_document_alone(self, make: Make) -> None:
        together, alone = make(), make()
        labels = IDS[:1].masked_fill(POSITIONS == 0, -100)
        num = int((labels != -100).sum())
        loss = together(
            IDS[:1],
            position_ids=POSITIONS,
            labels=labels,
            num_items_in_batch=num,
            use_cache=False,
        ).loss
        loss.backward()
        for piece in IDS[:1].split(LENGTHS, 1):
            if piece.shape[1] > 1:
                alone(piece, labels=piece, num_items_in_batch=num, use_cache=False).loss.backward()
        assert_same_gradients(together, alone)

    @torch.no_grad()
    @pytest.mark.parametrize("num_rows", [1, 2])
    def test_left_padding_changes_nothing(self, model: Any, num_rows: int) -> None:
        alone = model(IDS[:1, 4:]).logits
        mask = torch.ones_like(IDS)
        mask[0, :4] = 0
        rows = slice(0, num_rows)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        cache, start, parts = DynamicCache(config=model.config), 0, []
        for end in (15, 16, 20):
            output = model(
                IDS[rows, start:end],
                attention_mask=mask[rows, :end],
                position_ids=places[rows, start:end],
                past_key_values=cache,
            )
            parts.append(output.logits)
            start = end
        close(torch.cat(parts, 1)[:1, 4:], alone)

    # ------------------------------------------------------------------ gradients

    def test_gradients_reach_every_parameter(self, make: Make) -> None:
        model = make().train()
        model(IDS, labels=IDS).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name

    def test_activation_checkpointing_gives_the_same_gradients(self, make: Make) -> None:
        plain, checkpointed = make().train(), make().train()
        checkpointed.activation_checkpointing_enable()
        for model in (plain, checkpointed):
            model(IDS, labels=IDS, use_cache=False).loss.backward()
        assert_same_gradients(checkpointed, plain)

    def test_loss_without_logits_is_the_loss_with_them(self, make: Make) -> None:
        plain, fused = make().train(), make().train()
        expected = plain(IDS, labels=IDS, num_items_in_batch=31)
        output = fused(IDS, labels=IDS, num_items_in_batch=31, skip_logits=True)
        assert output.logits is None
        close(output.loss, expected.loss)
        expected.loss.backward()
        output.loss.backward()
        assert_same_gradients(fused, plain)

    def test_eight_sequences_are_learned_by_heart(self, model_type: str) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(model_type)).train()
        ids = torch.randint(3, VOCAB, (8, 12), generator=torch.Generator().manual_seed(2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(120):
            optimizer.zero_grad()
            output = model(ids, labels=ids, use_cache=False)
            output.loss.backward()
            optimizer.step()
        logits = model.eval()(ids).logits[:, :-1]
        # the first token says which sequence it is
        assert (logits.argmax(-1) == ids[:, 1:]).float().mean() > 0.98

    # ------------------------------------------------------------------ files and tables

    @torch.no_grad()
    @pytest.mark.parametrize("tied", [True, False])
    def test_saved_model_loads_as_it_was(self, make: Make, tmp_path: Path, tied: bool) -> None:
        model = make(tie_word_embeddings=tied)
        model.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        assert type(loaded) is type(model)
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
        greedy = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
        assert torch.equal(loaded.generate(PROMPT, **greedy), model.generate(PROMPT, **greedy))

    @torch.no_grad()
    @pytest.mark.parametrize("tied", [True, False])
    def test_resized_embeddings_keep_the_old_tokens(self, make: Make, tied: bool) -> None:
        model = make(tie_word_embeddings=tied)
        before = model(IDS).logits
        model.resize_token_embeddings(105, mean_resizing=False)
        after = model(IDS).logits
        assert after.shape[-1] == model.config.vocab_size == 105
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        close(after[..., :VOCAB], before, 1e-6)

    @torch.no_grad()
    def test_official_class_has_the_same_logits_both_ways(self, model: Any) -> None:
        official = model.export_official().eval()
        assert official.config.model_type == model.official_type
        close(official(IDS).logits, model(IDS).logits)
        again = type(model).from_official(official).eval()
        assert torch.equal(again(IDS).logits, model(IDS).logits)

    @pytest.mark.parametrize(
        ("auto", "shape"),
        [
            (AutoModelForSequenceClassification, (2, 3)),
            (AutoModelForTokenClassification, (2, 20, 3)),
        ],
    )
    @torch.no_grad()
    def test_classification_heads(self, model_type: str, auto: Any, shape: Any) -> None:
        config = small_config(model_type)
        config.num_labels = 3
        assert auto.from_config(config)(IDS).logits.shape == shape

    def test_no_config_field_leaks_into_generation(self, model_type: str) -> None:
        fields = set(CONFIG_MAPPING[model_type]().to_dict())
        assert fields & set(GenerationConfig().to_dict()) == SHARED_WITH_GENERATION

    # ------------------------------------------------------------------ counts

    @torch.no_grad()
    def test_parameters_are_those_that_a_token_meets(self, model: Any) -> None:
        """Idle ones, by brute force: weights of experts whose gradient one token leaves at 0."""
        count = model.param_count()
        assert count.total == sum(p.numel() for p in model.parameters())
        assert count.embedding == VOCAB * 32
        with torch.enable_grad():
            model(IDS[:1, :1]).logits.square().sum().backward()
        idle = 0
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                idle += parameter.numel()
            elif parameter.ndim == 3 and "experts" in name:
                unused = (parameter.grad.flatten(1) == 0).all(1)
                idle += int(unused.sum()) * parameter[0].numel()
        assert count.total - count.active == idle

    def test_flops_are_those_that_run(self, model_type: str) -> None:
        """Three times the multiplications of a forward pass, counted while they run."""
        config = small_config(model_type, hidden_size=64, vocab_size=512)
        config._attn_implementation = "eager"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        ids = torch.randint(3, 500, (1, 128))
        counter = FlopCounterMode(display=False, custom_mapping=GROUPED)
        with counter, torch.no_grad():
            model(ids, use_cache=False)
        ran = {str(kind): 3 * n / 128 for kind, n in counter.get_flop_counts()["Global"].items()}
        parts = flop_parts(model, 128)
        products = sum(n for kind, n in ran.items() if "bmm" in kind)  # bmm, baddbmm
        matrices = sum(ran.values()) - products
        # the convention counts vectors and convolutions as if they were multiplied like matrices
        others = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 1 or "conv" in n)
        assert matrices <= parts["matrices"] <= matrices + 6 * others
        if "delta rule" in parts:
            assert parts["attention"] < products  # the rest is the form we compute it in
        else:
            assert parts["attention"] == products

    # ------------------------------------------------------------------ compiling

    @INSIDE_TORCH
    def test_training_compiles_once_for_all_documents(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Graph capture is what may break; `aot_eager` leaves out minutes of code generation.

        Both by PyTorch's operations, which compiling always takes: a convolution's weights moved by
        one rounding already change gradients of mini_qwen3_next here by 1e-5.
        """
        monkeypatch.setattr(train_kernels, "load_kernels", lambda dtype: None)
        torch._dynamo.reset()
        plain, compiled = make().train(), make().train()
        counter = CompileCounterWithBackend("aot_eager")
        forward = torch.compile(compiled, fullgraph=True, dynamic=False, backend=counter)
        for lengths in ((20,), (5, 1, 14), (7, 7, 6), (1,) * 20):
            places = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1).contiguous()
            kwargs = {"position_ids": places, "shift_labels": IDS, "use_cache": False}
            kwargs["num_items_in_batch"] = 40
            losses = [forward(IDS, skip_logits=True, **kwargs).loss, plain(IDS, **kwargs).loss]
            for loss in losses:
                loss.backward()
            close(*losses)
        assert counter.frame_count == 1
        assert compiled.metrics.keys() == plain.metrics.keys()
        assert_same_gradients(compiled, plain)

    @torch.no_grad()
    @INSIDE_TORCH
    def test_decoding_compiles_once(self, model: Any) -> None:
        torch._dynamo.reset()
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(IDS[:, :10], past_key_values=cache)
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(model, fullgraph=True, backend=counter)
        full = model(IDS).logits
        for at in range(10, 15):
            place = torch.full((2, 1), at)
            output = step(IDS[:, at : at + 1], past_key_values=cache, position_ids=place)
            close(output.logits[:, 0], full[:, at])
        assert counter.frame_count == self.num_decoding_graphs

    # ------------------------------------------------------------------ generation

    @pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
    def test_generate_returns_scores_and_records(self, model: Any, kwargs: Any) -> None:
        model.set_attn_implementation("eager")
        torch.manual_seed(0)
        output = generate(
            model,
            PROMPT,
            max_new_tokens=4,
            min_new_tokens=4,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
            output_attentions=True,
            **kwargs,
        )
        rows = kwargs.get("num_beams", 1)
        assert output.sequences.shape == (1, 9 + 4)
        for values in (output.scores, output.logits):
            assert [v.shape for v in values] == [(rows, VOCAB)] * 4
        assert [h[-1].shape[1] for h in output.hidden_states] == [9, 1, 1, 1]
        assert all(len(step) for step in output.attentions)
        if rows == 1:
            full = model(output.sequences).logits[0, 8:-1]
            close(torch.cat(output.logits), full)

    def test_greedy_answer_is_the_likeliest_token_at_every_step(self, model: Any) -> None:
        ids = PROMPT
        for _ in range(10):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == model.config.eos_token_id:
                break
        assert torch.equal(generate(model, PROMPT, max_new_tokens=10), ids)
        uncached = generate(model, PROMPT, max_new_tokens=10, use_cache=False)
        assert torch.equal(uncached, ids)

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_generate_from_embeddings(self, model: Any, num_beams: int) -> None:
        kwargs = {"max_new_tokens": 8, "num_beams": num_beams}
        embeds = model.get_input_embeddings()(PROMPT)
        made = generate(model, None, inputs_embeds=embeds, **kwargs)
        assert torch.equal(made, generate(model, PROMPT, **kwargs)[:, 9:])

    def test_static_and_own_cache_give_the_tokens_of_a_dynamic_one(self, model: Any) -> None:
        expected = generate(model, PROMPT, max_new_tokens=12)
        static = StaticCache(config=model.config, max_cache_len=64)
        for cache in (static, model.make_cache(1, 8)):
            made = generate(
                model, PROMPT, max_new_tokens=12, past_key_values=cache, disable_compile=True
            )
            assert torch.equal(made, expected)

    def test_conversation_continues_from_its_cache(self, model: Any) -> None:
        cache = DynamicCache(config=model.config)
        first = generate(model, PROMPT, max_new_tokens=6, past_key_values=cache)
        longer = torch.cat([first, torch.tensor([[50, 51, 52]])], 1)
        continued = generate(model, longer, max_new_tokens=6, past_key_values=cache)
        assert torch.equal(continued, generate(model, longer, max_new_tokens=6))

    def test_left_padding_does_not_change_an_answer(self, model: Any) -> None:
        batch = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], 1)
        batch = torch.cat([batch, IDS[1:, :12]])
        mask = torch.ones_like(batch)
        mask[0, :3] = 0
        both = model.generate(
            batch, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0
        )
        alone = generate(model, PROMPT, max_new_tokens=8)
        assert torch.equal(both[:1, 3 : 3 + alone.shape[1]], alone)

    def test_looked_up_drafts_give_the_greedy_tokens(self, model: Any) -> None:
        prompt = PROMPT.repeat(1, 2)
        kwargs: dict[str, Any] = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 3}
        if model._is_stateful:  # a recurrent state cannot go back over refused tokens
            with pytest.raises(ValueError, match="stateful"):
                generate(model, prompt, **kwargs)
        else:
            greedy = generate(model, prompt, max_new_tokens=12)
            assert torch.equal(generate(model, prompt, **kwargs), greedy)
            assert torch.equal(
                generate(model, prompt, max_new_tokens=12, assistant_model=model), greedy
            )

    @torch.no_grad()
    def test_logits_to_keep_are_rows_of_all_logits(self, model: Any) -> None:
        every, mask = model(IDS).logits, IDS % 2 == 0
        close(model(IDS, logits_to_keep=3).logits, every[:, -3:], 1e-6)
        some = torch.tensor([0, 5])
        close(model(IDS, logits_to_keep=some).logits, every[:, some], 1e-6)
        close(model(IDS, logits_to_keep=mask).logits, every[mask], 1e-6)

    @torch.no_grad()
    def test_a_full_mask_is_taken_as_given(self, model: Any) -> None:
        """For models of attention alone: a token hidden from the last is as good as not there."""
        if model._is_stateful:
            mask = torch.ones_like(IDS)
            close(model(IDS, attention_mask=mask).logits, model(IDS).logits)
            return
        mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
        close(model(IDS, attention_mask=mask).logits, model(IDS).logits)
        mask[:, :, 4:, :4] = False
        places = torch.arange(20).expand(2, -1)
        apart = model(IDS, attention_mask=mask, position_ids=places).logits[:, 4:]
        close(apart, model(IDS[:, 4:], position_ids=places[:, 4:]).logits)


def generate(model: Any, ids: torch.Tensor | None, **kwargs: Any) -> Any:
    defaults: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    if ids is not None:
        defaults["attention_mask"] = torch.ones_like(ids)
    else:
        defaults["attention_mask"] = torch.ones(kwargs["inputs_embeds"].shape[:2])
    return model.generate(ids, **defaults | kwargs)

"""The libraries that people fine-tune and evaluate with, each run for real on a tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, pipeline

from minillm.models import registry

ARCHITECTURES = list(registry.ARCHITECTURES)
IDS = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(1))
eco = [pytest.mark.eco, pytest.mark.filterwarnings("default")]
each = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture
def make_tiny() -> Callable[..., Any]:
    def make(architecture: str, **overrides: Any) -> Any:
        torch.manual_seed(0)
        fields: dict[str, Any] = {
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
            "eos_token_id": 2, "max_position_embeddings": 128, "num_experts": 4,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        } | overrides  # fmt: skip
        known = registry.build_config(architecture).to_dict()
        if "kv_lora_rank" in known:
            fields["num_key_value_heads"] = 4  # keys of its own
        config = registry.build_config(
            architecture, **{name: value for name, value in fields.items() if name in known}
        )
        return registry.build_model(config).eval()

    return make


def has_experts(model: Any) -> bool:
    return any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())


@each
def test_pipeline_gives_the_greedy_text_of_generate(
    architecture: str, make_tiny: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_tiny(architecture)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    output = generate("hello world", max_new_tokens=6, do_sample=False, return_full_text=False)
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert output[0]["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)


class TestPeft:
    pytestmark = eco

    @each
    def test_lora_without_named_layers_finds_them(
        self, architecture: str, make_tiny: Callable[..., Any]
    ) -> None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(make_tiny(architecture), LoraConfig(task_type="CAUSAL_LM", r=2))
        assert 0 < model.get_nb_trainable_parameters()[0] < 10_000
        adapted = {
            name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name
        }
        for index in range(4):  # every layer is adapted
            assert any(f"layers.{index}." in name for name in adapted)

    @each
    @pytest.mark.parametrize("targets", [None, "all-linear"])
    def test_lora_trains_its_own_weights_and_no_others(
        self, architecture: str, targets: Any, make_tiny: Callable[..., Any], tmp_path: Path
    ) -> None:
        from peft import LoraConfig, PeftModel, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
        model = get_peft_model(make_tiny(architecture), config).train()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses = train(model, 12)
        assert losses[-1] < losses[0] - 0.05
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                assert torch.equal(parameter, before[name]), name
        self.check_that_it_is_the_same(model.eval(), tmp_path, make_tiny(architecture), PeftModel)

    @each
    def test_lora_on_packed_experts(
        self, architecture: str, make_tiny: Callable[..., Any], tmp_path: Path
    ) -> None:
        from peft import LoraConfig, PeftModel, get_peft_model

        base = make_tiny(architecture)
        if not has_experts(base):  # a dense model has none: the parameters are not found
            names = ["mlp.gate_proj.weight", "mlp.down_proj.weight"]
        else:
            names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["o_proj"], target_parameters=names
        )
        model = get_peft_model(base, config).train()
        adapted = [name for name, p in model.named_parameters() if p.requires_grad]
        assert any("experts" in name or "gate_proj" in name for name in adapted)
        losses = train(model, 12)
        assert losses[-1] < losses[0] - 0.05
        self.check_that_it_is_the_same(model.eval(), tmp_path, make_tiny(architecture), PeftModel)

    @torch.no_grad()
    def check_that_it_is_the_same(
        self, model: Any, folder: Path, fresh: Any, peft_model: Any
    ) -> None:
        """Saved and loaded; one token at a time; merged into the weights."""
        ids, expected = IDS, model(IDS).logits
        model.save_pretrained(folder)
        loaded = peft_model.from_pretrained(fresh, folder).eval()
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-4)
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            output = model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


def train(model: Any, num_steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


class TestTrainer:
    pytestmark = eco

    @each
    def test_accumulation_gives_the_loss_and_weights_of_one_large_batch(
        self, architecture: str, make_tiny: Callable[..., Any], tmp_path: Path
    ) -> None:
        from transformers import Trainer, TrainingArguments

        generator = torch.Generator().manual_seed(3)
        rows = []
        for length in (3, 9, 5, 14, 7, 2, 11, 6):  # labels of different number in each row
            ids = torch.randint(3, 97, (14,), generator=generator)
            labels = ids.clone()
            labels[length:] = -100
            rows.append({"input_ids": ids, "labels": labels})
        ends = []
        for batch, accumulate in ((4, 1), (1, 4)):
            model = make_tiny(architecture, aux_loss_alpha=0.0, router_aux_loss_coef=0.0)
            arguments = TrainingArguments(
                output_dir=str(tmp_path / f"{batch}"), per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate, max_steps=4, learning_rate=1e-2,
                optim="sgd", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
                seed=5, disable_tqdm=True,
            )  # fmt: skip
            trainer = Trainer(model=model, args=arguments, train_dataset=rows)
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            ends.append((losses, model))
        assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
        pairs = zip(ends[0][1].named_parameters(), ends[1][1].parameters(), strict=True)
        for (name, one), other in pairs:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3, msg=name)


class TestTrl:
    pytestmark = eco

    @each
    def test_sft_with_packing_learns(
        self,
        architecture: str,
        make_tiny: Callable[..., Any],
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
    ) -> None:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        texts = ["hello world", "the quick brown fox", "hello fox", "你好 world"] * 8
        arguments = SFTConfig(
            output_dir=str(tmp_path), packing=True, max_length=32, max_steps=12,
            per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=make_tiny(architecture), args=arguments, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"text": texts}),
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["position_ids"] == 0).sum() > 2, "packed rows hold several documents"
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.7 * losses[0]


class TestEvaluation:
    pytestmark = eco

    @each
    def test_lm_eval_scores_a_local_task(
        self,
        architecture: str,
        make_tiny: Callable[..., Any],
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
    ) -> None:
        import json

        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        model = make_tiny(architecture)
        rows = [
            {"question": "hello", "choices": [" world", " fox", " 你好"], "answer": 0},
            {"question": "the quick", "choices": [" hello", " brown fox", " the"], "answer": 1},
        ]
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = {
            "task": "tiny_choice", "dataset_path": "json", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
            "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}", "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
        result = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64),
            tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
        )  # fmt: skip
        chosen = [self.best_choice(model, tokenizer, row) for row in rows]
        expected = sum(c == row["answer"] for c, row in zip(chosen, rows, strict=True)) / 2
        assert result["results"]["tiny_choice"]["acc,none"] == expected
        for sample, choice in zip(result["samples"]["tiny_choice"], chosen, strict=True):
            scores = [response[0] for response in sample["filtered_resps"]]
            assert scores.index(max(scores)) == choice

    @torch.no_grad()
    def best_choice(self, model: Any, tokenizer: Any, row: dict[str, Any]) -> int:
        """By hand: the choice whose tokens are likeliest after the question."""
        scores = []
        for choice in row["choices"]:
            start = len(tokenizer(row["question"]).input_ids)
            ids = tokenizer(row["question"] + choice, return_tensors="pt").input_ids
            logp = model(ids).logits.log_softmax(-1)
            scores.append(sum(float(logp[0, i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        return scores.index(max(scores))

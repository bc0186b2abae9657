"""LoRA and NEFTune in `sft`: only the small matrices move, files are plain models, runs go on."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm.data.sft import prepare_sft
from minillm.errors import ConfigError
from minillm.log import Silent
from minillm.models import registry
from minillm.models.load import load_model
from minillm.settings import (
    BatchConfig,
    LoraConfig,
    OptimConfig,
    PrepareSftConfig,
    ReportConfig,
    SftConfig,
)
from minillm.train.lora import add_lora, merge
from minillm.train.metrics import read_metrics
from minillm.train.sft import sft

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def cfg(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SftConfig:
    """Four steps on a tiny model."""
    folder = tmp_path_factory.mktemp("sft")
    torch.manual_seed(0)
    config = registry.build_config(
        "mini_llama3:tiny", vocab_size=384, pad_token_id=0, eos_token_id=381, **SIZES, **HEADS
    )
    registry.build_model(config).save_pretrained(folder / "model")
    for file in (corpus / "tokenizer").iterdir():
        shutil.copy(file, folder / "model")
    prepare_sft(
        PrepareSftConfig(
            out=folder / "sft.parquet",
            tokenizer=folder / "model",
            sequence_length=256,
            max_dialogues=100,
        ),
        Silent(),
    )
    return SftConfig(
        model=folder / "model",
        data=folder / "sft.parquet",
        steps=4,
        optim=OptimConfig(lr=1e-2),
        batch=BatchConfig(batch_tokens=512, sequence_length=256, device="cpu", precision="fp32"),
        report=ReportConfig(
            log_every=1, eval_every=4, save_every=2, eval_tokens=512, sample_tokens=0
        ),
    )


def run_again_from_the_middle(cfg: SftConfig, whole: Path, run: Path) -> None:
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-0000004")
    sft(cfg, Silent(), out=run, resume=True)
    name = "final/model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_noise_on_embeddings_is_on_and_survives_a_resume(cfg: SftConfig, tmp_path: Path) -> None:
    noisy = replace(cfg, neftune_alpha=5.0)
    sft(cfg, Silent(), out=tmp_path / "plain")
    sft(noisy, Silent(), out=tmp_path / "noisy")
    plain, other = (
        [row["loss"] for row in read_metrics(tmp_path / name)] for name in ("plain", "noisy")
    )
    assert plain[0] == other[0]  # evaluated before the first step, without noise
    assert plain[1] != other[1]
    run_again_from_the_middle(noisy, tmp_path / "noisy", tmp_path / "again")


@pytest.mark.eco
def test_only_the_small_matrices_move(cfg: SftConfig, tmp_path: Path) -> None:
    tuned = replace(cfg, lora=LoraConfig(lora_rank=4, lora_targets="q_proj,down_proj"))
    sft(tuned, Silent(), out=tmp_path / "run")
    before = load_file(cfg.model / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "down_proj"}
    assert len(moved) == 4
    for name in moved:
        assert torch.linalg.matrix_rank(after[name] - before[name], tol=1e-5) <= 4
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if row["kind"] == "eval"]
    assert losses[-1] < losses[0]
    run_again_from_the_middle(tuned, tmp_path / "run", tmp_path / "again")
    model, _ = load_model(tmp_path / "run")
    assert "lora" not in " ".join(dict(model.named_parameters()))


@pytest.mark.eco
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_the_sum_is_that_of_peft(cfg: SftConfig) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    chosen = LoraConfig(lora_rank=3, lora_alpha=7)

    def shake(model: Any) -> None:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
            if "lora_A" in name:
                torch.nn.init.normal_(parameter)

    ours, _ = load_model(cfg.model)
    add_lora(ours, chosen)
    shake(ours)
    theirs, _ = load_model(cfg.model)
    wrapped: Any = get_peft_model(theirs, PeftConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM"))
    shake(wrapped)
    expected = wrapped.merge_and_unload().state_dict()
    found = merge(ours.state_dict(), chosen)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight)


@pytest.mark.eco
def test_an_unknown_layer_is_named(cfg: SftConfig) -> None:
    model, _ = load_model(cfg.model)
    with pytest.raises(ConfigError, match="no layer `q_porj`"):
        add_lora(model, LoraConfig(lora_rank=2, lora_targets="q_porj"))

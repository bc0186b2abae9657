"""Official folders in both directions, by bytes, and the two commands."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.errors import InputError
from minillm.models import registry
from minillm.models.interop.official import export_official, import_official
from minillm.models.load import load_model

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mini_llama3": (
        "LlamaForCausalLM",
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16},
        {"rope_theta": 10_000.0, "model_type": "llama"},
    ),
    "mini_deepseekv3": (
        "DeepseekV3ForCausalLM",
        {"num_hidden_layers": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 32},
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    ),
    "mini_qwen3_next": (
        "Qwen3NextForCausalLM",
        {"num_hidden_layers": 4, "num_key_value_heads": 2, "moe_intermediate_size": 32},
        {"full_attention_interval": 4, "partial_rotary_factor": 0.25},
    ),
}


@pytest.fixture(params=KINDS)
def saved(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Any:
    torch.manual_seed(0)
    shape = SMALL | KINDS[request.param][1] | {"vocab_size": len(tokenizer)}
    model = registry.build_model(registry.build_config(request.param, **shape))
    model.to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("mlp.gate") and hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.float()  # as trained
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    return request.param, tmp_path


def raw(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model.safetensors")
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def test_there_and_back_every_byte_is_the_same(saved: Any) -> None:
    kind, tmp = saved
    official, _, keys = KINDS[kind]
    export_official(tmp / "ours", tmp / "official")
    import_official(str(tmp / "official"), tmp / "back")
    assert raw(tmp / "ours") == raw(tmp / "official") == raw(tmp / "back")
    config = json.loads((tmp / "official" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [official]
    assert keys.items() <= config.items()
    theirs = AutoModelForCausalLM.from_pretrained(tmp / "official", dtype=torch.float32).eval()
    assert type(theirs).__name__ == official
    ours, tokenizer = load_model(tmp / "back")
    assert tokenizer.chat_template
    ids = torch.randint(3, len(tokenizer), (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=0)


def test_what_transformers_writes_is_imported(saved: Any) -> None:
    kind, tmp = saved
    model, tokenizer = load_model(tmp / "ours")
    model.export_official().save_pretrained(tmp / "theirs")
    tokenizer.save_pretrained(tmp / "theirs")
    import_official(str(tmp / "theirs"), tmp / "in")
    export_official(tmp / "in", tmp / "out")
    assert raw(tmp / "theirs") == raw(tmp / "in") == raw(tmp / "out")
    assert load_model(tmp / "in")[0].config.model_type == kind


def test_commands_and_a_folder_with_files(saved: Any) -> None:
    _, tmp = saved
    runner = CliRunner()
    done = runner.invoke(app, ["export", str(tmp / "ours"), "--out", str(tmp / "a")])
    assert done.exit_code == 0, done.stderr
    assert done.stderr.splitlines() == [f"next: vllm serve {tmp / 'a'}"]  # no bars
    done = runner.invoke(app, ["import", str(tmp / "a"), "--out", str(tmp / "b")])
    assert done.exit_code == 0, done.stderr
    done = runner.invoke(app, ["export", str(tmp / "b"), "--out", str(tmp / "a")])
    assert done.exit_code == 3
    assert "hint:" in done.stderr


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(InputError, match="which no architecture here equals"):
        import_official(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hub_folder_carries_weights_code_and_tokenizer(saved: Any) -> None:
    name, folder = saved
    done = CliRunner().invoke(
        app, ["export", str(folder / "ours"), "--to", "hub", "--out", str(folder / "hub")]
    )
    assert done.exit_code == 0, done.output
    config = json.loads((folder / "hub/config.json").read_text())
    module, _, class_name = config["auto_map"]["AutoModelForCausalLM"].partition(".")
    assert module == f"modeling_{name}"
    assert f"class {class_name}(" in (folder / f"hub/{module}.py").read_text()
    assert raw(folder / "hub") == raw(folder / "ours")
    assert (folder / "hub/tokenizer.json").is_file()

"""Loading good folders, and what is said about bad ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from minillm.errors import InputError
from minillm.models import MiniLlama3ForCausalLM
from minillm.models.load import load_model


@pytest.fixture
def folder(
    make_model: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    path = tmp_path / "model"
    make_model(vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def complete(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    (target / "COMPLETE").touch()
    return target


def scale_weights(folder: Path, factor: float) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor * factor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def first_weight(source: Any) -> float:
    model, _ = load_model(source)
    return float(model.get_input_embeddings().weight.detach()[3, 0])


def test_folder_gives_model_and_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, loaded = load_model(folder)
    assert type(model) is MiniLlama3ForCausalLM
    assert not model.training
    assert model.dtype == torch.float32
    assert loaded.encode("hello 你好") == tokenizer.encode("hello 你好")
    assert loaded.chat_template == tokenizer.chat_template


def test_path_may_be_text_and_dtype_is_taken(folder: Path) -> None:
    model, _ = load_model(str(folder), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_official_export_loads_too(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder)
    model.export_official().save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    official, _ = load_model(tmp_path / "llama")
    assert official.config.model_type == "llama"


def test_run_means_its_final_model(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    complete(folder, run / "checkpoints" / "step-0000001")
    scale_weights(folder, 2.0)
    complete(folder, run / "final")
    assert first_weight(run) == first_weight(run / "final") == first_weight(folder)


def test_unfinished_run_means_its_newest_complete_checkpoint(folder: Path, tmp_path: Path) -> None:
    steps = tmp_path / "run" / "checkpoints"
    complete(folder, steps / "step-0000009")
    scale_weights(folder, 2.0)
    complete(folder, steps / "step-0000010")
    shutil.copytree(folder, steps / "step-0000011")  # killed while it was written
    assert first_weight(tmp_path / "run") == first_weight(steps / "step-0000010")


def test_checkpoint_without_its_mark_is_refused(folder: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step-0000001"
    shutil.copytree(folder, step)
    with pytest.raises(InputError, match="not written to its end"):
        load_model(step)


def test_run_without_a_checkpoint_is_refused_with_a_way_on(tmp_path: Path) -> None:
    (tmp_path / "run.toml").touch()
    with pytest.raises(InputError, match="no complete checkpoint") as caught:
        load_model(tmp_path)
    assert "--resume" in str(caught.value.hint)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_named(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(InputError, match=r"model\.safetensors` is truncated or corrupt"):
        load_model(folder)


def test_garbage_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 5_000)
    with pytest.raises(InputError, match="truncated or corrupt"):
        load_model(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match="no weights"):
        load_model(folder)


def test_missing_weight_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"missing `model\.layers\.1\.mlp\.up_proj\.weight`"):
        load_model(folder)


def test_superfluous_weights_are_counted(folder: Path) -> None:
    path = folder / "model.safetensors"
    more = {f"extra.{index}": torch.zeros(1) for index in range(5)}
    save_file(load_file(path) | more, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"unexpected `extra\.0`.* and 2 more"):
        load_model(folder)


def test_misshapen_weight_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.ones(7)}, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"cannot load|does not fit"):
        load_model(folder)


def test_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ', encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json` is not valid JSON"):
        load_model(folder)


def test_unknown_architecture_is_refused_without_running_its_code(folder: Path) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    path.write_text(json.dumps(fields), encoding="utf-8")
    (folder / "evil.py").write_text("raise SystemExit('code was run')", encoding="utf-8")
    with pytest.raises(InputError, match="cannot load"):
        load_model(folder)


def test_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        load_model(folder)


def test_broken_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="cannot load"):
        load_model(folder)


def test_tokenizer_of_a_larger_model_is_refused(
    folder: Path, tokenizer: PreTrainedTokenizerFast, make_model: Callable[..., Any]
) -> None:
    make_model(vocab_size=97).save_pretrained(folder)
    with pytest.raises(InputError, match=f"{len(tokenizer)} tokens, the model 97"):
        load_model(folder)


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "/nowhere", "runs/x/final/"])
def test_missing_folder_is_an_input_error(source: str) -> None:
    with pytest.raises(InputError, match="no model folder"):
        load_model(source)


def test_folder_without_a_model_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model"):
        load_model(tmp_path)


def test_hub_model_that_cannot_be_had_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the hub did not give it") as caught:
        load_model("nobody-here/no-such-model")
    assert caught.value.hint


@pytest.mark.parametrize("source", ["sft-demo", "runs/sft-dmo-1", "demo/runs/sft-demo-2"])
def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # calling it fails
    (tmp_path / "demo" / "runs" / "sft-demo-1").mkdir(parents=True)
    with pytest.raises(InputError, match=f"no model folder at `{source}`") as caught:
        load_model(source)
    assert caught.value.hint == "did you mean `demo/runs/sft-demo-1`?"

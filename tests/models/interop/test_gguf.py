"""GGUF files against the real llama.cpp."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from minillm import paths
from minillm.data.tokenizer import load_tokenizer
from minillm.errors import InputError
from minillm.models import registry
from minillm.models.interop.gguf import export_gguf
from minillm.models.interop.gguf_tokenizer import pre_tokenizer_name

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is built from source")

NUM_POSITIONS = 200
TEXTS = (
    "The quick brown fox doesn't jump over 13 lazy dogs, it's 2026-11-24!",
    "你好，世界！今天天气怎么样？我有12345个苹果。",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and é à ü ß",
    'def f(x: int) -> str:\n    return f"{x:>10}"\n\n\n\tif a != b:  # c\r\n',
    "  leading and   inner   spaces  ",
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nyes<|im_end|>",
    "3.14159 1e-10 0x1F ½ ² Ⅷ ٣",
)
SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
DEEPSEEK = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}
QWEN = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 64}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("mini_llama3", SMALL),
    "llama_untied_narrow": (
        "mini_llama3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "tie_word_embeddings": False,
        },
    ),
    "llama3_scaling": (
        "mini_llama3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama_biases": ("mini_llama3", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("mini_llama3", {**SMALL, "rope_parameters": LINEAR}),
    "llama_yarn": ("mini_llama3", {**SMALL, "rope_parameters": YARN}),
    "llama_yarn_attention": (
        "mini_llama3",
        {**SMALL, "rope_parameters": {**YARN, "attention_factor": 1.7}},
    ),
    "deepseek": ("mini_deepseekv3", DEEPSEEK),
    "deepseek_halves": ("mini_deepseekv3", {**DEEPSEEK, "rope_interleave": False}),
    "deepseek_yarn": (
        "mini_deepseekv3",
        {**DEEPSEEK, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    "deepseek_yarn_one": (
        "mini_deepseekv3",
        {**DEEPSEEK, "rope_parameters": {**YARN, "attention_factor": 1.0}},
    ),
    "qwen_yarn": (
        "mini_qwen3_next",
        {**QWEN, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    ),
    "qwen": ("mini_qwen3_next", QWEN),
}


@pytest.fixture(scope="module")
def bundled() -> PreTrainedTokenizerFast:
    return load_tokenizer(paths.BUNDLED_TOKENIZER)


def save(name: str, shape: dict[str, Any], tokenizer: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 16}
    if name == "mini_deepseekv3":
        small.pop("head_dim")
    model: Any = registry.build_model(
        registry.build_config(name, **small | shape, vocab_size=len(tokenizer))
    ).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0, 0.15)
            if "norm" in key:
                parameter.add_(0 if name == "mini_qwen3_next" else 1)
        for key, buffer in model.named_buffers():
            if "correction_bias" in key:
                buffer.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def run(path: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Logits of llama.cpp, with an fp32 cache."""
    engine = llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_batch=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=0,
        type_v=0,
        # what the file says, as llama.cpp's own programs do; the binding has its own numbers
        yarn_attn_factor=-1.0,
        yarn_beta_fast=-1.0,
        yarn_beta_slow=-1.0,
        verbose=False,
    )
    engine.eval(tokens)
    logits = np.array(engine.scores[: len(tokens)])
    engine.close()
    return logits


@pytest.mark.parametrize("kind", SHAPES)
def test_llama_cpp_gives_our_logits(kind: str, bundled: Any, tmp_path: Path) -> None:
    name, shape = SHAPES[kind]
    model = save(name, shape, bundled, tmp_path / "model")
    path = export_gguf(tmp_path / "model", tmp_path / "out", "f32")
    tokens = torch.randint(5, len(bundled), (NUM_POSITIONS,)).tolist()
    with torch.no_grad():
        ours = model(torch.tensor([tokens])).logits[0].numpy()
    theirs = run(path, tokens)
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    assert np.abs(ours - theirs).max() < 2e-4  # logits of about 7; measured 4e-5


@pytest.mark.parametrize(("file_type", "allowed"), [("f16", 0.02), ("bf16", 0.06), ("q8_0", 0.06)])
def test_smaller_types_are_near(
    file_type: Any, allowed: float, bundled: Any, tmp_path: Path
) -> None:
    model = save(*SHAPES["llama"], bundled, tmp_path / "model")
    path = export_gguf(tmp_path / "model", tmp_path / "out", file_type)
    tokens = torch.randint(5, len(bundled), (50,)).tolist()
    with torch.no_grad():
        ours = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(ours - run(path, tokens)).max() < allowed * np.abs(ours).max()


def test_tokenizer_ids_are_identical(bundled: Any, tmp_path: Path) -> None:
    save(*SHAPES["llama"], bundled, tmp_path / "model")
    path = export_gguf(tmp_path / "model", tmp_path / "out", "q8_0")
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS:
        theirs = engine.tokenize(text.encode(), add_bos=True, special=True)
        assert theirs == bundled.encode(text), text
        assert engine.detokenize(theirs, special=True).decode() == text
    assert engine.token_eos() == bundled.eos_token_id
    assert engine.metadata["tokenizer.chat_template"] == bundled.chat_template
    engine.close()
    assert "<|im_start|>assistant" in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")


def test_unknown_pre_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="no pre-tokenizer like"):
        pre_tokenizer_name({"pre_tokenizer": {"type": "Whitespace"}})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "mini_llama3",
        {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}},
        "`dynamic` in `llama`",
    ),
    ("mini_llama3", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "its own `beta_fast`"),
    ("mini_llama3", {"rope_parameters": {**YARN, "truncate": False}}, "or `truncate`"),
    ("mini_deepseekv3", DEEPSEEK | {"rope_parameters": LINEAR}, "`linear` in `deepseek2`"),
    ("mini_deepseekv3", DEEPSEEK | {"rope_parameters": YARN}, "`mscale` is not"),
    ("mini_deepseekv3", DEEPSEEK | {"q_lora_rank": None}, "without `q_lora_rank`"),
    ("mini_deepseekv3", DEEPSEEK | {"attention_bias": True}, "with biases"),
    ("mini_deepseekv3", DEEPSEEK | {"num_hidden_layers": 26}, "26 layers"),
    ("mini_qwen3_next", QWEN | {"mlp_only_layers": [0]}, "dense layers"),
    ("mini_qwen3_next", QWEN | {"attention_bias": True}, "with biases"),
]


@pytest.mark.parametrize(("name", "shape", "said"), REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, shape: dict[str, Any], said: str, bundled: Any, tmp_path: Path
) -> None:
    small = {"num_attention_heads": 4, "num_key_value_heads": 4}
    save(name, small | shape, bundled, tmp_path / "model")
    with pytest.raises(InputError, match=said) as caught:
        export_gguf(tmp_path / "model", tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()

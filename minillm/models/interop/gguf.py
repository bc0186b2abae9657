"""GGUF files that stock llama.cpp and Ollama load: a small table for each architecture.

llama.cpp's own names and layouts: the rotary rows of Llama's queries and keys come in pairs (ours
in halves), DeepSeek's `kv_b` is two tensors that attend in the latent space, Qwen3-Next's grouped
projections are flat, and its norms have the one added.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from minillm.errors import InputError
from minillm.files import write_text
from minillm.models.base import MiniPreTrainedModel
from minillm.models.interop import gguf_tensors
from minillm.models.interop.official import (
    attention_interval,
    load_ours,
    new_folder,
    require_gguf,
)

FileType = Literal["f32", "f16", "bf16", "q8_0"]

_PRE = {
    # the Split pattern of tokenizer.json, without lookups of the tokenizer's name
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
_TYPES = ("f32", "f16", "bf16", "q8_0")


def export_gguf(source: str | Path, out: Path, file_type: FileType = "f16") -> Path:
    """Write the model at `source` as `out/NAME.gguf`, with an Ollama `Modelfile`.

    Raises:
        InputError: There is no model of ours, llama.cpp cannot hold it, or `out` is not empty.
        SetupError: The `gguf` package is not installed.
    """
    require_gguf()
    model, tokenizer = load_ours(source)
    name = f"{model.config.model_type}-{file_type}.gguf"
    with new_folder(out) as folder:
        write_gguf(model, tokenizer, folder / name, file_type)
        write_text(folder / "Modelfile", modelfile(name, model))
    return out / name


def write_gguf(
    model: MiniPreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    file_type: FileType,
) -> None:
    """Write one GGUF file (in place; the caller makes it atomic)."""
    import gguf

    architecture, metadata = _ARCHITECTURES[model.official_type]
    writer: Any = gguf.GGUFWriter(path, architecture)
    writer.add_name(model.config.model_type)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPE[file_type]))
    _add_common(writer, model.config)
    metadata(writer, model.config)
    _add_tokenizer(writer, tokenizer, model.config)
    state = {key: value.detach().float().cpu() for key, value in model.state_dict().items()}
    for name, tensor in gguf_tensors.convert(model, state):
        data, kind = _encode(name, tensor.contiguous().numpy(), file_type)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_FILE_TYPE = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}


def _encode(name: str, data: npt.NDArray[np.float32], file_type: str) -> tuple[Any, Any]:
    """Matrices become `file_type`; vectors, routers and convolutions stay fp32."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    wanted = kinds[file_type.upper()]
    if data.ndim < 2 or any(part in name for part in ("ffn_gate_inp", "ssm_conv1d")):
        wanted = kinds.F32
    elif wanted == kinds.Q8_0 and data.shape[-1] % 32:
        wanted = kinds.F16  # q8_0 stores blocks of 32
    return gguf.quants.quantize(data, wanted), wanted


def _add_common(writer: Any, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        if any(rope.get(key) is not None for key in ("attention_factor", "mscale")):
            raise _cannot("YaRN with its own attention factor")
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise _cannot(f"RoPE scaling `{kind}`")


def _cannot(what: str) -> InputError:
    return InputError(
        f"GGUF export does not take {what}", hint="export it with `--to official` instead"
    )


def _llama(writer: Any, config: Any) -> None:
    if config.attention_bias or config.mlp_bias:
        raise _cannot("a Llama with biases")
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)


def _deepseek(writer: Any, config: Any) -> None:
    import gguf

    if config.attention_bias or not config.rope_interleave or config.q_lora_rank is None:
        raise _cannot("a DeepSeek with biases, rope in halves or without `q_lora_rank`")
    if config.num_hidden_layers in (26, 27):
        raise _cannot(f"{config.num_hidden_layers} layers, which llama.cpp takes for V2-Lite")
    if config.rope_parameters["rope_type"] != "default":
        raise _cannot("a DeepSeek with RoPE scaling")
    # attention in the latent space: one key/value head of latent and rotary part
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(float(config.routed_scaling_factor))
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _qwen(writer: Any, config: Any) -> None:
    if not all(config.is_sparse(index) for index in range(config.num_hidden_layers)):
        raise _cannot("a Qwen3-Next with dense layers")
    if config.attention_bias or not config.norm_topk_prob:
        raise _cannot("a Qwen3-Next with biases or without `norm_topk_prob`")
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(config.head_dim * factor))
    writer.add_full_attention_interval(attention_interval(config.layer_types))
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


_ARCHITECTURES: Mapping[str, tuple[str, Callable[[Any, Any], None]]] = {
    "llama": ("llama", _llama),
    "deepseek_v3": ("deepseek2", _deepseek),
    "qwen3_next": ("qwen3next", _qwen),
}


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, config: Any) -> None:
    """Write vocabulary, merges, special tokens, chat template."""
    import gguf

    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    if tree["model"]["type"] != "BPE":
        raise _cannot(f"a {tree['model']['type']} tokenizer")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tree))
    kinds = gguf.TokenType
    added = {item["id"]: item for item in tree["added_tokens"]}
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for index in range(config.vocab_size):
        item = added.get(index)
        tokens.append(item["content"] if item else names.get(index, f"[PAD{index}]"))
        if item:
            types.append(kinds.CONTROL if item["special"] else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL if index in names else kinds.UNUSED)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tree["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for name in ("bos", "eos", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer_name(tree: dict[str, Any]) -> str:
    """Return the name by which llama.cpp knows the pre-tokenizer of a `tokenizer.json`.

    Raises:
        InputError: It knows none like it.
    """
    pre = tree.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    patterns = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    kinds = [step.get("type") for step in steps]
    if len(patterns) == 1 and patterns[0] in _PRE and not tree.get("normalizer"):
        return _PRE[patterns[0]]
    is_gpt2 = kinds[-1:] == ["ByteLevel"] and steps[-1].get("use_regex", True)
    if is_gpt2 and not tree.get("normalizer") and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
    raise InputError(
        "llama.cpp knows no pre-tokenizer like this tokenizer's, and would read text differently",
        hint="train with the bundled tokenizer, or with one of `minillm train-tokenizer`",
    )


def modelfile(name: str, model: MiniPreTrainedModel) -> str:
    """Return an Ollama `Modelfile`; the chat format is ChatML."""
    return (
        f"FROM ./{name}\n"
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ end }}<|im_start|>assistant\n"""\n'
        f"PARAMETER num_ctx {model.config.max_position_embeddings}\n"
        'PARAMETER stop "<|im_end|>"\n'
    )

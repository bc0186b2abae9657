"""GGUF files that stock llama.cpp and Ollama load: a small table for each architecture.

llama.cpp's own names and layouts: the rotary rows of Llama's queries and keys come in pairs (ours
in halves), DeepSeek's `kv_b` is two tensors that attend in the latent space, Qwen3-Next's grouped
projections are flat, and its norms have the one added.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minillm.errors import InputError
from minillm.files import write_text
from minillm.models.base import MiniPreTrainedModel
from minillm.models.interop import gguf_tensors
from minillm.models.interop.gguf_read import require_gguf
from minillm.models.interop.gguf_tokenizer import add_tokenizer
from minillm.models.interop.official import (
    attention_interval,
    load_ours,
    new_folder,
)
from minillm.models.interop.ollama import modelfile

FileType = Literal["f32", "f16", "bf16", "q8_0"]


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
        context = model.config.max_position_embeddings
        write_text(folder / "Modelfile", modelfile(name, tokenizer, context))
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
    _add_common(writer, model.config, architecture)
    metadata(writer, model.config)
    add_tokenizer(writer, tokenizer, model.config)
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


def _add_common(writer: Any, config: Any, architecture: str) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, config, architecture)


_ROPE = {
    "default": ("llama", "deepseek2", "qwen3next"),
    "yarn": ("llama", "deepseek2", "qwen3next"),
    "linear": ("llama", "qwen3next"),
    "llama3": ("llama",),
}
"""Where llama.cpp computes the RoPE scaling of a kind as we do."""


def _add_rope(writer: Any, config: Any, architecture: str) -> None:
    """Write base and scaling; the factors of `llama3` are a tensor."""
    import gguf

    rope = config.rope_parameters
    kind = rope["rope_type"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture not in _ROPE.get(kind, ()):
        raise _cannot(f"RoPE scaling `{kind}` in `{architecture}`")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        _add_yarn(writer, config, architecture)


def _add_yarn(writer: Any, config: Any, architecture: str) -> None:
    """Write YaRN as far as llama.cpp reads it.

    It multiplies the rotated part by `0.1 ln factor + 1` times `attn_factor`. In DeepSeek's
    attention it then either multiplies the scale of the softmax by the square of the same number,
    or, with a `log_mul`, rotates by 1 and takes the square of `log_mul ln factor + 1`.
    """
    rope = config.rope_parameters
    betas = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    if betas != (32, 1) or rope.get("truncate") is False:
        raise _cannot("YaRN with its own `beta_fast`, `beta_slow` or `truncate`")
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(original)
    rotary = ROPE_INIT_FUNCTIONS["yarn"](config, None)[1]
    usual = 0.1 * math.log(max(rope["factor"], 1.0)) + 1
    if architecture == "deepseek2":
        weight = float(rope.get("mscale_all_dim") or 0)
        softmax = 0.1 * weight * math.log(max(rope["factor"], 1.0)) + 1
        if math.isclose(rotary, 1) and not math.isclose(softmax, 1):
            writer.add_rope_scaling_yarn_log_mul(0.1 * weight)
            return
        if not math.isclose(rotary, softmax):
            raise _cannot("a DeepSeek with YaRN where `mscale` is not `mscale_all_dim`")
    if not math.isclose(rotary, usual):
        writer.add_rope_scaling_attn_factors(rotary / usual)


def _cannot(what: str) -> InputError:
    return InputError(
        f"GGUF export does not take {what}", hint="export it with `--to official` instead"
    )


def _llama(writer: Any, config: Any) -> None:
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)


def _deepseek(writer: Any, config: Any) -> None:
    import gguf

    if config.attention_bias or config.q_lora_rank is None:
        raise _cannot("a DeepSeek with biases or without `q_lora_rank`")
    if config.num_hidden_layers in (26, 27):
        raise _cannot(f"{config.num_hidden_layers} layers, which llama.cpp takes for V2-Lite")
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

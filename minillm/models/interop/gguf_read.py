"""GGUF files of the Llama architecture, read as `mini_llama3` in fp32.

Unlike transformers' reader this one keeps biases, RoPE scaling and the pre-tokenizer; what it does
not know it refuses.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from minillm.errors import InputError, SetupError
from minillm.models.interop import gguf_tensors
from minillm.models.interop.gguf_tokenizer import Fields, read_tokenizer
from minillm.models.mini_llama3 import MiniLlama3Config

_INSTEAD = "import the model's safetensors folder instead"


def require_gguf() -> None:
    """Refuse to go on without the `gguf` package.

    Raises:
        SetupError: It is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise SetupError(
            "the package `gguf` is not installed", hint="`pip install 'minillm-lab[gguf]'`"
        ) from None


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the model of a GGUF file, dequantised, and its tokenizer.

    Raises:
        InputError: No such file, a damaged one, or one with something that is not read.
        SetupError: The `gguf` package is not installed.
    """
    if not path.is_file():
        raise InputError(f"there is no file at `{path}`", hint="name a `.gguf` file or a folder")
    require_gguf()
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as err:  # whatever numpy says about missing bytes
        raise InputError(
            f"`{path}` is no GGUF file, or a damaged one: {err}".splitlines()[0],
            hint="copy or download it again",
        ) from err
    if fields.get("general.architecture") != "llama" or fields.get("split.count", 1) > 1:
        raise InputError(
            f"`{path}` holds `{fields.get('general.architecture')}` in "
            f"{fields.get('split.count', 1)} file(s); read is `llama` in one file",
            hint=_INSTEAD,
        )
    try:
        tokenizer = read_tokenizer(fields)
        config = _read_config(fields, tensors, tokenizer)
    except KeyError as err:
        raise InputError(f"`{path}` has no field `{err.args[0]}`", hint=_INSTEAD) from err
    state = {}
    for name, tensor in tensors.items():
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        state[name] = torch.from_numpy(np.array(data, dtype=np.float32))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, state, path)
    return model.eval(), tokenizer


def _read_config(
    fields: Fields, tensors: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> MiniLlama3Config:
    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"llama.{name}", default)

    heads = int(fields["llama.attention.head_count"])
    size = int(fields["llama.embedding_length"])
    head_dim = int(get("attention.key_length", size // heads))
    widths = {head_dim, get("attention.value_length", head_dim)}
    if get("expert_count", 0) or widths != {get("rope.dimension_count", head_dim)}:
        raise InputError("a GGUF Llama with experts or partial rotation is not read", hint=_INSTEAD)
    return MiniLlama3Config(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        hidden_size=size,
        intermediate_size=int(fields["llama.feed_forward_length"]),
        num_hidden_layers=int(fields["llama.block_count"]),
        num_attention_heads=heads,
        num_key_value_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        rms_norm_eps=_plain(fields["llama.attention.layer_norm_rms_epsilon"]),
        max_position_embeddings=int(fields["llama.context_length"]),
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
        rope_parameters=_read_rope(fields, tensors.get("rope_freqs.weight"), head_dim),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _plain(value: float) -> float:
    """Return the shortest decimal number that has this fp32 value: 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value)))


def _read_rope(fields: Fields, factors: Any, head_dim: int) -> dict[str, Any]:
    """Return `rope_parameters`; the `llama3` kind is known by its factors only."""

    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"llama.rope.{name}", default)

    length = int(fields["llama.context_length"])
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _plain(get("freq_base", 1e4))}
    kind = get("scaling.type", "none")
    kind = "linear" if get("scale_linear") and kind == "none" else kind
    if kind in ("linear", "yarn"):
        factor = get("scaling.factor", get("scale_linear", 1.0))
        rope |= {"rope_type": kind, "factor": _plain(factor)}
    elif kind != "none":
        raise InputError(f"RoPE scaling `{kind}` of a GGUF file is not read", hint=_INSTEAD)
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(get("scaling.original_context_length"))
        rope["beta_fast"] = _plain(get("scaling.yarn_beta_fast", 32.0))
        rope["beta_slow"] = _plain(get("scaling.yarn_beta_slow", 1.0))
        if get("scaling.attn_factor", 1.0) != 1.0:
            usual = 0.1 * np.log(rope["factor"]) + 1
            rope["attention_factor"] = float(usual * get("scaling.attn_factor"))
    if factors is not None:
        found = torch.from_numpy(np.array(factors.data, dtype=np.float32))
        for original in (8192, length // max(int(found.max().round()), 1), length):
            rope |= {
                "rope_type": "llama3",
                "factor": _plain(found.max().item()),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
            if torch.allclose(gguf_tensors.llama3_factors(rope, head_dim), found, rtol=1e-5):
                return rope
        raise InputError(
            "the GGUF file has rotary factors that are not those of Llama 3", hint=_INSTEAD
        )
    return rope


def _fill(model: PreTrainedModel, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy weights into the model; every one must have its place, except missing biases (0)."""
    wanted = model.state_dict()
    for name, tensor in tensors.items():
        key = gguf_tensors.our_name(name)
        if name == "rope_freqs.weight":
            continue
        if key not in wanted or wanted[key].shape != tensor.shape:
            raise InputError(
                f"`{path}`: tensor `{name}` {list(tensor.shape)} has no place in a Llama",
                hint=_INSTEAD,
            )
        wanted.pop(key).copy_(gguf_tensors.pairs_to_halves(key, tensor, model.config))
    missing = [key for key in wanted if not key.endswith(".bias")]
    if model.config.tie_word_embeddings:
        missing = [key for key in missing if key != "lm_head.weight"]
    if missing:
        raise InputError(f"`{path}` has no tensor for `{missing[0]}`", hint=_INSTEAD)
    for key in wanted:
        if key.endswith(".bias"):
            wanted[key].zero_()

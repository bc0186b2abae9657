"""Folders of transformers' official classes, written and read.

Module names and conventions are the official ones, so a checkpoint of ours with a rewritten
`config.json` is an official checkpoint, and the other way round. What transformers itself does not
write, but vLLM, SGLang and llama.cpp read, is added to the config.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minillm.errors import InputError
from minillm.files import atomic_folder, write_text
from minillm.models.base import MiniPreTrainedModel, official_config
from minillm.models.interop.gguf_read import read_gguf
from minillm.models.interop.remote_code import write_remote_code
from minillm.models.load import download, find_folder, load_model, quiet_transformers

ARCHITECTURES = {
    "llama": ("mini_llama3", "LlamaForCausalLM"),
    "deepseek_v3": ("mini_deepseekv3", "DeepseekV3ForCausalLM"),
    "qwen3_next": ("mini_qwen3_next", "Qwen3NextForCausalLM"),
}
"""Official `model_type` → ours, and the official class."""

AS_SAVED = cast("torch.dtype", "auto")
"""The dtype that the checkpoint has on disk."""

_OURS_ONLY = ("mtp_loss_weight", "router_bias_update_speed", "auto_map", "model_type")


def export_official(source: str | Path, out: Path) -> PreTrainedModel:
    """Write the model at `source` as a folder of its official class, and return it as loaded.

    Raises:
        InputError: There is no model of ours at `source`, or `out` is not empty.
    """
    model, tokenizer = load_ours(source)
    with new_folder(out) as folder:
        save_folder(model, tokenizer, folder, official_fields(model))
    return model


def export_hub(source: str | Path, out: Path) -> Path:
    """Write the model at `source` as a folder that carries its own code, for a hub.

    `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` needs no minillm.

    Raises:
        InputError: There is no model of ours at `source`, or `out` is not empty.
    """
    model, tokenizer = load_ours(source)
    with new_folder(out) as folder:
        save_folder(model, tokenizer, folder)
        write_remote_code(folder, model)
    return out


def load_ours(source: str | Path) -> tuple[MiniPreTrainedModel, PreTrainedTokenizerFast]:
    """Load a model that must be one of ours, in the dtype it was saved in.

    Raises:
        InputError: It is of another architecture.
    """
    model, tokenizer = load_model(source, dtype=AS_SAVED)
    if not isinstance(model, MiniPreTrainedModel) or model.official_type not in ARCHITECTURES:
        raise InputError(
            f"`{source}` is a `{model.config.model_type}`, not a model of minillm",
            hint=f"make it one first: `minillm import {source} --out FOLDER`",
        )
    return model, tokenizer


def official_fields(model: MiniPreTrainedModel) -> dict[str, Any]:
    """Return the `config.json` of the official class, with the keys that engines need."""
    config: Any = model.config
    made: dict[str, Any] = official_config(config, model.official_type).to_dict()
    for name in _OURS_ONLY[:-1]:
        made.pop(name, None)
    made["architectures"] = [ARCHITECTURES[model.official_type][1]]
    made["dtype"] = str(model.dtype).removeprefix("torch.")
    rope = dict(made["rope_parameters"])
    made["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        rope.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        made["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    made["rope_parameters"] = rope
    if model.official_type == "deepseek_v3":
        # without these, engines take softmax routing and no correction bias
        made |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
        made |= {"ep_size": 1, "seq_aux": True, "aux_loss_alpha": config.aux_loss_alpha}
    if model.official_type == "qwen3_next":
        made["partial_rotary_factor"] = rope["partial_rotary_factor"]
        made["full_attention_interval"] = attention_interval(config.layer_types)
    return made


def attention_interval(layer_types: list[str]) -> int:
    """Return n where every n-th layer has full attention.

    Raises:
        InputError: The pattern has no such n.
    """
    first = layer_types.index("full_attention") + 1 if "full_attention" in layer_types else 0
    pattern = [
        "full_attention" if first and (index + 1) % first == 0 else "linear_attention"
        for index in range(len(layer_types))
    ]
    if not first or pattern != layer_types:
        raise InputError(
            "full attention is not in every n-th layer, which inference engines require",
            hint="use the model in minillm, or train one with the default `layer_types`",
        )
    return first


def save_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    fields: dict[str, Any] | None = None,
) -> None:
    """Write weights and tokenizer, and `fields` as the config."""
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    place = folder / "tokenizer_config.json"
    settings = json.loads(place.read_bytes())
    # transformers 5 writes its own new class name, which version 4 and engines do not know
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only", "gguf_file"):
        settings.pop(key, None)
    write_text(place, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    if fields is not None:
        write_text(folder / "config.json", json.dumps(fields, indent=2) + "\n")


def new_folder(out: Path) -> Any:
    """Return a context that makes `out`, which must not be there or be empty."""
    return atomic_folder(out, ours=lambda _: False)


def import_official(source: str, out: Path) -> PreTrainedModel:
    """Write an official folder, hub model or `.gguf` file as a model of ours.

    Raises:
        InputError: No such model, another architecture, or `out` is not empty.
    """
    with new_folder(out) as folder:
        if source.lower().endswith(".gguf"):
            model, tokenizer = read_gguf(Path(source))
        else:
            model, tokenizer = _read_folder(find_folder(source) or download(source))
        save_folder(model, tokenizer, folder)
    return model


def _read_folder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load an official folder by our class: the same weights under a rewritten config."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if str(fields.get("model_type")) in {ours for ours, _ in ARCHITECTURES.values()}:
        return load_model(folder, dtype=AS_SAVED)  # a published checkpoint, or already ours
    fields = _our_fields(fields, str(folder))
    if fields.get("num_nextn_predict_layers"):
        fields["num_nextn_predict_layers"] = _num_extra_layers(folder, fields)
    with tempfile.TemporaryDirectory() as name:
        view = Path(name)
        for path in folder.iterdir():
            if path.is_file() and path.name != "config.json":
                (view / path.name).symlink_to(path.resolve())
        write_text(view / "config.json", json.dumps(fields))
        return load_model(view, dtype=AS_SAVED)


def _our_fields(fields: dict[str, Any], source: str) -> dict[str, Any]:
    kind = str(fields.get("model_type"))
    if kind not in ARCHITECTURES:
        raise InputError(
            f"`{source}` is a `{kind}`, which no architecture here equals",
            hint=f"choose a model of type {', '.join(ARCHITECTURES)}",
        )
    drop = ("architectures", "auto_map", "quantization_config", "model_type")
    kept = {name: value for name, value in fields.items() if name not in drop}
    return kept | {"model_type": ARCHITECTURES[kind][0]}


def _num_extra_layers(folder: Path, fields: dict[str, Any]) -> int:
    """Count the MTP blocks that a checkpoint has; the official class writes none."""
    first, found = int(fields["num_hidden_layers"]), set[int]()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no dict
                match = re.match(r"model\.layers\.(\d+)\.", name)
                if match and int(match[1]) >= first:
                    found.add(int(match[1]))
    return len(found)

"""Fine-tune a few small matrices beside frozen weights: LoRA, by the PEFT library.

W + alpha/rank * B A for each chosen layer, A (rank, in), B (out, rank), B = 0 at the start (Hu et
al. 2021, arXiv:2106.09685, eq. 3). Checkpoints and `final/` hold the sum, so that they are models
like any other; the small matrices alone stand in the checkpoint's state, for resuming.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.errors import ConfigError, SetupError
from minillm.settings import LoraConfig

_BASE, _A, _B = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(model: PreTrainedModel, cfg: LoraConfig) -> None:
    """Freeze the model and put trainable matrices beside the chosen layers, in place.

    Raises:
        SetupError: PEFT is not installed.
        ConfigError: No layer has one of the names.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise SetupError(
            "`--lora-rank` needs the package `peft`", hint="`pip install 'minillm-lab[lora]'`"
        ) from None
    names = [name.strip() for name in cfg.lora_targets.split(",") if name.strip()]
    targets = names or list(getattr(model, "lora_targets", ("q_proj", "v_proj")))
    modules = {name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)}
    if unknown := [name for name in targets if name not in modules]:
        raise ConfigError(
            f"`--lora-targets`: the model has no layer `{unknown[0]}`",
            hint=f"it has {', '.join(sorted(modules))}",
        )
    config = PeftConfig(
        r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    inject_adapter_in_model(config, model)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def is_adapter(name: str) -> bool:
    """Tell whether a weight is one of the small matrices."""
    return name.endswith((_A, _B))


def merge(weights: Mapping[str, Tensor], cfg: LoraConfig) -> dict[str, Tensor]:
    """Return the weights of the plain model, each chosen one with its product added."""
    merged = {}
    for name, weight in weights.items():
        if is_adapter(name):
            continue
        if name.endswith(_BASE):
            stem = name.removesuffix(_BASE)
            product = weights[stem + _B] @ weights[stem + _A]
            merged[f"{stem}.weight"] = weight + product * (cfg.lora_alpha / cfg.lora_rank)
        else:
            merged[name.replace(".base_layer.", ".")] = weight
    return merged

"""Model names: `mini_llama3` is an architecture, `mini_llama3:tiny` a size of it.

The table holds names only; a model's file is imported when one of its names is used.
"""

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minillm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ARCHITECTURES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "mini_llama3": ("minillm.models.mini_llama3", ("", "small", "tiny", "nano")),
    "mini_deepseekv3": ("minillm.models.mini_deepseekv3", ("", "small", "tiny")),
    "mini_qwen3_next": (
        "minillm.models.mini_qwen3_next",
        ("", "published", "small", "tiny"),
    ),
}
"""Architecture → module, and the keys of its `PRESETS`; `""` is the published shape."""


def names() -> list[str]:
    """Return every model name, e.g. `mini_llama3`, `mini_llama3:small`."""
    return [
        f"{architecture}:{size}" if size else architecture
        for architecture, (_, sizes) in ARCHITECTURES.items()
        for size in sizes
    ]


def build_config(name: str, **overrides: Any) -> "PreTrainedConfig":
    """Return the config of a model, with some fields set otherwise.

    Raises:
        ConfigError: No such model, no such field, or a value that the architecture cannot have.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else f"choose one of {', '.join(names())}"
        raise ConfigError(f"there is no model `{name}`", hint=hint)
    architecture, _, size = name.partition(":")
    module = importlib.import_module(ARCHITECTURES[architecture][0])
    config_class = _config_class(architecture)
    fields = set(config_class().to_dict())
    for field in overrides:
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=1)
            raise ConfigError(
                f"`{architecture}` has no field `{field}`",
                hint=f"did you mean `{near[0]}`?" if near else None,
            )
    try:
        config: PreTrainedConfig = config_class(**{**module.PRESETS[size], **overrides})
    except Exception as err:  # huggingface_hub's validation errors have no common base
        reason = str(err).strip().splitlines()[-1].strip()
        raise ConfigError(f"`{name}` cannot be built with {overrides}: {reason}") from err
    return config


def build_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """Return a freshly initialised model; seed torch before."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _config_class(architecture: str) -> "type[PreTrainedConfig]":
    from transformers import CONFIG_MAPPING

    found: type[PreTrainedConfig] = CONFIG_MAPPING[architecture]
    return found

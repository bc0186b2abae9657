"""Tell PEFT which layers of our architectures LoRA adapts when the user names none.

PEFT has a table of them by `model_type` that knows transformers' own architectures only; without
an entry `LoraConfig()` is an error. The table is filled when a model is made, which is before PEFT
can look, so that importing minillm does not import PEFT.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any


def register_lora_targets(model_type: str, targets: Sequence[str]) -> None:
    """Make `targets` the default `target_modules` of a model type; an entry of PEFT's own stays."""
    if importlib.util.find_spec("peft") is None:
        return
    try:
        from peft.utils import constants
    except ImportError:  # PEFT says what it lacks to those who use it
        return
    table: Any = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    table.setdefault(model_type, list(targets))

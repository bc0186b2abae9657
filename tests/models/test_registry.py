"""Names, presets, and what is said about wrong ones."""

import subprocess
import sys

import pytest
import torch

from minillm.errors import ConfigError
from minillm.models import MiniLlama3ForCausalLM, mini_llama3, registry


def test_table_names_the_presets_of_each_file() -> None:
    assert set(registry.ARCHITECTURES["mini_llama3"][1]) == set(mini_llama3.PRESETS)
    assert registry.names()[:3] == ["mini_llama3", "mini_llama3:small", "mini_llama3:tiny"]


@pytest.mark.parametrize(
    ("name", "vocab_size", "low", "high"),
    [
        ("mini_llama3", 32_004, 95e6, 105e6),
        ("mini_llama3:small", 8_196, 10e6, 15e6),
        ("mini_llama3:tiny", 6_148, 3e6, 5e6),
    ],
)
def test_presets_have_the_size_they_promise(
    name: str, vocab_size: int, low: float, high: float
) -> None:
    with torch.device("meta"):
        model = registry.build_model(registry.build_config(name, vocab_size=vocab_size))
    assert isinstance(model, MiniLlama3ForCausalLM)
    assert low < model.param_count().total < high


@pytest.mark.parametrize("name", [n for n in registry.names() if n.startswith("mini_llama3")])
def test_presets_suit_every_engine(name: str) -> None:
    config = registry.build_config(name)
    assert config.head_dim == 64
    assert config.hidden_size == config.num_attention_heads * config.head_dim


def test_overrides_are_taken() -> None:
    config = registry.build_config(
        "mini_llama3:tiny", vocab_size=500, eos_token_id=7, bos_token_id=None, pad_token_id=1
    )
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (500, 7, 1)


def test_same_seed_gives_the_same_weights() -> None:
    config = registry.build_config("mini_llama3:tiny", vocab_size=100)
    weights = []
    for _ in range(2):
        torch.manual_seed(4)
        weights.append(registry.build_model(config).lm_head.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mini_lama3", "did you mean `mini_llama3`"),
        ("mini_llama3:tinny", "did you mean `mini_llama3:tiny`"),
        ("gpt", "choose one of"),
    ],
)
def test_unknown_model_is_a_config_error_with_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"no model `{name}`") as caught:
        registry.build_config(name)
    assert hint in str(caught.value.hint)


def test_unknown_field_is_a_config_error_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="no field `hiden_size`") as caught:
        registry.build_config("mini_llama3", hiden_size=64)
    assert caught.value.hint == "did you mean `hidden_size`?"


def test_impossible_value_is_a_config_error_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="hidden_size 100 is not a multiple of 12"):
        registry.build_config("mini_llama3", hidden_size=100)


def test_importing_the_package_registers_the_auto_classes() -> None:
    code = (
        "import minillm.models\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "c = AutoConfig.for_model('mini_llama3', hidden_size=24, num_hidden_layers=1)\n"
        "print(type(AutoModelForCausalLM.from_config(c)).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "MiniLlama3ForCausalLM"

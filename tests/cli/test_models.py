"""`minillm models`: what it says is true of the models, and fits a terminal."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.models import registry
from minillm.models.summary import build_on_meta, layer_table, load_config, summarize

PLAIN = {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"}


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["models", *words], env=PLAIN)


def test_every_model_has_a_line_of_plain_text() -> None:
    result = run()
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == registry.names()
    assert max(map(len, lines)) <= 80
    assert result.stdout.isascii()
    assert lines[1].split()[1:4] == ["100.5M", "100.5M", "24.6M"]


@pytest.mark.parametrize("name", registry.names())
def test_layer_table_has_every_parameter_once(name: str) -> None:
    lines = run("show", name).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    model = build_on_meta(load_config(name))
    total = sum(p.numel() for p in model.parameters())
    assert lines[-1].split() == ["total", f"{total:,}"]
    rows = [(block, row) for block in layer_table(model) for row in block.rows]
    assert sum(max(1, len(b.layers)) * row.params for b, row in rows) == total


@pytest.mark.parametrize("architecture", sorted(registry.ARCHITECTURES))
def test_cache_bytes_are_those_of_a_real_cache(architecture: str) -> None:
    """Counted on a real forward pass in bf16, layer by layer."""
    name = f"{architecture}:tiny"
    made = summarize(name, 64)
    torch.manual_seed(0)
    model = registry.build_model(registry.build_config(name)).eval().to(torch.bfloat16)
    sizes = []
    for length in (20, 33):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.zeros(1, length, dtype=torch.long), past_key_values=cache)
        states = [
            state
            for layer in cache.layers
            for field in ("conv_states", "recurrent_states")
            for state in getattr(layer, field, {}).values()
        ]
        kept = [
            t for layer in cache.layers for t in (_keys(layer), _values(layer)) if t is not None
        ]
        sizes.append(sum(t.numel() * t.element_size() for t in [*kept, *states]))
    assert (sizes[1] - sizes[0]) / 13 == made.cache_bytes
    assert sizes[0] == 20 * made.cache_bytes + made.state_bytes


def _keys(layer: Any) -> Any:
    return getattr(layer, "keys", None)


def _values(layer: Any) -> Any:
    return getattr(layer, "values", None)


def test_longer_contexts_cost_more() -> None:
    short, long = (summarize("mini_llama3:tiny", n) for n in (100, 1_100))
    assert long.flops - short.flops == 12 * 4 * 256 * 1_000


def test_a_folder_can_be_shown(tmp_path: Path) -> None:
    registry.build_config("mini_llama3:tiny", vocab_size=300).save_pretrained(tmp_path)
    assert re.search(r"model\.embed_tokens\.weight +300 x 256", run("show", str(tmp_path)).stdout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "mini_lama3"], "did you mean `mini_llama3`?"),
        (["--seq-len", "0"], "`--seq-len` must be positive, got 0"),
    ],
)
def test_wrong_use_is_two_lines_and_exit_code_2(words: list[str], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 2
    assert said in result.stderr

"""`minillm verify`: a good model passes, and each kind of broken one is caught."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.normalizers import NFKC
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from minillm import paths
from minillm.cli.app import app
from minillm.models import attention, mini_llama3, registry
from minillm.models.verify import check_tokenizer, randomize, verify

PLAIN = {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"}
CHECKS = [
    *("one token at a time", "the generator's cache", "prompt in chunks"),
    *("padded on the left", "documents in one row"),
]
SHAPE = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2}


def small() -> Any:
    torch.manual_seed(0)
    config = registry.build_config("mini_llama3:tiny", **SHAPE, intermediate_size=160)
    return randomize(registry.build_model(config)).eval()


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["verify", "--no-compile", *words], env=PLAIN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths.BUNDLED_TOKENIZER)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [f"{a}:tiny" for a in sorted(registry.ARCHITECTURES)])
def test_a_model_by_name_passes(name: str) -> None:
    result = run(name)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line[:24].rstrip() for line in lines[1:6]] == CHECKS
    assert all(line.endswith(" ok") for line in lines[1:])
    assert max(map(len, lines)) <= 80


def test_a_folder_passes(folder: Path) -> None:
    result = run(str(folder))
    assert result.exit_code == 0, result.stderr
    assert "LlamaForCausalLM" in result.stdout


def test_a_miss_is_named_and_exits_5(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = mini_llama3.apply_rope

    def wrong(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return right(x, cos[:, :1].expand_as(cos), sin[:, :1].expand_as(sin))  # forgets positions

    monkeypatch.setattr(mini_llama3, "apply_rope", wrong)
    result = run(str(folder))
    assert result.exit_code == 5
    assert "MISSED" in result.stdout
    error, hint = result.stderr.splitlines()[-2:]
    assert "checks missed" in error
    assert "LlamaForCausalLM" in error
    assert hint.startswith("hint: ")


def test_a_cache_that_forgets_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from minillm.models.cache import ReservedLayer

    right = ReservedLayer.update

    def wrong(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any) -> Any:
        return right(self, keys, values.roll(1, 0), *args)

    monkeypatch.setattr(ReservedLayer, "update", wrong)
    missed = [c.name for c in verify(small(), num_tokens=24, with_compile=False) if not c.is_ok]
    assert missed == ["the generator's cache"]


def test_documents_that_see_each_other_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.create_causal_mask
    monkeypatch.setattr(
        attention,
        "create_causal_mask",
        lambda **kwargs: right(**kwargs | {"position_ids": None}),
    )
    missed = [c.name for c in verify(small(), num_tokens=24, with_compile=False) if not c.is_ok]
    assert missed == ["documents in one row"]


def test_a_number_that_is_none_is_a_miss() -> None:
    model = small()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    assert not any(c.is_ok for c in verify(model, num_tokens=24, with_compile=False))


def test_texts_that_change_are_counted() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths.BUNDLED_TOKENIZER)
    assert check_tokenizer(tokenizer, len(tokenizer)).is_ok
    assert check_tokenizer(tokenizer, 300).error > 5  # ids outside the model
    tokenizer.backend_tokenizer.normalizer = NFKC()
    assert check_tokenizer(tokenizer, len(tokenizer)).error >= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_compiled_model_is_compared_too() -> None:
    names = [c.name for c in verify(small(), num_tokens=16) if c.is_ok]
    assert names == [*CHECKS, "compiled", "LlamaForCausalLM"]


def test_no_model_is_an_input_error(tmp_path: Path) -> None:
    result = run(str(tmp_path / "nothing here"))
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("mini_lama3:tiny", "mini_llama3:tiny"), ("mini_deepseek3", "mini_deepseekv3")],
)
def test_a_mistyped_name_gets_a_suggestion(typed: str, meant: str) -> None:
    result = run(typed)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"error: there is no model `{typed}`",
        f"hint: did you mean `{meant}`?",
    ]


def test_an_unknown_run_is_an_error_of_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sft-nothing-9", "runs/sft-nothing-9"):
        result = run(name)
        assert result.exit_code == 3
        assert len(result.stderr.splitlines()) == 2
        assert name in result.stderr

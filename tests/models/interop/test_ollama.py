"""The Modelfile, parsed by Ollama's documented grammar, its template rendered as Go would."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from minillm import paths
from minillm.models.interop.ollama import modelfile

INSTRUCTIONS = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE"}
PARAMETERS = {"num_ctx": int, "stop": str, "temperature": float, "top_p": float, "top_k": int}
DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi \n 你好"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "1+1=?"},
]


def parse(text: str) -> list[tuple[str, str]]:
    """Instructions and arguments: to the end of the line, or within three quotes."""
    found, rest = [], text
    while rest.strip():
        match = re.match(
            r"\s*(?:#.*\n\s*)*(\w+) (?:\"\"\"(.*?)\"\"\"|([^\n]+))(?:\n|$)", rest, re.DOTALL
        )
        assert match, rest
        found.append((match[1], match[3] if match[2] is None else match[2]))
        rest = rest[match.end() :]
    return found


def render(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of one `range` over messages."""
    match = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S)
    assert match
    done = match[1]
    for message in messages:
        turn = match[2].replace("{{ .Role }}", message["role"])
        done += turn.replace("{{ .Content }}", message["content"])
    done += match[3]
    assert "{{" not in done
    return done


def load(template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths.BUNDLED_TOKENIZER)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def check(text: str) -> dict[str, Any]:
    items = parse(text)
    assert items[0][0] == "FROM"
    made: dict[str, Any] = {"stop": []}
    for name, argument in items:
        assert name in INSTRUCTIONS
        if name != "PARAMETER":
            assert name not in made
            made[name] = argument
            continue
        key, value = argument.split(" ", 1)
        if key == "stop":
            assert re.fullmatch(r'"[^"]+"', value)
            made["stop"].append(value[1:-1])
        else:
            made[key] = PARAMETERS[key](value)
    return made


def test_our_template_is_rendered_by_ollama_as_by_us() -> None:
    tokenizer = load()
    made = check(modelfile("model.gguf", tokenizer, 2048))
    assert made["FROM"] == "./model.gguf"
    assert made["num_ctx"] == 2048
    assert "SYSTEM" not in made
    assert made["stop"][0] == "<|im_end|>" == tokenizer.eos_token
    for messages in (DIALOGUE, DIALOGUE[1:2]):
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert render(made["TEMPLATE"], messages) == expected


def test_default_system_message_is_kept() -> None:
    tokenizer = load(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
        'You are "Smol",\nkind.<|im_end|>\n{% endif %}{{ "<|im_start|>" + m.role + "\n" + '
        'm.content + "<|im_end|>\n" }}{% endfor %}{% if add_generation_prompt %}'
        '{{ "<|im_start|>assistant\n" }}{% endif %}'
    )
    made = check(modelfile("m.gguf", tokenizer, 131_072))
    assert made["num_ctx"] == 32_768
    asked = DIALOGUE[1:2]
    expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    system = [{"role": "system", "content": made["SYSTEM"]}]
    assert render(made["TEMPLATE"], [*system, *asked]) == expected


@pytest.mark.parametrize("template", ["{% for m in messages %}[{{ m.content }}]{% endfor %}", ""])
def test_another_template_is_left_to_the_file(template: str) -> None:
    made = check(modelfile("m.gguf", load(template), 512))
    assert "TEMPLATE" not in made
    assert made["stop"] == ["<|im_end|>"]  # its eos token


def test_export_writes_it(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from minillm.models import registry
    from minillm.models.interop.gguf import export_gguf

    small = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "head_dim": 16}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    registry.build_model(registry.build_config("mini_llama3", **small)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = export_gguf(tmp_path, tmp_path / "out")
    made = check((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))
    assert tmp_path / "out" / made["FROM"] == path
    assert path.is_file()

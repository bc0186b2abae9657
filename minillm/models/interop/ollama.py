"""The `Modelfile` from which `ollama create` makes a model of a GGUF file.

Format: https://docs.ollama.com/modelfile; templates are Go's, with `.Messages`, `.Role` and
`.Content`.
"""

import re

from transformers import PreTrainedTokenizerFast

MAX_CONTEXT = 32_768
"""Ollama reserves memory for the whole context, so no more than this is asked for."""

_CHATML = (
    "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
    "{{ end }}<|im_start|>assistant\n"
)
_ASKED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def modelfile(gguf_name: str, tokenizer: PreTrainedTokenizerFast, context_length: int) -> str:
    """Return the text of a `Modelfile`.

    A chat template that renders ChatML becomes a Go template, with its system message for
    dialogues without one. Any other is left to Ollama, which looks into the GGUF file.

    Args:
        gguf_name: The file beside the `Modelfile`.
        tokenizer: Whose chat template and eos token count.
        context_length: Most tokens that the model takes.
    """
    lines = [f"FROM ./{gguf_name}"]
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    system = _chatml_system(tokenizer)
    if system is not None:
        lines.append(f'TEMPLATE """{_CHATML}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
        stops = list(dict.fromkeys(["<|im_end|>", "<|im_start|>", *stops]))
    lines.append(f"PARAMETER num_ctx {min(context_length, MAX_CONTEXT)}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _chatml_system(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the system message that a template adds (perhaps none), or None if not ChatML."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    asked = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    match = re.fullmatch(
        r"(?:<\|im_start\|>system\n(.*)<\|im_end\|>\n)?" + re.escape(_ASKED), str(text), re.DOTALL
    )
    if match is None or '"""' in (match[1] or ""):
        return None
    return match[1] or ""

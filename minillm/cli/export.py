"""`minillm export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from minillm.cli.console import say, show_facts
from minillm.errors import ConfigError
from minillm.files import human_bytes

Source = Annotated[
    str,
    typer.Argument(
        metavar="[RUN_OR_FOLDER]", help="Run folder or model folder; `auto` is the newest run."
    ),
]
To = Annotated[
    Literal["official", "hub", "gguf"],
    typer.Option(
        help="`official`: a folder for transformers, vLLM, SGLang; `hub`: our own class with its "
        "code in the folder; `gguf`: llama.cpp."
    ),
]
Out = Annotated[Path, typer.Option(help="New folder for the result.")]
Type = Annotated[
    Literal["f32", "f16", "bf16", "q8_0"] | None,
    typer.Option("--type", help="How a GGUF file stores matrices; default f16."),
]


def export(
    source: Source = "auto",
    to: To = "official",
    out: Out = Path("export"),
    file_type: Type = None,
) -> None:
    """Write a model for other tools: transformers, vLLM, SGLang, llama.cpp, Ollama."""
    from minillm.models.interop.gguf import export_gguf
    from minillm.models.interop.official import export_hub, export_official
    from minillm.serve.source import find_source

    found = find_source(source)
    if to == "gguf":
        path = export_gguf(found, out, file_type or "f16")
        show_facts("exported", {"file": path, "size": human_bytes(path.stat().st_size)})
        say(f"next: ollama create my-model -f {out / 'Modelfile'}")
        return
    if file_type is not None:
        raise ConfigError("`--type` is for GGUF files", hint="add `--to gguf`, or leave it out")
    if to == "hub":
        say(f"next: hf upload YOUR_NAME/YOUR_MODEL {export_hub(found, out)}")
        return
    model = export_official(found, out)
    show_facts("exported", {"folder": out, "class": model.config.model_type, "dtype": model.dtype})
    say(f"next: vllm serve {out}")

"""Which model to talk to, and loading it."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minillm import paths
from minillm.device import pick_device, pick_dtype
from minillm.errors import InputError
from minillm.models.load import load_model
from minillm.models.quantize import Kind, quantize_model

DEMO_RUNS = Path("demo") / "runs"


def find_source(given: str) -> str:
    """Return the run folder, model folder or hub id meant by `given`.

    `auto` is the newest finished SFT run below `runs/`, else the newest finished pretrain run
    there, else the same below `demo/runs/`.

    Raises:
        InputError: `auto` finds no finished run.
    """
    if given != "auto":
        return given
    for runs in (paths.RUNS, DEMO_RUNS):
        for stage in ("sft", "pretrain"):
            found = paths.latest_run(runs, stage, finished=True)
            if found is not None:
                return found.as_posix()
    raise InputError(
        "there is no finished run in `runs/` or `demo/runs/`",
        hint="`minillm demo` makes a small model in minutes; or name one: `--model FOLDER`",
    )


def short_name(source: str) -> str:
    """Return a name for clients: the run's or folder's; a hub id as it is.

    >>> short_name("runs/sft-mini_llama3-1/final")
    'sft-mini_llama3-1'
    >>> short_name("runs/sft-mini_llama3-1/checkpoints/step-0000100")
    'sft-mini_llama3-1/step-0000100'
    """
    path = Path(source)
    if not path.exists() and not path.is_absolute() and source.count("/") == 1:
        return source if path.parts[0] not in (".", "runs") else path.name
    path = path if path.name not in ("", "..", ".") else path.resolve()
    if path.name == "final":
        return path.absolute().parent.name
    if path.parent.name == "checkpoints":
        return f"{path.absolute().parent.parent.name}/{path.name}"
    return path.name


def load(
    source: str, *, device: str, precision: str, quantize: Kind | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load model and tokenizer onto a device named as in the config.

    With `quantize`, weights are packed for decoding on a CPU, in that many bits. `auto` is then
    fp32 there, also where the processor has bf16: packed products are of fp32, and faster.

    Raises:
        InputError: No model there, or it is broken.
        SetupError: The device is not there.
        ConfigError: Fewer bits are asked for, and the device is no CPU.
    """
    chosen = pick_device(device)
    is_packed = quantize is not None and chosen.type == "cpu"
    dtype = pick_dtype("fp32" if is_packed and precision == "auto" else precision, chosen)
    model, tokenizer = load_model(source, device=chosen, dtype=dtype)
    return model if quantize is None else quantize_model(model, quantize), tokenizer

"""Checkpoints that are whole or not there.

A checkpoint is written into a hidden folder, fsynced, marked `COMPLETE`, and renamed. What a kill
leaves behind is a hidden folder that the next save removes. Only safetensors and JSON are
written, so nothing is ever unpickled.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from transformers import PreTrainedModel

from minillm.errors import InputError
from minillm.files import fsync_folder, fsync_tree, named_os_errors
from minillm.paths import is_complete
from minillm.train.optim import load_optimizer_tensors, optimizer_tensors
from minillm.train.state import TrainState, load_rng_tensors, rng_tensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_STATE = "trainer_state"


def save_checkpoint(
    run: Path,
    model: PreTrainedModel,
    optimizers: Sequence[Optimizer],
    state: TrainState,
    tokenizer_folder: Path,
) -> Path:
    """Write `checkpoints/step-NNNNNNN` and return it.

    Raises:
        SetupError: The disk is full; earlier checkpoints are untouched.
    """
    target = run / "checkpoints" / f"step-{state.step:07d}"
    device = next(model.parameters()).device

    def fill(folder: Path) -> None:
        save_model(folder, model, tokenizer_folder)
        tensors = optimizer_tensors(model, optimizers) | rng_tensors(device)
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(plain, folder / f"{_STATE}.safetensors")
        text = json.dumps(state.to_json(), indent=1)
        (folder / f"{_STATE}.json").write_text(text, encoding="utf-8")

    write_folder(target, fill)
    return target


def save_model(folder: Path, model: PreTrainedModel, tokenizer_folder: Path) -> None:
    """Write weights, config and tokenizer: what `AutoModelForCausalLM.from_pretrained` takes."""
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)


def write_folder(target: Path, fill: Any) -> None:
    """Make `target` appear at once, with what `fill(folder)` writes and a `COMPLETE` marker."""
    part = target.with_name(f".{target.name}.part")
    try:
        with named_os_errors(target), _safetensors_os_errors():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            fill(part)
            (part / "COMPLETE").write_text("", encoding="utf-8")
            fsync_tree(part)
            if target.exists():
                shutil.rmtree(target)
            part.rename(target)
            fsync_folder(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _safetensors_os_errors:  # noqa: N801 - reads as a context, like contextlib's
    """Safetensors reports a full disk as its own error: make it an OSError again."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, SafetensorError) and "os error 28" in str(error):
            raise OSError(28, "No space left on device") from error


def load_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    optimizers: Sequence[Optimizer],
) -> TrainState:
    """Restore weights, optimizer and random state in place, and return the position.

    Raises:
        InputError: A file is missing or damaged.
    """
    device = next(model.parameters()).device
    model_class: Any = type(model)
    try:
        # by the model's own class: names on disk may differ from those in memory (experts)
        loaded, info = model_class.from_pretrained(
            folder, dtype=model.dtype, local_files_only=True, output_loading_info=True
        )
        tensors = load_file(folder / f"{_STATE}.safetensors")
        position = json.loads((folder / f"{_STATE}.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(
            f"checkpoint `{folder}` is damaged: {error}",
            hint=f"remove it (`rm -r {folder}`) and resume again from the one before",
        ) from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong or loaded.state_dict().keys() != model.state_dict().keys():
        raise InputError(f"checkpoint `{folder}` does not fit the model: {', '.join(wrong[:3])}")
    model.load_state_dict(loaded.state_dict())
    load_optimizer_tensors(
        model, optimizers, {k: v for k, v in tensors.items() if not k.startswith("rng.")}
    )
    load_rng_tensors(tensors, device)
    return TrainState.from_json(position)


def newest_checkpoint(run: Path) -> Path | None:
    """Return the latest complete checkpoint of a run."""
    return next(iter(_complete(run)), None)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints."""
    for old in _complete(run)[keep:]:
        (old / "COMPLETE").unlink()  # first: a half-removed checkpoint must not count
        shutil.rmtree(old)


def _complete(run: Path) -> list[Path]:
    found = [path for path in run.glob("checkpoints/step-*") if is_complete(path)]
    return sorted(found, reverse=True)

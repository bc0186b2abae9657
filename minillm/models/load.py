"""Load a model and its tokenizer from a folder, a run or the hub, or say plainly why not.

Only safetensors and JSON are read and no code from a checkpoint is run. A checkpoint must fit its
config exactly: a missing, superfluous or misshapen weight is an error, not a warning.
"""

import contextlib
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from minillm import paths
from minillm.errors import InputError
from minillm.models.interop.published import read_published

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return (model in evaluation mode, tokenizer).

    Args:
        source: A model folder; a run folder, which means its `final/` or else its newest complete
            checkpoint; or the id of a model on the hub, `owner/name`.
        device: Where the weights go.
        dtype: What the weights become.

    Raises:
        InputError: There is no model, it is damaged, or its parts do not belong together.
    """
    folder = find_folder(source) or download(str(source))
    _check_files(folder)
    return _load(folder, device, dtype)


def find_folder(source: str | Path) -> Path | None:
    """Return the folder with the weights that `source` means, or None for a hub id.

    Raises:
        InputError: Neither a folder with a model nor something that may be a hub id.
    """
    path = Path(source)
    if not path.exists():
        is_local = path.parts[0] == paths.RUNS.name or path.parent.is_dir()
        if isinstance(source, str) and _HUB_ID.fullmatch(source) and not is_local:
            return None
        raise InputError(f"there is no model folder at `{source}`", hint=_suggest(path.name))
    if (path / "config.json").is_file():
        if path.absolute().parent.name == "checkpoints" and not paths.is_complete(path):
            raise InputError(
                f"checkpoint `{path}` was not written to its end",
                hint=f"use the newest complete one: `--model {path.parent.parent}`",
            )
        return path
    complete = sorted(step for step in path.glob("checkpoints/step-*") if paths.is_complete(step))
    if paths.is_complete(path / "final"):
        return path / "final"
    if complete:
        return complete[-1]
    if (path / "run.toml").is_file():
        raise InputError(
            f"run `{path}` has no complete checkpoint yet",
            hint=f"continue it: `minillm pretrain --config {path / 'run.toml'} --resume`",
        )
    raise InputError(
        f"`{path}` holds no model: it has no `config.json`",
        hint="name a run folder below `runs/`, or a folder that `save_pretrained` wrote",
    )


def _suggest(name: str) -> str:
    """Return a hint for the name of a run or folder that is not there."""
    places = [*paths.RUNS.glob("*"), *Path("demo", "runs").glob("*"), *Path().glob("*")]
    found = {place.name: place for place in reversed(places) if place.is_dir()}
    near = difflib.get_close_matches(name, found, n=1)
    if near:
        return f"did you mean `{found[near[0]].as_posix()}`?"
    return "`ls runs` shows the runs; a hub id looks like `owner/name`"


def download(hub_id: str) -> Path:
    """Return the folder in Hugging Face's cache with a model, downloaded if it is not there yet.

    Raises:
        InputError: The hub does not give it.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    with _named_errors(hub_id, is_local=False):
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
    if not (folder / "config.json").is_file():
        raise InputError(
            f"`{hub_id}` on the hub holds no model: it has no `config.json`",
            hint="choose a repository with `config.json` and `model.safetensors`",
        )
    return folder


def _check_files(folder: Path) -> None:
    """Find the usual damage before transformers does, to name the file."""
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as err:
        raise InputError(
            f"`{folder / 'config.json'}` is not valid JSON: {err}", hint=_AGAIN
        ) from None
    weights = sorted(folder.glob("*.safetensors"))
    if not any(path.name.startswith("model") for path in weights):
        raise InputError(
            f"`{folder}` has no weights: no `model.safetensors`",
            hint="pickled weights are not read; save them again with `model.save_pretrained`",
        )
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as err:
            raise InputError(
                f"checkpoint `{path}` is truncated or corrupt: {err}", hint=_AGAIN
            ) from None
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"`{folder}` has no tokenizer: no `tokenizer.json`",
            hint=f"copy the one it was trained with: `cp TOKENIZER/*token* {folder}`",
        )


_AGAIN = "copy or download the folder again, or use an earlier checkpoint of the run"


def _load(
    folder: Path, device: str | torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    source = folder.as_posix()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _named_errors(source, is_local=True), quiet_transformers():
        published = read_published(folder)
        if published is None:
            config = AutoConfig.from_pretrained(source, **options)
        else:
            config, state = published
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **options)
        # with weights given, transformers wants the class itself and no name
        loader: Any = AutoModelForCausalLM
        if published is not None:
            loader = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            options |= {"state_dict": state}
        loaded: Any = loader.from_pretrained(
            source if published is None else None,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    for what in ("missing", "unexpected", "mismatched"):
        if keys := sorted(str(key) for key in info[f"{what}_keys"]):
            raise InputError(
                f"`{source}` does not fit its config: {what} {_shorten(keys)}",
                hint="the weights and `config.json` must come from the same training",
            )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"the tokenizer of `{source}` is a {type(tokenizer).__name__} without `tokenizer.json`",
            hint="choose a model with a `tokenizer.json`",
        )
    num_rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_rows:
        raise InputError(
            f"the tokenizer of `{source}` has {len(tokenizer)} tokens, the model {num_rows}",
            hint="put the tokenizer that the model was trained with into its folder",
        )
    ready: PreTrainedModel = model.to(device).eval()
    return ready, tokenizer


@contextlib.contextmanager
def _named_errors(source: str, is_local: bool) -> Iterator[None]:
    """Turn whatever transformers raises about a checkpoint into an InputError with one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as err:  # tokenizers raises bare Exception, transformers half a dozen kinds
        lines = [line.strip() for line in str(err).splitlines() if line.strip()]
        reason = lines[0] if lines else type(err).__name__
        if is_local:
            raise InputError(f"cannot load `{source}`: {reason}", hint=_AGAIN) from err
        raise InputError(
            f"`{source}` is no folder here, and the hub did not give it: {reason}",
            hint="check the name and the network, or name a folder: `ls runs`",
        ) from err


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the bars and reports of transformers; their content becomes an error of ours."""
    was_on, verbosity = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_on:
            transformers_logging.enable_progress_bar()


def _shorten(keys: list[str]) -> str:
    shown = ", ".join(f"`{key}`" for key in keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"

"""A run's folder: made, described in `run.toml`, and checked before a run continues."""

import os
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from minillm import __version__, paths
from minillm.config import knobs, read_toml, to_plain, write_toml
from minillm.device import describe
from minillm.errors import ConfigError, InputError
from minillm.files import named_os_errors
from minillm.train.distributed import World

# what may change when a run continues: none of it touches the numbers of a step beyond rounding
_FREE = {"device", "compile", "activation_checkpointing", "micro_batch", "on_nonfinite"}
# what may differ between the machines of a run
_OWN = {"data", "val_data", "tokenizer", "batch.device", "several.nproc"}
_SHA256_DIGITS = 64
_SECOND = 10**9  # nanoseconds
_FREE_SECTIONS = {"report", "several"}


def begin_run(
    cfg: Any,
    stage: str,
    name: str,
    out: Path | None,
    facts: Mapping[str, str],
    resume: bool,
    world: World,
) -> Path:
    """Return the run's folder, created or, when resuming, checked.

    Args:
        cfg: The resolved config.
        stage: `pretrain` or `sft`.
        name: What is trained, for the folder's name.
        out: The folder, or None for a new one below `runs/`.
        facts: Fingerprints of data and tokenizer.
        resume: Continue in `out`.
        world: The processes of the run; the main one creates the folder.

    Raises:
        ConfigError: `out` holds a run already, or a changed setting would break the resume.
        InputError: Data or tokenizer are not what the run began with.
    """
    if not world.is_main:
        assert out is not None, "the main process has made it"
        return out
    run = out or paths.new_run_folder(paths.RUNS, stage, name)
    file = run / paths.RUN_FILE
    if file.is_file():
        if not resume:
            raise ConfigError(
                f"`{run}` holds a run already",
                hint=f"`minillm {stage} --resume {run}` continues it; or choose another `--out`",
            )
        _check_settings(cfg, file)
        _check_facts(file, facts, cfg)
        return run
    with named_os_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        write_toml(cfg, file, _provenance(cfg, facts))
        _make_newest(file)
    return run


def _make_newest(file: Path) -> None:
    """Date a run after those beside it: the newest is the last begun, however the clock jumped."""
    others = (other for other in file.parent.parent.glob(f"*/{file.name}") if other != file)
    newest = max((other.stat().st_mtime_ns for other in others), default=0)
    if newest >= file.stat().st_mtime_ns:
        os.utime(file, ns=(newest + _SECOND, newest + _SECOND))


def _check_settings(cfg: Any, file: Path) -> None:
    now, then = _flat(to_plain(cfg)), _flat(to_plain_from(file, type(cfg)))
    for knob in knobs(type(cfg)):
        if knob.name in _FREE or knob.section in _FREE_SECTIONS:
            continue
        if now.get(knob.path) != then.get(knob.path):
            raise ConfigError(
                f"`{knob.path}` was {then.get(knob.path)} when `{file.parent}` began, "
                f"now {now.get(knob.path)}",
                hint="leave that flag out to resume, or start a new run without `--resume`",
            )


def check_alike(cfg: Any, facts: Mapping[str, str], world: World) -> None:
    """Refuse processes that were started with different settings, data or tokenizers.

    Paths may differ, for machines may have copies; what lies there may not.

    Raises:
        ConfigError: They differ; raised in all of them.
    """
    flat = _flat(to_plain(cfg))
    mine = {key: value for key, value in flat.items() if key not in _OWN} | dict(facts)
    everyone = world.gather(mine)
    for rank, other in enumerate(everyone):
        for key in sorted(everyone[0].keys() | other.keys()):
            ours, theirs = everyone[0].get(key), other.get(key)
            if ours != theirs:
                raise ConfigError(
                    f"process {rank} of {world.size} has another `{key}` than process 0: "
                    f"{_short(theirs)}, not {_short(ours)}",
                    hint="start every machine with the same flags, data and tokenizer",
                )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == _SHA256_DIGITS else text


def to_plain_from(file: Path, cls: type) -> dict[str, Any]:
    """Read a run file as nested plain values."""
    read_toml(cls, file)  # refuses unknown keys
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": leaf for name, leaf in value.items()}
        else:
            flat[key] = value
    return flat


def _check_facts(file: Path, facts: Mapping[str, str], cfg: Any) -> None:
    stored = tomllib.loads(file.read_text(encoding="utf-8")).get("provenance", {})
    for name, value in facts.items():
        if name in stored and stored[name] != value:
            what = f"`{cfg.data}`" if name.startswith("data") else name.rpartition("_")[0]
            raise InputError(
                f"{what} is not what `{file.parent}` began with: its sha256 "
                f"was {str(stored.get(name))[:12]}…, is {value[:12]}…",
                hint=f"put the old {name.partition('_')[0]} back, or start a new run without "
                "`--resume`",
            )


def _provenance(cfg: Any, facts: Mapping[str, str]) -> dict[str, str]:
    return {
        "minillm": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "argv": " ".join(sys.argv),
        **facts,
    }


def _commit() -> str:
    """Return the git commit of the package's checkout; empty when installed from a wheel."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""

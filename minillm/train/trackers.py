"""Experiment trackers behind one small interface; imported only when asked for.

The run's name and settings go there once, the numbers as they come. A resumed run goes on where it
was: its id is made from `run.toml`, which never changes.
"""

import hashlib
import importlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from minillm.errors import ConfigError, RunError
from minillm.paths import RUN_FILE
from minillm.settings.checks import check_package

PROJECT = "minillm"


class Tracker(Protocol):
    """What the loop needs of a tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers of a step."""

    def finish(self) -> None:
        """Send what is left, and end."""


class NoTracker:
    """Sends nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""


class _Package:
    """wandb, swanlab or trackio: their `log` and `finish` are alike, their `init` is not."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers of a step."""
        self._module.log(dict(values), step=step)

    def finish(self) -> None:
        """Send what is left, and end."""
        self._module.finish()


def open_tracker(name: str, run: Path) -> Tracker:
    """Begin, or go on with, the record of a run.

    Args:
        name: `none`, `wandb`, `swanlab` or `trackio`. Where they send to, and whether at all, is
            up to their own environment variables, e.g. `WANDB_MODE=offline`.
        run: The run's folder; its `run.toml` is what the tracker shows as settings.

    Raises:
        ConfigError: No such tracker.
        SetupError: Its package is not installed.
        RunError: It does not start: no login, no network.
    """
    if name == "none":
        return NoTracker()
    if name not in _OPTIONS:
        raise ConfigError(
            f"there is no tracker `{name}`", hint=f"choose one of none, {', '.join(_OPTIONS)}"
        )
    check_package("--tracker", name)
    text = (run / RUN_FILE).read_bytes()
    key = hashlib.sha256(text).hexdigest()[:12]
    module = importlib.import_module(name)
    options = _OPTIONS[name](run, f"{run.name}-{key}", key)
    try:
        module.init(project=PROJECT, config=tomllib.loads(text.decode()), **options)
    except Exception as error:  # each has its own
        raise RunError(
            f"the tracker `{name}` does not start: {str(error).splitlines()[0]}",
            hint=f"`{_OFFLINE[name]}` keeps its files here; without `--tracker` nothing is sent",
        ) from error
    return _Package(module)


def _wandb(run: Path, name: str, key: str) -> dict[str, Any]:
    return {"name": run.name, "id": key, "resume": "allow", "dir": str(run)}


def _swanlab(run: Path, name: str, key: str) -> dict[str, Any]:
    folder = str(run / "swanlog")
    return {"name": run.name, "id": name, "resume": "allow", "log_dir": folder}


def _trackio(run: Path, name: str, key: str) -> dict[str, Any]:
    return {"name": name, "resume": "allow", "embed": False}


_OPTIONS = {"wandb": _wandb, "swanlab": _swanlab, "trackio": _trackio}
_OFFLINE = {
    "wandb": "WANDB_MODE=offline",
    "swanlab": "SWANLAB_MODE=offline",
    "trackio": "TRACKIO_DIR=trackio",
}

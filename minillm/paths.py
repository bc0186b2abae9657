"""Where data, runs and bundled files live, and how a command finds what earlier ones left.

Everything lies below the working directory unless a flag says otherwise:

data/raw/            documents you bring, or that `minillm download` fetched
data/sample/         `prepare-tokenizer`
data/tokenizer/      `train-tokenizer`
data/tokens/         `tokenize`: NAME.bin + NAME.bin.json
data/pretrain.bin    `merge-bin`
data/sft.parquet     `prepare-sft`
runs/<stage>-<model>-<n>/
"""

import re
from pathlib import Path

from minillm.errors import InputError

DATA = Path("data")
RAW = DATA / "raw"
SAMPLE = DATA / "sample"
TOKENIZER = DATA / "tokenizer"
TOKENS = DATA / "tokens"
PRETRAIN_BIN = DATA / "pretrain.bin"
SFT_PARQUET = DATA / "sft.parquet"
RUNS = Path("runs")
RUN_FILE = "run.toml"

BUNDLED = "bundled"
"""Wherever a path to data or a tokenizer is taken, this word means the one in the package."""

_PACKAGE = Path(__file__).parent
BUNDLED_CORPUS = _PACKAGE / "data" / "samples" / "corpus"
BUNDLED_DIALOGUES = _PACKAGE / "data" / "samples" / "dialogues.jsonl"
BUNDLED_TOKENIZER = _PACKAGE / "models" / "assets" / "mini_tokenizer"


def resolve(given: Path, bundled: Path) -> Path:
    """Return `given`, or the bundled path when it is the word `bundled`.

    Raises:
        InputError: `given` does not exist.
    """
    if given.as_posix() == BUNDLED:
        return bundled
    if not given.exists():
        raise InputError(
            f"no file or folder at `{given}`",
            hint="check the path, or use the word `bundled` for the data in the package",
        )
    return given


def new_run_folder(runs: Path, stage: str, model: str) -> Path:
    """Return the first unused `runs/<stage>-<model>-<n>` (not created)."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", model).strip("-")
    taken = {int(run.name.rsplit("-", 1)[1]) for run in _runs(runs, f"{stage}-{name}-*")}
    return runs / f"{stage}-{name}-{max(taken, default=0) + 1}"


def latest_run(runs: Path, stage: str, *, finished: bool = False) -> Path | None:
    """Return the newest run folder of a stage, by the age of its `run.toml`.

    Args:
        runs: Folder of runs.
        stage: `pretrain`, `sft`, or `*` for either.
        finished: Only runs with a complete `final/` folder.
    """
    found = [
        run
        for run in _runs(runs, f"{stage}-*")
        if (run / RUN_FILE).is_file() and (not finished or is_complete(run / "final"))
    ]
    return max(found, key=lambda run: (run / RUN_FILE).stat().st_mtime_ns, default=None)


def resolve_resume(given: str, stage: str) -> Path:
    """Return the run folder that `--resume given` means; `latest` is the newest of the stage.

    Raises:
        InputError: There is no such run.
    """
    if given == "latest":
        run = latest_run(RUNS, stage)
        if run is None:
            raise InputError(
                f"no {stage} run below `{RUNS}/` to resume", hint=f"run `minillm {stage}`"
            )
        return run
    if not (Path(given) / RUN_FILE).is_file():
        raise InputError(
            f"no run to resume at `{given}`: it has no {RUN_FILE}",
            hint=f"`minillm {stage} --resume latest` takes the newest run",
        )
    return Path(given)


def is_complete(folder: Path) -> bool:
    """Tell whether a checkpoint or `final/` folder was written to its end."""
    return (folder / "COMPLETE").is_file()


def _runs(runs: Path, pattern: str) -> list[Path]:
    return [run for run in runs.glob(pattern) if re.fullmatch(r".*-\d+", run.name) and run.is_dir()]

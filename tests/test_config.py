"""Config, flags and TOML agree, seen from a command that only shows what it was given."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from minillm import config, settings
from minillm.cli.app import ErrorBoundary
from minillm.cli.options import configured
from minillm.settings import DownloadConfig, PretrainConfig, SftConfig

COMMANDS = [
    cls
    for cls in vars(settings).values()
    if dataclasses.is_dataclass(cls) and str(cls.__doc__).startswith("`minillm ")
]

FLAGS_ONLY = [cls for cls in COMMANDS if cls is not DownloadConfig]  # its sets are positional too


def run(cls: Any, *args: object) -> Any:
    """Invoke a command configured by `cls`; `.seen` is the config it got, `None` on an error."""
    seen = []
    app = typer.Typer(cls=ErrorBoundary, pretty_exceptions_enable=False)

    @app.callback()
    def root() -> None:
        """A group, as the program is one."""

    @app.command()
    @configured(cls)
    def show(*, cfg: Any) -> None:
        seen.append(cfg)

    result: Any = CliRunner().invoke(app, ["show", *map(str, args)])
    result.seen = seen[0] if seen else None
    return result


@pytest.mark.parametrize("cls", FLAGS_ONLY, ids=lambda cls: cls.__name__)
def test_defaults_come_from_the_dataclass(cls: Any) -> None:
    assert run(cls).seen == cls()


@pytest.mark.parametrize("cls", FLAGS_ONLY, ids=lambda cls: cls.__name__)
def test_a_written_run_file_gives_the_same_config(cls: Any, tmp_path: Path) -> None:
    config.write_toml(cls(), tmp_path / "run.toml", {"minillm": "1", "argv": ["x"]})
    assert run(cls, "--config", tmp_path / "run.toml").seen == cls()


def test_flag_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "m"\n[optim]\nlr = 0.1\nwarmup_ratio = 0.5\n')
    cfg = run(PretrainConfig, "--config", file, "--lr", "0.2").seen
    assert (cfg.optim.lr, cfg.optim.warmup_ratio, cfg.model) == (0.2, 0.5, "m")
    assert cfg.optim.grad_clip == PretrainConfig().optim.grad_clip


def test_a_flag_beats_the_file_even_when_it_equals_the_default(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[optim]\nlr = 0.1\n")
    default = PretrainConfig().optim.lr
    assert run(PretrainConfig, "--config", file, "--lr", default).seen.optim.lr == default


def test_a_parent_sets_its_own_defaults_of_a_shared_table() -> None:
    assert run(SftConfig).seen.optim.lr == SftConfig().optim.lr != PretrainConfig().optim.lr


def test_pairs_and_switches_reach_the_config() -> None:
    cfg = run(PretrainConfig, "--betas", "0.8", "0.9", "--no-doc-mask").seen
    assert (cfg.optim.betas, cfg.doc_mask) == ((0.8, 0.9), False)


def test_a_parameter_of_the_command_takes_the_place_of_a_flag(tmp_path: Path) -> None:
    app, seen = typer.Typer(), []

    @app.command()
    @configured(DownloadConfig)
    def show(sets: Annotated[list[str], typer.Argument()] = [], *, cfg: Any) -> None:  # noqa: B006
        seen.append(cfg.sets)

    file = tmp_path / "run.toml"
    file.write_text('sets = ["9"]\n')
    for args in ([], ["1", "2"], ["--config", str(file)], ["--config", str(file), "3"]):
        CliRunner().invoke(app, args, catch_exceptions=False)
    assert seen == [(), ("1", "2"), ("9",), ("3",)]
    assert "--sets" not in CliRunner().invoke(app, ["--help"]).output


@pytest.mark.parametrize(
    ("toml", "args", "code", "says"),
    [
        ("[optim]\nwarmup_ration = 3\n", (), 2, "did you mean `optim.warmup_ratio`?"),
        ("colour = 3\n", (), 2, "hint: remove `colour`"),
        ('[optim]\nlr = "fast"\n', (), 2, "Invalid value for '--lr'"),
        ("[optim\n", (), 3, "is not valid TOML"),
        ("", ("--lr", "-1"), 2, "error: `--lr` must be positive, got -1.0"),
        ("", ("--lr", "nan"), 2, "error: `--lr` must be positive, got nan"),
        ("", ("--steps", "-5"), 2, "error: `--steps` must not be negative, got -5"),
        ("", ("--micro-batch", "-1"), 2, "error: `--micro-batch` must not be negative"),
        ("", ("--grad-clip", "-1"), 2, "error: `--grad-clip` must not be negative"),
        ("", ("--weight-decay", "nan"), 2, "error: `--weight-decay` must not be negative"),
        ("", ("--eval-every", "-1"), 2, "error: `--eval-every` must not be negative"),
        ("", ("--save-every", "-1"), 2, "error: `--save-every` must not be negative"),
        ("", ("--sample-tokens", "-1"), 2, "error: `--sample-tokens` must not be negative"),
        ("", ("--betas", "0.9", "1"), 2, "hint: try `--betas 0.9 0.95`"),
        ("", ("--warmup-ratio", "2"), 2, "`--warmup-ratio` must lie between 0 and 1"),
        ("", ("--warmup-ratio", "2"), 2, "hint: try `--warmup-ratio 1`"),
        ("", ("--warmup-ratio", "-2"), 2, "hint: try `--warmup-ratio 0`"),
        ("", ("--precision", "int3"), 2, "int3"),
        ("", ("--lrr", "1"), 2, "--lrr"),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: Path, toml: str, args: tuple[str, ...], code: int, says: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(toml)
    result = run(PretrainConfig, "--config", file, *args)
    assert (result.exit_code, says in result.output) == (code, True), result.output


@pytest.mark.parametrize(("name", "says"), [("none.toml", "no config file"), ("", "cannot read")])
def test_a_run_file_that_cannot_be_read_exits_3(tmp_path: Path, name: str, says: str) -> None:
    result = run(PretrainConfig, "--config", tmp_path / name)
    assert (result.exit_code, says in result.output) == (3, True)


def test_the_run_file_has_no_nulls_and_keeps_its_provenance(tmp_path: Path) -> None:
    config.write_toml(PretrainConfig(), tmp_path / "run.toml", {"torch": "2.11"})
    text = (tmp_path / "run.toml").read_text()
    assert "val_data" not in text  # None: TOML has no null
    assert '[provenance]\ntorch = "2.11"' in text


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.__name__)
def test_every_knob_is_documented_unique_and_writable(cls: Any) -> None:
    knobs = list(config.knobs(cls))
    names = [knob.name for knob in knobs]
    assert len(names) == len(set(names)), "a flag is the bare field name, so names are unique"
    for knob in knobs:
        assert knob.help.endswith("."), f"{knob.path} needs one sentence of help"
        if type(None) in get_args(knob.type):
            assert knob.default is None, f"{knob.path}: TOML has no null, so None is the default"

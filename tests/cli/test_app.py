"""The error boundary, and what every command has in common."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from minillm import __version__
from minillm.cli.app import ErrorBoundary, app
from minillm.errors import ConfigError, InputError, MinillmError, RunError, SetupError
from tools.make_cli_docs import command_names, help_text, render

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = {
    *("download", "prepare-tokenizer", "train-tokenizer", "tokenize", "merge-bin", "inspect"),
    *("pretrain", "prepare-sft", "sft", "chat", "serve", "demo", "plan", "report"),
    *("models", "verify", "export", "import"),
}


def invoke_raising(error: BaseException) -> Any:
    failing = typer.Typer(cls=ErrorBoundary, pretty_exceptions_enable=False)

    @failing.callback()
    def root() -> None:
        """A group, as the program is one."""

    @failing.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(failing, ["fail"])


@pytest.mark.parametrize(
    ("cls", "code"), [(ConfigError, 2), (InputError, 3), (SetupError, 4), (RunError, 5)]
)
def test_an_error_is_two_lines_on_stderr_and_its_exit_code(
    cls: type[MinillmError], code: int
) -> None:
    result = invoke_raising(cls("`x` is [red] wrong", hint="try `y`"))
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.splitlines() == ["error: `x` is [red] wrong", "hint: try `y`"]


def test_a_long_error_is_not_wrapped() -> None:
    path = "/long" * 60
    assert invoke_raising(InputError(path)).stderr == f"error: {path}\n"


def test_a_bug_keeps_its_traceback_and_asks_for_a_report() -> None:
    result = invoke_raising(ZeroDivisionError("one / zero"))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert f"bug: minillm {__version__} failed unexpectedly; please report" in result.stderr


def test_ctrl_c_is_one_line_and_130() -> None:
    result = invoke_raising(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "stopped: by Ctrl-C\n")


@pytest.mark.parametrize(
    "args", [["no-such-command"], ["pretrain", "--no-such-flag"], ["pretrain", "--seed", "x"]]
)
def test_a_usage_error_names_the_word_and_exits_2(args: list[str]) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert args[:2][-1] in result.stderr
    assert "Traceback" not in result.stderr


def test_a_real_process_speaks_plainly_on_stderr_only() -> None:
    command = [sys.executable, "-m", "minillm", "pretrain", "--lr", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: `--lr` must be positive, got -1.0",
        "hint: leave `--lr` out for its default, or give a value above 0",
    ]


def test_a_reader_that_has_gone_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "minillm", "download"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert b"Traceback" not in said


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"minillm {__version__}\n"


def test_the_commands_are_these() -> None:
    assert set(command_names()) == COMMANDS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_fits_80_columns_and_needs_no_colour(name: str) -> None:
    lines = help_text(name).splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)


def test_docs_of_the_commands_are_current() -> None:
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == render(), "run `make docs`"

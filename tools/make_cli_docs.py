"""Write `docs/cli.md`: the `--help` of every command, as a terminal of 80 columns shows it.

python tools/make_cli_docs.py
"""

from pathlib import Path

import typer.main
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.files import write_text

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
PLAIN_80 = {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1", "TERM": "dumb"}

HEAD = """\
# Commands

Made by `make docs` from `minillm COMMAND --help`; a test holds the two together. Every flag is also
a key of the run file that `--config` takes: `--batch-tokens` is `batch_tokens`, in the table named
by its panel (`[batch]`). Defaults give way to the run file, the run file gives way to flags.
"""


def command_names() -> list[str]:
    """Return the commands in the order of `minillm --help`."""
    return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def help_text(*words: str) -> str:
    """Return what `minillm WORDS --help` prints, without trailing spaces."""
    result = CliRunner().invoke(app, [*words, "--help"], env=PLAIN_80, prog_name="minillm")
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    return "\n".join(lines).strip("\n")


def render() -> str:
    """Return the page."""
    pages = [f"## minillm {name}\n\n{_block(name)}" for name in command_names()]
    return "\n".join([HEAD, _block(), *pages])


def _block(*words: str) -> str:
    return f"```text\n{help_text(*words)}\n```\n"


if __name__ == "__main__":
    write_text(TARGET, render())

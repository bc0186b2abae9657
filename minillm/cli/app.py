"""The `minillm` program: one app, one module per command, one place where errors become text."""

import signal
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from minillm import __version__
from minillm.cli.chat import chat
from minillm.cli.console import err as console
from minillm.cli.demo import demo
from minillm.cli.download import download
from minillm.cli.export import export
from minillm.cli.import_ import import_
from minillm.cli.inspect import inspect
from minillm.cli.merge_bin import merge_bin
from minillm.cli.models import models
from minillm.cli.plan import plan
from minillm.cli.prepare_sft import prepare_sft
from minillm.cli.prepare_tokenizer import prepare_tokenizer
from minillm.cli.pretrain import pretrain
from minillm.cli.report import report
from minillm.cli.serve import serve
from minillm.cli.sft import sft
from minillm.cli.tokenize import tokenize
from minillm.cli.train_tokenizer import train_tokenizer
from minillm.cli.verify import verify
from minillm.errors import MinillmError


class ErrorBoundary(TyperGroup):
    """Turn a MinillmError into two lines on stderr and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command inside the boundary."""
        try:
            return super().invoke(ctx)
        except MinillmError as error:
            _line("error", str(error), "red")
            if error.hint:
                _line("hint", error.hint, "cyan")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as stop:
            number = stop.args[0] if stop.args else signal.SIGINT
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            _line("stopped", f"by {name}", "yellow")
            raise typer.Exit(128 + number) from None
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output has gone: nothing left to say
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:  # a bug in minillm: show where, and ask for a report
            if type(error).__module__.startswith(("typer", "click")):
                raise
            traceback.print_exc()
            _line("bug", f"minillm {__version__} failed unexpectedly; please report this", "red")
            raise typer.Exit(1) from error


def _line(label: str, text: str, color: str) -> None:
    console.print(f"[{color}]{label}:[/{color}]", end=" ", soft_wrap=True)
    console.print(text, markup=False, soft_wrap=True)


app = typer.Typer(
    cls=ErrorBoundary,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minillm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_show_version, help="Print the version."
    ),
) -> None:
    """Small language models, from raw text to a chat server."""


app.command()(demo)
app.command()(download)
app.command("prepare-tokenizer")(prepare_tokenizer)
app.command("train-tokenizer")(train_tokenizer)
app.command("tokenize")(tokenize)
app.command("merge-bin")(merge_bin)
app.command()(inspect)
app.add_typer(models, name="models")
app.command()(verify)
app.command()(plan)
app.command()(pretrain)
app.command("prepare-sft")(prepare_sft)
app.command()(sft)
app.command()(report)
app.command()(chat)
app.command()(serve)
app.command()(export)
app.command("import")(import_)

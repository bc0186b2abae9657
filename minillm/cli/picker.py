"""Choose published sets on a terminal, by number or name."""

import sys
from dataclasses import replace

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.validation import ValidationError, Validator

from minillm.cli.console import progress, say
from minillm.cli.sets_table import show_catalog, show_plans
from minillm.data.catalog import CATALOG, find_sets
from minillm.data.download import plan
from minillm.errors import MinillmError
from minillm.settings import DownloadConfig


def choose(cfg: DownloadConfig) -> DownloadConfig:
    """Show the catalog and, on a terminal, ask."""
    show_catalog(cfg.out)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        say("hint: `minillm download 9` fetches set 9, with `--dry-run` it only looks")
        return cfg
    try:
        cfg = replace(cfg, sets=tuple(_ask_sets()))
        if not cfg.sets or cfg.dry_run:
            return cfg
        show_plans(plan(cfg, progress()), cfg.out)
        return cfg if _ask_go_on("fetch this now?") else replace(cfg, sets=())
    except EOFError:  # Ctrl-D
        return replace(cfg, sets=())


class _Known(Validator):
    """Takes what `find_sets` takes, and nothing at all."""

    def validate(self, document: Document) -> None:
        """Say below the line what is wrong with it."""
        try:
            find_sets([document.text])
        except MinillmError as error:
            hint = f" ({error.hint})" if error.hint else ""
            raise ValidationError(len(document.text), f"{error}{hint}") from None


def _ask_sets() -> list[str]:
    """Ask for numbers or names; Tab completes, an empty line chooses nothing."""
    names = WordCompleter([item.name for item in CATALOG], sentence=False)
    session: PromptSession[str] = PromptSession(completer=names, complete_while_typing=False)
    line = session.prompt(
        "sets to download, by number or name (4,5): ",
        validator=_Known(),
        validate_while_typing=False,
    )
    return [line] if line.strip() else []


def _ask_go_on(question: str) -> bool:
    """Ask a yes-or-no question; an empty line is yes."""
    answer = PromptSession[str]().prompt(f"{question} [Y/n] ")
    return answer.strip().lower() in ("", "y", "yes", "是")

"""The documents say what is true: commands parse, links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from minillm.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
PROGRAM = typer.main.get_command(app)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every `minillm …` line in fenced blocks, continuations joined."""
    for block in re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|[\s/;&|$])minillm +(\S.*)", line)
            if found and not found[1].startswith("&&"):
                words = shlex.split(found[1], comments=True)
                for stop in ("|", ">", "2>", "&&", "&", ";"):
                    words = words[: words.index(stop)] if stop in words else words
                yield words


def parse(words: list[str]) -> None:
    """Let the program read its arguments, down to the last command, without running it."""
    command, context = PROGRAM, PROGRAM.make_context("minillm", list(words))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


@each_page
def test_commands_parse(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0] == "…" or "..." in words:
            continue
        for flag in ("--resume", "--config"):  # they read a file that only the reader has
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
        parse([word for word in words if word != "--help"])


def test_a_wrong_command_is_seen() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["pretrain", "--no-such-flag", "1"])


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"

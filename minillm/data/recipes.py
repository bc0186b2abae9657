r"""Which columns or keys of a row make a document, and how they are put together.

`text` is the plain case. A template names several: `{instruction}\n{output}`. The published sets
have recipes of their own, which also name the token file as its publisher did:

    fineweb    `text`
    deepctrl   `instruction`, `input` and `output`, each without white space at its ends, joined
               without anything between them; an empty or missing one is left out
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass

from minillm.errors import ConfigError
from minillm.settings import TokenizeConfig

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a row becomes a document.

    Attributes:
        columns: The columns or keys, in the order of the text.
        around: The literal text before each column and after the last: one more than `columns`.
        is_stripped: Take white space off both ends of each value.
        optional: Columns that a row may lack.
        name: Of the token file; empty: the input's.
    """

    columns: tuple[str, ...]
    around: tuple[str, ...] = ()
    is_stripped: bool = False
    optional: frozenset[str] = frozenset()
    name: str = ""

    @classmethod
    def of_column(cls, column: str) -> "Recipe":
        """The text of one column, as it is."""
        return cls((column,))

    @property
    def is_plain(self) -> bool:
        """Whether a document is one column's text and nothing else."""
        return len(self.columns) == 1 and not any(self.around) and not self.is_stripped

    def join(self, row: Mapping[str, str | None]) -> str:
        """Return a row's document: empty if none of its values has a visible character."""
        values = [row.get(column) or "" for column in self.columns]
        if self.is_stripped:
            values = [value.strip() for value in values]
        if not any(value and not value.isspace() for value in values):
            return ""
        if not self.around:
            return "".join(values)
        parts = [self.around[0]]
        for value, after in zip(values, self.around[1:], strict=True):
            parts += (value, after)
        return "".join(parts)

    def describe(self) -> list[object]:
        """Return all that decides the text, to be hashed."""
        return [list(self.columns), list(self.around), self.is_stripped, sorted(self.optional)]


PUBLISHED = {
    "fineweb": Recipe(("text",), name="fineweb_edu"),
    "deepctrl": Recipe(
        ("instruction", "input", "output"),
        is_stripped=True,
        optional=frozenset(("instruction", "input", "output")),
        name="deepctrl",
    ),
}
"""Named as the publisher's token files are."""


def find_recipe(cfg: TokenizeConfig) -> Recipe:
    """Return the recipe that the settings ask for.

    Raises:
        ConfigError: The template names no column, or is not one.
    """
    if cfg.recipe != "none":
        return PUBLISHED[cfg.recipe]
    return parse_template(cfg.template) if cfg.template else Recipe.of_column(cfg.text_column)


def parse_template(template: str) -> Recipe:
    r"""Read `{column}` and literal text; `\n`, `\t` mean what they do in Python, `{{` is a brace.

    Raises:
        ConfigError: It names no column, or one in a way that we cannot read.
    """
    columns: list[str] = []
    around = [""]
    try:
        pieces = list(string.Formatter().parse(_unescape(template)))
    except ValueError as err:
        raise _bad_template(template, str(err).lower()) from None
    for literal, column, form, conversion in pieces:
        around[-1] += literal
        if column is None:
            continue
        if not column or form or conversion:
            raise _bad_template(template, "a column is a name in braces and nothing else")
        columns.append(column)
        around.append("")
    if not columns:
        raise _bad_template(template, "it names no column")
    return Recipe(tuple(columns), tuple(around))


def _unescape(text: str) -> str:
    r"""Replace `\n` and its like, which no shell does within quotes; other backslashes stay."""
    done, rest = "", text
    while "\\" in rest:
        before, _, rest = rest.partition("\\")
        known = _ESCAPES.get(rest[:1])
        done += before + ("\\" if known is None else known)
        rest = rest if known is None else rest[1:]
    return done + rest


def _bad_template(template: str, why: str) -> ConfigError:
    return ConfigError(
        f"the template `{template}` cannot be used: {why}",
        hint="name columns in braces: `--template '{instruction}\\n{output}'`",
    )

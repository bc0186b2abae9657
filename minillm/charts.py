"""Charts as PNG that never show a box for a letter.

Text is drawn in DejaVu Sans, which comes with matplotlib, and what that lacks in a Chinese font of
the system, if there is one. Names that no font can draw are numbered by `readable`, and the table
beside the chart says which is which.

    with charts.figure(9, 5) as figure:
        axes = figure.subplots()
        axes.barh(charts.readable(names), values)
        charts.save_png(figure, folder / "sources.png")
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from minillm.files import atomic_write

NUMBERED = (
    "A number in the chart is that of the row in the table: no font here can draw all of its "
    "name, or it is too long (Chinese needs a font: `apt install fonts-noto-cjk`, or one in "
    "`~/.local/share/fonts`)"
)
"""What to say beside a chart where `readable` had to number a name."""

_BASE = "DejaVu Sans"
_PREFERRED = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN"),
    *("Noto Sans CJK JP", "Noto Sans CJK TC", "PingFang SC", "Hiragino Sans GB", "Heiti SC"),
    *("Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Sarasa Gothic SC"),
    *("LXGW WenKai", "Droid Sans Fallback", "Arial Unicode MS", "SimSun", "Noto Serif CJK SC"),
)
_OFTEN_CHINESE = ("cjk", "han", "hei", "song", "kai", "ming", "wqy", "wenquan", "gothic", "uming")
_PROBE = "中文数据集字体样本"
_DPI = 110
_LONGEST_NAME = 32


@contextmanager
def figure(width: float = 9.0, height: float = 5.0) -> Iterator[Figure]:
    """Yield a figure of `width` by `height` inches; draw and save it inside the block."""
    families = [_BASE, font] if (font := chinese_font()) else [_BASE]
    style: Any = {
        "font.family": families,
        "font.size": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "axes.unicode_minus": False,
    }
    with mpl.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure, whole or not at all; the same figure gives the same bytes."""
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=_DPI)


def readable(names: Sequence[str]) -> list[str]:
    r"""Return labels for `names`, all different, without a letter that would show as a box.

    A name that no font here can draw becomes `#3` and what of it can be drawn: its place in
    `names`, counted from 1, so the table with the names must have the same order. A long name is
    cut and has its number too.

    >>> readable(["wiki", "a\tb"])
    ['wiki', '#2 ab']
    """
    labels = []
    for number, name in enumerate(names, 1):
        label = "".join(letter for letter in name if can_draw(letter)).strip()
        is_whole = label == name and label and not label.startswith(("#", "_"))
        if len(label) > _LONGEST_NAME:
            is_whole, label = False, label[: _LONGEST_NAME - 1] + "…"
        labels.append(_plain(label if is_whole else f"#{number} {label}".rstrip()))
    return labels


def can_draw(text: str) -> bool:
    """Tell whether every letter of `text` is in a font that `figure` uses."""
    return all(any(ord(letter) in font for font in _letters()) for letter in text)


def drawable(text: str) -> str:
    """Return `text` with `?` for each letter that would show as a box."""
    return _plain("".join(letter if can_draw(letter) else "?" for letter in text))


def _plain(text: str) -> str:
    """Escape dollars, between which matplotlib sees a formula."""
    return text.replace("$", r"\$")


@cache
def chinese_font() -> str | None:
    """Return the family name of a font with Chinese letters, None if the system has none."""
    known = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    found = _first_chinese(known)
    if found is None:  # matplotlib remembers the fonts of its first start: look for newer ones
        fresh = set(font_manager.findSystemFonts()) - set(known.values())
        for place in sorted(fresh):
            _register(place)
        known = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
        found = _first_chinese(known)
    return found


def _register(place: str) -> None:
    try:
        font_manager.fontManager.addfont(place)
    except (OSError, RuntimeError, ValueError, KeyError):
        return  # a file that FreeType cannot read is no font for us


def _first_chinese(known: dict[str, str]) -> str | None:
    likely = [n for n in sorted(known) if any(part in n.lower() for part in _OFTEN_CHINESE)]
    for name in (*_PREFERRED, *likely):
        if name in known and all(ord(letter) in _letters_of(known[name]) for letter in _PROBE):
            return name
    return None


@cache
def _letters() -> tuple[frozenset[int], ...]:
    names = [_BASE] + ([font] if (font := chinese_font()) else [])
    return tuple(_letters_of(font_manager.findfont(name)) for name in names)


@cache
def _letters_of(place: str) -> frozenset[int]:
    """Return the code points that a font file can draw."""
    try:
        return frozenset(FT2Font(place).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()

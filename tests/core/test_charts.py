import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from minillm import charts

CACHED = (charts.chinese_font, charts._letters, charts._letters_of)


@pytest.fixture
def no_chinese_font(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system with matplotlib's own fonts only."""
    own = [e for e in font_manager.fontManager.ttflist if e.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    for function in CACHED:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in CACHED:
        function.cache_clear()


def make_font(place: Path, letters: str) -> None:
    """A real TrueType font in which every letter is a square."""
    pen = TTGlyphPen(None)
    for move, point in [("moveTo", (0, 0)), ("lineTo", (0, 800)), ("lineTo", (800, 800))]:
        getattr(pen, move)(point)
    pen.closePath()
    names = [".notdef", *(f"u{ord(letter):X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):X}" for letter in letters})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test Hei", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    place.parent.mkdir(parents=True, exist_ok=True)
    builder.save(place)


def draw(path: Path, labels: list[str]) -> None:
    """A bar chart; matplotlib warns of each letter that it draws as a box."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with charts.figure(4, 2) as figure:
            figure.subplots().barh(labels, range(1, len(labels) + 1), label=labels[0])
            charts.save_png(figure, path)


@pytest.mark.usefixtures("no_chinese_font")
def test_without_a_chinese_font_names_are_numbered_and_nothing_is_a_box(tmp_path: Path) -> None:
    names = ["维基百科", "law", "网页 web", "législation"]
    assert charts.chinese_font() is None
    labels = charts.readable(names)
    assert labels == ["#1", "law", "#3 web", "législation"]
    draw(tmp_path / "a.png", labels)
    assert charts.drawable("来源 sources") == "?? sources"
    with pytest.raises(UserWarning, match="missing from font"):
        draw(tmp_path / "b.png", names)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_font_that_was_installed_later_is_found_and_used(tmp_path: Path) -> None:
    make_font(tmp_path / "fonts" / "test.ttf", charts._PROBE + "维基百科")
    code = (
        "import sys, pathlib\n"
        "from minillm import charts\n"
        "charts._PREFERRED = ()\n"
        "assert charts.chinese_font() is not None\n"
        "names = ['维基百科', 'law']\n"
        "assert charts.readable(names) == names\n"
        "with charts.figure(4, 2) as figure:\n"
        "    figure.subplots().barh(names, [1, 2])\n"
        "    charts.save_png(figure, pathlib.Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "a.png")]
    subprocess.run(command, env=os.environ | {"XDG_DATA_HOME": str(tmp_path)}, check=True)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_labels_stay_different_and_short(tmp_path: Path) -> None:
    names = ["a" * 99, "a" * 98, "#2", "_hidden", " ", "a$b$c", "x\ny"]
    labels = charts.readable(names)
    assert len(set(labels)) == len(names)
    assert max(map(len, labels)) < 40
    assert labels[2:] == ["#3 #2", "#4 _hidden", "#5", r"a\$b\$c", "#7 xy"]
    draw(tmp_path / "a.png", labels)


def test_the_same_chart_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / name, ["one", "two"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

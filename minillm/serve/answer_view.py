"""One answer on the terminal: the think part folded, shown or hidden, the text as Markdown."""

import shutil
import time
from typing import Literal, TextIO

from minillm.serve.markdown import MarkdownView
from minillm.serve.think import Part
from minillm.serve.wrap import Wrapper

Thoughts = Literal["on", "off", "fold"]
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Characters that could move the cursor or worse; a model has no business to send them."""


def screen_size() -> tuple[int, int]:
    """Return columns and lines of the terminal."""
    size = shutil.get_terminal_size()
    return size.columns, size.lines


class AnswerView:
    """Takes the parts of one answer."""

    def __init__(self, out: TextIO, thoughts: Thoughts, *, is_plain: bool) -> None:
        """Show on `out`; Markdown and redrawing only if that is a terminal and not plain."""
        self._out, self._thoughts, self._is_plain = out, thoughts, is_plain
        self._is_live = out.isatty() and not is_plain
        self._wrapper = Wrapper(shutil.get_terminal_size().columns)
        self._markdown = MarkdownView(self._write, screen_size)
        self._kind, self._since = "", 0.0

    def add(self, part: Part) -> None:
        """Show a part of the model's."""
        text = part.text.translate(CONTROL)
        if part.kind != self._kind:
            self._end_think()
            self._kind, self._since = part.kind, time.perf_counter()
            if part.kind == "think" and self._thoughts == "fold" and self._is_live:
                self._write("\x1b[2m▸ thinking …\x1b[0m")
        if part.kind == "think":
            if self._thoughts == "on":
                self._write(self._dim(self._wrapper.feed(text)))
        elif self._is_live:
            self._markdown.feed(text)
        else:
            self._write(self._wrapper.feed(text))

    def finish(self) -> None:
        """Show what was held back and end the line."""
        if self._kind == "think":
            self._end_think()
        elif self._kind and self._is_live:
            self._markdown.finish()
        elif self._kind:
            self._write(self._wrapper.flush() + "\n")
        self._kind = ""

    def _end_think(self) -> None:
        if self._kind != "think":
            return
        if self._thoughts == "on":
            self._write(self._dim(self._wrapper.flush() + "\n\n"))
            self._wrapper = Wrapper(shutil.get_terminal_size().columns)
        elif self._thoughts == "fold":
            line = f"▸ thought for {time.perf_counter() - self._since:.1f} s"
            self._write(("\r\x1b[2K" if self._is_live else "") + self._dim(line) + "\n\n")

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if text and not self._is_plain else text

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()

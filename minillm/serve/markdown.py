"""Show Markdown while it arrives: finished blocks once, only the open block drawn again.

What is drawn again never exceeds the screen, so nothing is shown twice in the scrollback: of an
open block taller than that only the end is shown, and the whole of it when it is finished.
"""

import io
import time
from collections.abc import Callable

from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown

Size = tuple[int, int]  # columns, lines
BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"  # a terminal that knows them shows the change at once
EASE = 4  # drawing takes at most one part in so many of the time


class MarkdownView:
    """Feed text in any pieces; `write` gets what changes the screen."""

    def __init__(self, write: Callable[[str], None], size: Callable[[], Size]) -> None:
        """Draw from the start of a line, on a screen of `size()`."""
        self._write, self._size = write, size
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
        self._text = ""
        self._shown: list[str] = []
        self._is_first = True
        self._next_s = 0.0

    def feed(self, text: str) -> None:
        """Take text; print what is finished and draw the rest anew, if it is time."""
        self._text += text
        start = time.perf_counter()
        if start < self._next_s:
            return
        done, self._text = self._split(self._text)
        self._draw(self._render(done), self._render(self._text))
        now = time.perf_counter()
        self._next_s = now + (EASE - 1) * (now - start)

    def finish(self) -> None:
        """Print what is left; the cursor is then at the start of a line."""
        self._draw(self._render(self._text), [])
        self._text = ""

    def _split(self, text: str) -> tuple[str, str]:
        """Return the blocks that more text cannot change, and the last one."""
        starts = [
            token.map[0]
            for token in self._parser.parse(text)
            if token.level == 0 and token.nesting >= 0 and token.map
        ]
        if len(starts) < 2:
            return "", text
        lines = text.split("\n")
        return "\n".join(lines[: starts[-1]]) + "\n", "\n".join(lines[starts[-1] :])

    def _render(self, text: str) -> list[str]:
        """Return the lines of some blocks on screen."""
        if not text.strip():
            return []
        width = max(self._size()[0], 2)
        page = Markdown("", code_theme="ansi_dark")
        page.parsed = self._parser.parse(text)
        console = Console(
            file=io.StringIO(),
            width=width,
            force_terminal=True,
            color_system="256",
            highlight=False,
        )
        with console.capture() as capture:
            console.print(page)
        return [line.rstrip() for line in capture.get().strip("\n").split("\n")]

    def _draw(self, done: list[str], rest: list[str]) -> None:
        """Replace what is shown of the open block by finished lines and what is open now."""
        if done and not self._is_first:
            done = ["", *done]
        if rest and (done or not self._is_first):
            rest = ["", *rest]
        rest = rest[-max(self._size()[1] - 2, 1) :]
        lines = done + rest
        same = 0
        while same < min(len(lines), len(self._shown)) and lines[same] == self._shown[same]:
            same += 1
        up = len(self._shown) - same
        if up or len(lines) > same:
            back = f"\x1b[{up}A\r\x1b[J" if up else ""
            new = "".join(f"{line}\r\n" for line in lines[same:])
            self._write(f"{BEGIN}{back}{new}{END}")
        self._is_first = self._is_first and not done
        self._shown = rest

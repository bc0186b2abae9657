"""Break streamed text into lines by its width on screen, so that no word is cut in two.

Chinese and emoji take two columns and may break anywhere, except before closing punctuation. The
price of streaming: the last word is held back until it is known to have ended.
"""

from prompt_toolkit.utils import get_cwidth

NO_LINE_START = frozenset("，。、；：？！）》」』”’…—,.;:?!)]}%")

JOINER = "\u200d"  # makes one emoji of two


class Wrapper:
    """Feed text in any pieces, get text with line breaks."""

    def __init__(self, width: int) -> None:
        """Wrap at `width` columns."""
        self._width, self._column = max(width, 2), 0
        self._word, self._spaces = "", ""

    def feed(self, text: str) -> str:
        """Return what can be shown now."""
        return "".join(self._take(char) for char in text)

    def flush(self) -> str:
        """Return the last word; white space at the end is dropped."""
        shown = self._place()
        self._spaces = ""
        return shown

    def _take(self, char: str) -> str:
        if char == "\n":
            shown = self.flush()
            self._column = 0
            return shown + "\n"
        if char in " \t":
            shown = self._place()
            self._spaces += " " if char == " " else "    "
            return shown
        shown = ""
        if self._word and char not in NO_LINE_START and self._can_break(char):
            shown = self._place()
        self._word += char
        return shown

    def _can_break(self, char: str) -> bool:
        """Tell whether a line may end between the held word and `char`."""
        width, last = get_cwidth(char), self._word[-1]
        return width != 0 and last != JOINER and (width == 2 or get_cwidth(last) == 2)

    def _place(self) -> str:
        """Move the held word to the line, or to the next line if it does not fit."""
        word, spaces = self._word, self._spaces
        if not word:
            return ""
        self._word = self._spaces = ""
        shown = spaces
        if self._column + len(spaces) + get_cwidth(word) > self._width:
            shown = "\n" if self._column else ""
            self._column = 0
        else:
            self._column += len(spaces)
        for char in word:
            width = get_cwidth(char)
            if self._column + width > self._width:  # a word longer than a line
                shown += "\n"
                self._column = 0
            shown += char
            self._column += width
        return shown

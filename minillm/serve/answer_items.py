"""From the text of one answer to what a client is shown: thoughts, text, calls of tools."""

from collections.abc import Sequence

from minillm.serve.think import Part, ThinkSplitter
from minillm.serve.tool_calls import Call, CallReader


class AnswerItems:
    """Takes an answer in pieces; what is certain comes out in order."""

    def __init__(self, *, inside: bool, reader: CallReader | None = None) -> None:
        """Begin.

        Args:
            inside: The prompt ends with an open `<think>`.
            reader: Finds calls, if tools may be called.
        """
        self._splitter, self._reader = ThinkSplitter(inside=inside), reader
        self.parts: list[Part] = []
        self.calls: list[Call] = []

    @property
    def is_thinking(self) -> bool:
        """Whether a `<think>` part is open."""
        return self._splitter.is_inside

    def feed(self, text: str, *, is_end: bool) -> list[Part | Call]:
        """Return what `text` makes certain; with `is_end` all that is left."""
        parts = self._splitter.feed(text)
        if is_end:
            parts += self._splitter.flush()
        items: Sequence[Part | Call] = parts
        if self._reader is not None:
            items = self._read_calls(self._reader, parts, is_end=is_end)
        self.parts += [item for item in items if isinstance(item, Part)]
        self.calls += [item for item in items if isinstance(item, Call)]
        return list(items)

    def text_of(self, kind: str) -> str:
        """Return all parts of a kind so far."""
        return "".join(part.text for part in self.parts if part.kind == kind)

    @staticmethod
    def _read_calls(
        reader: CallReader, parts: Sequence[Part], *, is_end: bool
    ) -> list[Part | Call]:
        items: list[Part | Call] = []
        for part in parts:
            found = [part] if part.kind == "think" else reader.feed(part.text)
            items += [Part("text", item) if isinstance(item, str) else item for item in found]
        if is_end:
            found = reader.flush()
            items += [Part("text", item) if isinstance(item, str) else item for item in found]
        return items

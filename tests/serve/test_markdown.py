"""Streaming Markdown, replayed on a small model of a terminal."""

import re

import pytest
from prompt_toolkit.utils import get_cwidth

from minillm.serve.markdown import MarkdownView

TEXT = """# Title

One **bold** paragraph, 你好，世界，这是一个很长的中文段落，用来检查宽度是否正确。 <b>kept</b>

- first
- second

```python
for i in range(3):
    print(i)
```

1. one
2. two

| a | b |
|---|---|
| 1 | 2 |

end
"""


class Screen:
    """Rows that can still be reached, and how far up the cursor went."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.highest = 0

    def write(self, text: str) -> None:
        if up := re.search(r"\x1b\[(\d+)A\r\x1b\[J", text):
            del self.rows[-int(up[1]) :]
            self.highest = max(self.highest, int(up[1]))
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")
        self.rows += plain.split("\n")[:-1]


def shown(text: str, size: int, width: int = 30, height: int = 12) -> Screen:
    screen = Screen()
    view = MarkdownView(screen.write, lambda: (width, height))
    for at in range(0, len(text), size):
        view._next_s = 0  # draw every time
        view.feed(text[at : at + size])
    view.finish()
    return screen


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_however_it_arrives_the_screen_ends_the_same(size: int) -> None:
    rows = shown(TEXT, size).rows
    assert rows == shown(TEXT, 2).rows
    assert all(get_cwidth(row) <= 30 for row in rows)
    text = "\n".join(rows)
    for word in ("Title", "bold", "<b>kept</b>", "first", "print(i)", "2 two", "end"):
        assert text.count(word) == 1, word
    assert "**" not in text
    assert "```" not in text


def test_a_block_taller_than_the_screen_is_shown_once_and_whole() -> None:
    screen = shown("```\n" + "\n".join(f"line {n:03}" for n in range(60)) + "\n```\n", 5)
    numbers = re.findall(r"line (\d+)", "\n".join(screen.rows))
    assert numbers == [f"{n:03}" for n in range(60)]
    assert screen.highest <= 10


def test_a_tall_table_whose_columns_still_grow_is_shown_once() -> None:
    rows = "".join(f"| row {n:03} | {'w' * (n // 3)} |\n" for n in range(60))
    screen = shown(f"| a | b |\n|---|---|\n{rows}\nend\n", 9, width=60)
    numbers = re.findall(r"row (\d+)", "\n".join(screen.rows))
    assert numbers == [f"{n:03}" for n in range(60)]
    assert screen.highest <= 10

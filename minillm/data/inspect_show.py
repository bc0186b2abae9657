"""The report of `minillm inspect` as plain text within 80 columns."""

from typing import Any

from rich.cells import cell_len, chop_cells, set_cell_size

from minillm.data.inspect_report import Bars, Report, Sample, Table
from minillm.files import human_bytes

WIDTH = 80
_SAMPLE_LINES = 6
_FOLDER_ROWS = 40
_MAX_PARTS = 8  # of more only those with problems are shown
_COMMANDS = ("resume", "next")  # to be pasted, so never broken
_HASHES = ("fingerprint", "sha256", "data_sha256")  # JSON has them in full
_HASH_CHARS = 64


def show(report: Report, depth: int = 0) -> list[str]:
    """Return the lines of a report, its parts after it."""
    lines = _wrap(f"{report.path}: {report.kind}", WIDTH)
    lines.append(("=" if depth == 0 else "-") * max(map(cell_len, lines)))
    names = {name: _label(name) for name in report.facts}
    width = max((len(name) for name in names.values()), default=0)
    for name, value in report.facts.items():
        text = _value(name, value)
        room = 1 << 20 if name in _COMMANDS else WIDTH - width - 4
        head, *rest = _wrap(text, room) or [""]
        lines.append(f"  {names[name]:<{width}}  {head}")
        lines += [" " * (width + 4) + more for more in rest]
    for table in report.tables:
        lines += ["", *_table(table)]
    for bars in report.bars:
        lines += ["", *_bars(bars)]
    for sample in report.samples:
        lines += ["", *_sample(sample)]
    for label, sentences in (("note", report.notes), ("PROBLEM", report.problems)):
        lines += [""] * bool(sentences)
        for sentence in sentences:
            head, *rest = _wrap(sentence, WIDTH - len(label) - 2)
            lines.append(f"{label}: {head}")
            lines += [f"{' ' * (len(label) + 2)}{more}" for more in rest]
    for part in report.parts:
        if len(report.parts) <= _MAX_PARTS or part.num_problems:
            lines += ["", *show(part, depth + 1)]
    return lines


def _label(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_share").replace("_", " ")


def _value(name: str, value: Any) -> str:
    if name in _HASHES and len(str(value)) == _HASH_CHARS:
        return f"{value[:12]}…"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return human_bytes(value) + (f" ({value:,})" if value >= 1000 else "")
    if name.endswith("_share"):
        return f"{value:.2%}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value('', item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _wrap(text: str, width: int) -> list[str]:
    """Break at spaces where there are some, between characters elsewhere; by terminal cells."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if cell_len(joined) <= width:
                line = joined
                continue
            if line and cell_len(word) <= width:
                lines.append(line)
                line = word
                continue
            *full, line = chop_cells(joined, width)
            lines += full
        lines.append(line)
    return lines


def _table(table: Table) -> list[str]:
    shown = table.rows[:_FOLDER_ROWS]
    cells = [table.columns, *([_value("", cell) for cell in row] for row in shown)]
    is_number = [
        bool(shown) and all(isinstance(row[i], (int, float)) for row in shown)
        for i in range(len(table.columns))
    ]
    widths = [max(cell_len(row[i]) for row in cells) for i in range(len(table.columns))]
    while sum(widths) + 2 * len(widths) > WIDTH - 2:
        widths[widths.index(max(widths))] -= 1
    lines = [table.title]
    for row in cells:
        parts = []
        for cell, width, right in zip(row, widths, is_number, strict=True):
            text = cell if cell_len(cell) <= width else set_cell_size(cell, width - 1) + "…"
            space = " " * (width - cell_len(text))
            parts.append(space + text if right else text + space)
        lines.append(("  " + "  ".join(parts)).rstrip())
    if len(table.rows) > len(shown):
        lines.append(f"  … {len(table.rows) - len(shown):,} more (`--json` has all)")
    return lines


def _bars(bars: Bars) -> list[str]:
    lines = [bars.title]
    if bars.summary:
        facts = (f"{name} {_value('', value)}" for name, value in bars.summary.items())
        lines += [f"  {line}" for line in _wrap("  ".join(facts), WIDTH - 2)]
    if not bars.bars:
        return lines
    labels = max(len(label) for label, _ in bars.bars)
    values = [_value("", value) for _, value in bars.bars]
    space = WIDTH - labels - max(map(len, values)) - 6
    top = max(max(value for _, value in bars.bars), 1e-12)
    for (label, value), text in zip(bars.bars, values, strict=True):
        size = round(value / top * space)
        bar = "█" * size or ("▏" if value > 0 else "")
        lines.append(
            f"  {label:>{labels}}  {bar} {text}" if bar else f"  {label:>{labels}}  {text}"
        )
    return lines


def _sample(sample: Sample) -> list[str]:
    lines = _wrap(clean(sample.text.rstrip("\n")), WIDTH - 4)
    is_cut = sample.is_cut or len(lines) > _SAMPLE_LINES
    lines = [f"  | {line}" for line in lines[:_SAMPLE_LINES]]
    head = _wrap(f"sample: {sample.where}", WIDTH)
    return [*head, *lines, *(["  | …"] if is_cut else [])]


def clean(text: str) -> str:
    r"""Write control characters as the symbols that stand for them, so none acts on a terminal.

    >>> clean("a\tb\x1b[31m")
    'a⇥b␛[31m'
    """
    made = text.replace("\r\n", "\n").replace("\t", "⇥")
    return "".join(
        char
        if char == "\n" or not (ord(char) < 32 or 127 <= ord(char) < 160)
        else (chr(0x2400 + ord(char)) if ord(char) < 32 else "␡")
        for char in made
    )

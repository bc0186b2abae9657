"""A picture of which tokens of a packed row see each other."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.colors import ListedColormap

from minillm import charts
from minillm.data.sft_rows import open_rows, read_batch
from minillm.errors import InputError

_BATCH_ROWS = 256
_ANY_ID = 1 << 31
_MAX_POINTS = 1536
_COLOURS = ListedColormap(["white", "#9ecae1", "#08519c"])


@dataclass(frozen=True, slots=True)
class MaskPicture:
    """What was drawn, and where it lies."""

    path: Path
    lengths: list[int]
    """Tokens of each dialogue."""
    num_learned: int

    def facts(self) -> dict[str, object]:
        """Return names and values to show."""
        total = sum(self.lengths)
        pairs = sum(size * (size + 1) // 2 for size in self.lengths)
        return {
            "picture": self.path,
            "tokens": total,
            "tokens learned": self.num_learned,
            "dialogues": len(self.lengths),
            "their lengths": ", ".join(map(str, self.lengths)),
            "pairs that see each other": f"{pairs:,} of {total * (total + 1) // 2:,}",
        }


def find_rows(data: Path, out: Path) -> Path:
    """Return `data` if it is an SFT parquet, else `out`."""
    is_parquet = data.name.lower().endswith(".parquet") and data.is_file()
    return data if is_parquet else out


def draw_mask(path: Path, number: int) -> MaskPicture:
    """Draw the attention mask of a row to `NAME-mask-NUMBER.png` beside the file.

    Dark is what a learned token sees, light what another one sees.

    Args:
        path: An SFT parquet, ours or a published one, packed or not.
        number: The row, from 0.

    Raises:
        InputError: The file is missing or broken, or has no such row.
    """
    learned, starts = _read_row(path, number)
    size = len(learned)
    begins = np.flatnonzero(starts)
    document = np.cumsum(starts)
    points = np.unique(np.linspace(0, size - 1, min(size, _MAX_POINTS)).astype(int))
    sees = visible(document[points])  # of a long row, every so many tokens
    shade = np.where(sees, 1 + learned[points][:, None], 0)
    place = path.with_name(f"{path.stem}-mask-{number}.png")
    with charts.figure(7, 7.4) as figure:
        axes = figure.subplots()
        axes.imshow(
            shade, cmap=_COLOURS, vmin=0, vmax=2, extent=(0, size, size, 0), interpolation="nearest"
        )
        for begin in begins[1:]:
            axes.axhline(begin, color="C1", linewidth=0.6)
            axes.axvline(begin, color="C1", linewidth=0.6)
        axes.grid(visible=False)
        axes.set_title(
            f"Row {number}: {len(begins)} dialogues, {size:,} tokens\n"
            "dark: seen by a token that is learned; light: by another; white: not seen"
        )
        axes.set_xlabel("token that is seen")
        axes.set_ylabel("token that sees")
        charts.save_png(figure, place)
    lengths = np.diff([*begins, size]).tolist()
    return MaskPicture(place, lengths, int(learned.sum()))


def visible(document: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return whether token i sees token j, shape (L, L): j is not later, and of the same dialogue.

    >>> visible(np.array([1, 1, 2])).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    place = np.arange(len(document))
    sees: npt.NDArray[np.bool_] = (document[:, None] == document) & (place[:, None] >= place)
    return sees


def _read_row(path: Path, number: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which tokens of a row are learned, and which begin a dialogue."""
    with open_rows(path) as (file, names):
        if number >= file.metadata.num_rows:
            raise InputError(
                f"`{path}` has {file.metadata.num_rows} rows, none is number {number}",
                hint="the first is `--show-mask 0`",
            )
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        group = int(np.searchsorted(np.cumsum(groups), number, side="right"))
        first = sum(groups[:group])
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names):
            if number < first + batch.num_rows:
                row = batch.slice(number - first, 1)
                _, _, learned, starts = read_batch(path, number, row, _ANY_ID)
                return learned, starts
            first += batch.num_rows
    raise AssertionError("a row group holds fewer rows than it says")

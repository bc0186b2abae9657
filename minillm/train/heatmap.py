"""A table of numbers as a picture: the load of each expert in each layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_MANY = 16  # columns up to which there is room for the numbers


def draw_heatmap(rows: Mapping[str, Sequence[float]], title: str) -> npt.NDArray[np.uint8]:
    """Draw one row of cells for each name; white is 1, red more, blue less.

    Args:
        rows: Numbers by the name of their row, equally many each.
        title: Above the picture.

    Returns:
        Pixels `(height, width, 3)`.
    """
    table = np.array(list(rows.values()), dtype=float)
    num_rows, num_columns = table.shape
    size = (2.6 + 0.5 * min(num_columns, 2 * _MANY), 1.1 + 0.34 * num_rows)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots()
    # from 0 through 1 to 2: what has twice its share or more is as red as it gets
    image = axes.imshow(table, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set_yticks(range(num_rows), [name.replace("_", " ") for name in rows])
    axes.set_xticks(range(num_columns)[:: max(1, num_columns // _MANY)])
    axes.set_xlabel("expert")
    axes.set_title(title, fontsize=10)
    if num_columns <= _MANY:
        for (row, column), value in np.ndenumerate(table):
            color = "white" if abs(value - 1) > 0.7 else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color
            )
    figure.colorbar(image, ax=axes, label="1 = even", extend="max")
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

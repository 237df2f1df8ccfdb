"""A picture of a matrix: where its entries stand, and their sign and size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convtool.core.conv import Conv
from convtool.core.rows import RowMatrix
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import UsageError
from convtool.formats.atomic import replacing

SHADES = " \N{LIGHT SHADE}\N{MEDIUM SHADE}\N{DARK SHADE}\N{FULL BLOCK}"  # of text
TICKS = 13  # numbers along an axis
LINES = 65  # of the grid, as long as they leave something to see
PIXELS = 1024  # per side; a larger matrix is binned, each pixel showing the entry of largest magnitude in its bin


class Part(NamedTuple):
    """Rows A:B and columns A:B of a matrix."""

    matrix: RowMatrix
    rows: tuple[int, int]
    columns: tuple[int, int]

    @classmethod
    def of(cls, matrix: RowMatrix, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Part:
        """Return a part of a matrix, of all rows or columns where none are given."""
        return cls(matrix, rows or (0, matrix.shape[0]), columns or (0, matrix.shape[1]))

    def binned(self, most_rows: int = PIXELS, most_columns: int = PIXELS) -> Tensor:
        """Return each bin's entry of largest magnitude, 0 without any: (at most most_rows, most_columns) float64."""
        matrix = (
            self.matrix if self.columns == (0, self.matrix.shape[1]) else self.matrix.columns(*self.columns, self.rows)
        )
        rows, columns = self.rows[1] - self.rows[0], matrix.shape[1]
        height, width = min(rows, most_rows), min(columns, most_columns)
        high = torch.zeros(height * width, dtype=torch.float64)
        low = torch.zeros_like(high)
        for start, stop, _, _ in matrix.stretches(*self.rows):
            block = matrix.rows(start, stop)
            row = torch.repeat_interleave(torch.arange(start, stop) - self.rows[0], block.counts)
            place = row * height // rows * width + block.indices.long() * width // columns
            values = block.values.real if block.values.is_complex() else block.values
            high.scatter_reduce_(0, place, values.double(), "amax")
            low.scatter_reduce_(0, place, values.double(), "amin")
        return torch.where(high >= -low, high, low).reshape(height, width)


def check_plot(path: Path) -> None:
    """Check that a picture can be drawn to `path`, before anything is written.

    Raises:
        UsageError: matplotlib isn't installed, or the name doesn't end in .png.
    """
    if path.suffix != ".png":
        raise UsageError(f"{path}: expected a name that ends in .png")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'convtool[plot]'") from None


@contextlib.contextmanager
def plotted(
    matrix: ToeplitzMatrix, path: Path, *, force: bool, title: str, part: Part, by_channel: bool = True
) -> Iterator[None]:
    """Draw a part of the matrix as a PNG, which gets its name when the block ends well.

    Axes count channels, a line stands between two of them, and a single layer's taps are drawn beside.

    Args:
        by_channel: the matrix is in blocks, one for each pair of channels.

    Raises:
        UsageError: matplotlib isn't installed, or the name doesn't end in .png.
        OutputError: the file exists or could not be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (start, stop), (left, right), picture = part.rows, part.columns, part.binned()
    height = max(4.0, min(12.0, 8.0 * (stop - start) / (right - left)))
    figure = Figure(figsize=(10.0, height + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes, beside = figure.subplots(1, 2, width_ratios=(6, 1))
    largest = float(picture.abs().max()) or 1.0
    shown = _image(axes, picture, largest, extent=(left, right, stop, start), aspect="auto")
    high, wide = -(-(stop - start) // picture.shape[0]), -(-(right - left) // picture.shape[1])
    axes.set_title(title + (f"\na pixel shows the largest of {high} x {wide} entries" if high * wide > 1 else ""))
    ends = [("input", matrix.input_size, axes.xaxis), ("output", matrix.output_size, axes.yaxis)]
    for (name, size, _), (_, _, axis) in zip(ends, ends[:: -1 if matrix.transpose else 1], strict=True):
        _label(axis, name, math.prod(size) if by_channel else 0)
    _draw_taps(beside, matrix, largest)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    with replacing(path, force=force) as file:
        figure.savefig(file, format="png", metadata={"Software": None})  # no version: equal inputs, equal files
        file.flush()  # a full disk is found before the matrix is written
        yield


def _image(axes: Any, picture: Tensor, largest: float, **options: Any) -> Any:
    seen = torch.where(picture == 0, torch.nan, picture).numpy()
    return axes.imshow(seen, cmap="coolwarm", vmin=-largest, vmax=largest, interpolation="nearest", **options)


def _label(axis: Any, name: str, positions: int) -> None:
    """Number an axis by channels of so many positions, with a line between two; by rows or columns where 0."""
    low, high = sorted(axis.get_view_interval())
    if not positions:
        axis.set_label_text(name)
        return
    channels = range(-(-int(low) // positions), int(high) // positions + 1)
    step = max(1, -(-len(channels) // TICKS))
    axis.set_ticks([channel * positions for channel in channels[::step]], [str(one) for one in channels[::step]])
    axis.set_label_text(f"{name} channel, {positions} positions each")
    if len(channels) <= LINES:
        axis.set_ticks([channel * positions for channel in channels], minor=True)
        axis.grid(which="both", color="0.8", linewidth=0.5)


def _draw_taps(axes: Any, matrix: ToeplitzMatrix, largest: float) -> None:
    """Draw the first kernel of a single layer, so that its taps can be found by their colours; of others nothing."""
    if not isinstance(matrix.layers, Conv) or (weight := matrix.layers.exact().weight).is_complex():
        axes.set_axis_off()
        return
    kernel = weight[0, 0].double()
    kernel = kernel.reshape(-1, kernel.shape[-1]) if kernel.ndim else kernel.reshape(1, 1)
    _image(axes, kernel, largest, extent=(0, kernel.shape[1], kernel.shape[0], 0))
    axes.set_anchor("N")
    axes.set_title(f"its {'x'.join(map(str, weight.shape[2:]))} taps,\nchannel 0 to 0", fontsize="medium")
    axes.set_xticks(range(kernel.shape[1] + 1), [])
    axes.set_yticks(range(kernel.shape[0] + 1), [])
    axes.grid(color="0.8", linewidth=0.5)


def drawn(part: Part, width: int, height: int) -> list[str]:
    """Return a part of a matrix as lines of text, darker where it is larger.

    They have at most `width` characters, and there are about `height` of them. A character is about twice as high as
    wide, so a square matrix gets half as many lines as columns.
    """
    rows, columns = (stop - start for start, stop in (part.rows, part.columns))
    wide = min(columns, width)
    high = max(1, min(rows, height, round(wide * rows / columns / 2)))
    picture = part.binned(high, wide).abs()
    largest = float(picture.max())
    if not largest:
        return [" " * wide] * high
    # An entry of any size shows: the faintest shade is for what is there, the blank for what isn't.
    shades = (picture / largest * (len(SHADES) - 1)).ceil().long().clamp(max=len(SHADES) - 1)
    return ["".join(SHADES[shade] for shade in line) for line in shades.tolist()]

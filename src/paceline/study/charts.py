"""Small pictures for the docs: heat charts of speeds, and PNG files with a palette."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import OptionError, PacelineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = 256
"""Of the palette."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One heat chart: a speed for each row and column, 1 being plain decoding; None where there is none."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    framed: Collection[tuple[int, int]] = ()
    """(row, column) of cells with a frame."""
    bold: Collection[str] = ()
    """Rows whose name stands out."""
    breaks: Collection[int] = ()
    """Columns after which a line is drawn."""


def new_figure(width: float, height: float) -> Figure:
    """A figure without a window, sizes in inches. Raises PacelineError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PacelineError("--plot: matplotlib is not installed; pip install 'paceline[study]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_chart(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels below each other: red is slower than plain decoding, green faster, a factor of two is the full colour.

    Raises PacelineError without matplotlib or where `path` cannot be written, OptionError for a kind of file that is unknown.
    """
    wide, names = max(len(panel.columns) for panel in panels), max(len(row) for panel in panels for row in panel.rows)
    figure = new_figure(1.0 + 0.08 * names + 0.43 * wide, sum(1.4 + 0.2 * len(panel.rows) for panel in panels))
    axes: Any = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[6 + len(panel.rows) for panel in panels])
    for panel, (own,) in zip(panels, axes, strict=True):
        _draw(own, panel)
    save(figure, path)


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    shades = [[math.nan if v is None else math.log2(max(v, 1 / 64)) for v in row] for row in panel.values]
    axes.imshow(shades, cmap="RdYlGn", vmin=-1.0, vmax=1.0, aspect="auto")
    for i, row in enumerate(panel.values):
        for j, value in enumerate(row):
            if value is not None:
                ink = "black" if 0.6 < value < 1.75 else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    for i, j in panel.framed:
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, linewidth=1.5))
    for j in panel.breaks:
        axes.axvline(j + 0.5, color="white", linewidth=4)
    axes.set_xticks(range(len(panel.columns)), panel.columns, rotation=40, ha="left", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize=8)
    for label in axes.get_yticklabels():
        if label.get_text() in panel.bold:
            label.set_fontweight("bold")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(panel.title, fontsize=9, loc="left", pad=8)


def save(figure: Figure, path: Path) -> None:
    """Write a figure; a PNG gets a palette. Raises as `heat_chart`."""
    kind = path.suffix.lower().removeprefix(".") or "png"
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=kind, dpi=110)
        path.write_bytes(_with_palette(drawn) if kind == "png" else drawn.getvalue())
    except OSError as error:
        raise PacelineError(f"--plot {str(path)!r}: {error.strerror}; choose a place that can be written") from error
    except ValueError as error:
        raise OptionError(f"--plot {str(path)!r}: {error}") from None


def _with_palette(drawn: io.BytesIO) -> bytes:
    from PIL import Image

    drawn.seek(0)
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    return small.getvalue()

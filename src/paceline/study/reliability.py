"""How far a draft's calibrated confidence can be trusted: calibration error, and the reliability diagram (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paceline.errors import OptionError

_WIDTH = 20


def calibration_error(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Per drafter: mean distance between predicted and observed acceptance over its bins, weighted by their labels.

    rows: as `Controller.calibration` gives them.
    """
    sums: dict[str, tuple[float, int]] = {}
    for row in rows:
        off, labels = sums.get(row["drafter"], (0.0, 0))
        sums[row["drafter"]] = off + abs(row["predicted"] - row["accepted"]) * row["labels"], labels + row["labels"]
    return {drafter: off / labels for drafter, (off, labels) in sums.items()}


def reliability_bar(predicted: float, accepted: float) -> str:
    """One bin as text: a bar as long as the observed acceptance, with a mark where it was predicted to end."""
    bar = ["#" if i < round(accepted * _WIDTH) else "." for i in range(_WIDTH + 1)]
    bar[round(predicted * _WIDTH)] = "|"
    return "".join(bar)


def plot_reliability(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Observed against predicted acceptance, a line for each drafter, the size of a point by its labels; written to `path`.

    Raises OptionError when matplotlib is missing, there is nothing to draw, or the file cannot be written in that format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("plot: needs matplotlib; install the `study` extra") from error
    if not rows:
        raise OptionError("plot: no draft stated its confidence; use a drafter with a model, and a controller that calibrates it")
    errors = calibration_error(rows)
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--", label="perfectly calibrated")
    for drafter, off in errors.items():
        own = [row for row in rows if row["drafter"] == drafter]
        most = max(row["labels"] for row in own)
        predicted, accepted = [row["predicted"] for row in own], [row["accepted"] for row in own]
        (line,) = axes.plot(predicted, accepted, linewidth=1, label=f"{drafter} (error {off:.3f})")
        axes.scatter(predicted, accepted, s=[8 + 72 * row["labels"] / most for row in own], color=line.get_color())
    axes.set(xlabel="predicted chance of acceptance", ylabel="accepted", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(fontsize=8, loc="upper left")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise OptionError(f"plot = {str(path)!r}: {error}; name a .png file in a folder that can be written") from error

"""Reliability of calibrated confidences: error, text and picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.errors import OptionError
from paceline.study.reliability import calibration_error, plot_reliability, reliability_bar

ROWS = [
    {"drafter": "model", "predicted": 0.3, "accepted": 0.5, "labels": 30},
    {"drafter": "model", "predicted": 0.9, "accepted": 0.9, "labels": 10},
    {"drafter": "early_exit", "predicted": 0.2, "accepted": 0.1, "labels": 5},
]


def test_error_is_weighted_by_labels_and_kept_apart_by_drafter() -> None:
    assert calibration_error(ROWS) == pytest.approx({"model": 0.15, "early_exit": 0.1})
    assert calibration_error([]) == {}


def test_bar_ends_at_the_observed_share_and_marks_the_predicted_one() -> None:
    assert reliability_bar(1.0, 0.5) == "#" * 10 + "." * 10 + "|"
    assert reliability_bar(0.0, 1.0) == "|" + "#" * 19 + "."


def test_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_reliability(ROWS, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_plots_that_cannot_be_drawn_are_refused_with_the_reason(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(OptionError, match="no draft stated its confidence"):
        plot_reliability([], tmp_path / "a.png")
    with pytest.raises(OptionError, match=r"name a \.png file"):
        plot_reliability(ROWS, tmp_path / "a.unknown")

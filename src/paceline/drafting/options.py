"""Checks that drafters' option classes share."""

from __future__ import annotations

import math

from paceline.errors import OptionError


def whole(name: str, value: object, low: int, high: int) -> None:
    """Raises OptionError unless `value` is a whole number in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise OptionError(f"{name} = {value!r}: must be a whole number in [{low}, {high}]")


def number(name: str, value: object, low: float, high: float) -> None:
    """Raises OptionError unless `value` is a finite number in [low, high]."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    if not ok:
        raise OptionError(f"{name} = {value!r}: must be a number in [{low:g}, {high:g}]")

"""State that Python and C share: structures whose numbers Python reads as attributes and C (`pacer_core.c`) in place."""

from __future__ import annotations

from ctypes import c_double, c_int64
from typing import TypeAlias

Fields: TypeAlias = tuple[tuple[str, type], ...]


def doubles(*names: str) -> Fields:
    """Fields of floats."""
    return tuple((name, c_double) for name in names)


def wholes(*names: str) -> Fields:
    """Fields of whole numbers and flags, of 64 bits as the floats are: no structure has gaps."""
    return tuple((name, c_int64) for name in names)

"""Where a text that was encoded again meets its earlier encoding (universal assisted generation, as in transformers)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Alignment:
    """How to turn the earlier ids into those of the longer text."""

    discard: int
    """Last ids of the earlier encoding that changed."""
    replace: list[int]
    """Ids in their place, at most as many."""
    append: list[int]
    """Ids of what is new."""


def align(old: Sequence[int], new: Sequence[int]) -> Alignment | None:
    """Align along the longest common diagonal: the longest run that both encodings share, the earliest in `new` of equals.

    old: the last ids of a text; new: ids of a window of that text, continued. None when they share nothing.
    """
    longest, end_old, end_new = 0, 0, 0
    runs = [0] * (len(old) + 1)  # runs[j + 1]: length of the common run that ends at old[j] and at the token of `new` before
    for i, token in enumerate(new):
        before = runs
        runs = [0] * (len(old) + 1)
        for j, known in enumerate(old):
            if token == known:
                runs[j + 1] = before[j] + 1
                if runs[j + 1] > longest:
                    longest, end_old, end_new = runs[j + 1], j + 1, i + 1
    if longest == 0:
        return None
    discard = len(old) - end_old
    return Alignment(discard, list(new[end_new : end_new + discard]), list(new[end_new + discard :]))

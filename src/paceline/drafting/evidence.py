"""How sure a look-up is, as the bucket that `Outlook.signal` carries.

Two things tell most about whether the first token of a look-up is accepted (measured on SmolLM2's own texts, all categories of
Spec-Bench): how many tokens agree before it, and whether other places with the same tokens continue in the same way. A single
place is right in 29 % of cases after 1 token, 51 % after 2, 66 % after 3 to 5, 80 % after 6 to 15, 96 % beyond; places that
contradict each other in 14 to 25 %, whatever the length; places that agree in 52, 75, 88, 97 and 99 %.
"""

from __future__ import annotations

from bisect import bisect_right

_LENGTHS = (2, 3, 6, 16)
SIGNALS = (0, 1, 2, 3, 4, 6, 8, 12, 17)
"""Signal of each level, far enough apart for a controller that takes signals for lengths and groups the long ones."""


_CHANCES = (56, 92, 140, 178, 204, 227, 243)
"""Estimates of a first token that divide the levels, in 255ths: halfway between what a controller expects of each."""
_BY_CHANCE = tuple(SIGNALS[1 + bisect_right(_CHANCES, chance)] for chance in range(256))


def chance_signal(chance: int) -> int:
    """Signal of a look-up that knows the chance of its first token, in 255ths."""
    return _BY_CHANCE[chance]


def look_up_level(matched: int, agreement: int) -> int:
    """Level 1 to 8 of a look-up. agreement: 1 when several places continue alike, 0 for a single place, -1 when they differ."""
    if agreement < 0:
        return 1
    length = bisect_right(_LENGTHS, matched)
    return 2 + length + (min(2, length + 1) if agreement else 0)

"""Greedy verification: keep what the target's argmax would have said."""

from __future__ import annotations

from paceline.records import Draft, Verdict
from paceline.sampling import CounterRandom
from paceline.verification.base import Rule, TargetRows
from paceline.verification.walk import outcome_labels, walk


class GreedyRule(Rule):
    """Follows the most probable token through a chain or a tree; exact at temperature 0, whatever drafted.

    Source: blockwise parallel decoding (1811.03115); every lossless rule comes down to it at temperature 0.
    """

    name = "greedy"
    greedy_only = True

    def verify(self, target: TargetRows, draft: Draft, random: CounterRandom, position: int) -> Verdict:
        path, emitted = walk(draft, lambda row, _: target.argmax(row))
        return Verdict(tuple(path), tuple(emitted), outcome_labels(draft, path))

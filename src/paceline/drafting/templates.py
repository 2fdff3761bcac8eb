"""Tree shapes for drafters whose children are ranked: learnt from which rank was accepted, rebuilt now and then."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.drafting.tree_plan import best_first
from paceline.drafting.trees import RankPath, Shape, shape_of
from paceline.records import Verdict

_REBUILD = 64
"""Rounds between two plans: a plan must not depend on the round that it is used in."""
_DECAY = 0.99
_PRIOR = 20.0
"""Weight of the first guess, in observed nodes."""


class LearntTemplate:
    """Best trees of every size for the present acceptance by rank (Sequoia's plan, 2402.12374, with figures learnt on-line).

    The rank of a node is its place among its siblings. Shared by all sequences of a drafter.
    """

    def __init__(self, guess: Sequence[float], max_nodes: int = 63, max_depth: int = 16) -> None:
        """guess: first estimate of the chance that the b-th child is the accepted one, non-increasing."""
        self._visits = _PRIOR
        self._hits = [_PRIOR * prob for prob in guess]
        self._max_nodes = max_nodes
        self._max_depth = max_depth
        self._rounds = 0
        self._paths: list[RankPath] = []
        self._shapes: dict[int, Shape] = {}
        self._plan()

    @property
    def rank_probs(self) -> list[float]:
        """Chance of each rank to be the accepted one; never increasing."""
        probs: list[float] = []
        for hits in self._hits:
            probs.append(min(hits / self._visits, probs[-1] if probs else 1.0))
        return probs

    def _plan(self) -> None:
        self._paths, _ = best_first(self.rank_probs, self._max_nodes, self._max_depth)
        self._shapes = {}

    def shape(self, num_nodes: int) -> Shape:
        """The best shape of `num_nodes` nodes, root excluded."""
        count = min(num_nodes, len(self._paths))
        if count not in self._shapes:
            self._shapes[count] = shape_of(self._paths[:count])
        return self._shapes[count]

    def learn(self, parents: Sequence[int], ranks: Sequence[int], verdict: Verdict) -> None:
        """Count a verified tree: at every node reached that had children, which rank was accepted, if any."""
        inner = set(parents)
        accepted = {parents[node]: ranks[node] for node in verdict.path}
        for node in (-1, *verdict.path):
            if node in inner:
                self._visits = _DECAY * self._visits + 1.0
                self._hits = [_DECAY * hits for hits in self._hits]
                if node in accepted:
                    self._hits[accepted[node]] += 1.0
        self._rounds += 1
        if self._rounds % _REBUILD == 0:
            self._plan()

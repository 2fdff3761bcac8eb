"""Trees that are grown in the round from a draft's own probabilities: EAGLE-2, OPT-Tree, best-first, DySpec."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from paceline.drafting.trees import best_path_first, select, top_nodes
from paceline.records import Draft

Children = Sequence[tuple[int, float]]
"""Tokens that may follow a node, most probable first, with their conditional probabilities."""
Expand = Callable[["Growth", Sequence[int]], Sequence[Children]]
"""Children of each of the given nodes (-1: the root), found in one pass of the draft."""


@dataclass(slots=True)
class Growth:
    """Candidates in the order in which they were made."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Path probabilities."""

    def add(self, token: int, parent: int, confidence: float) -> int:
        """Append a candidate and return its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.confidences.append(confidence)
        self.scores.append(confidence * (self.scores[parent] if parent >= 0 else 1.0))
        return len(self.tokens) - 1

    def path(self, node: int) -> list[int]:
        """Tokens from the root's child down to `node`."""
        found = []
        while node >= 0:
            found.append(self.tokens[node])
            node = self.parents[node]
        return found[::-1]

    def expand(self, frontier: Sequence[int], expand: Expand, width: int) -> list[int]:
        """Add up to `width` children of each node of the frontier; returns the new nodes."""
        return [
            self.add(token, parent, confidence)
            for parent, children in zip(frontier, expand(self, frontier), strict=True)
            for token, confidence in children[:width]
        ]

    def draft(self, num_tokens: int, name: str) -> Draft:
        """The `num_tokens` most probable candidates, the best path first."""
        kept = top_nodes(self.scores, num_tokens)
        draft = Draft(tuple(self.tokens), tuple(self.parents), confidences=tuple(self.confidences), drafter=name)
        draft = select(draft, kept)
        order = best_path_first(draft.parents or (), [self.scores[i] for i in kept])
        return select(draft, order)

    def threshold(self, num_tokens: int) -> float:
        """Score below which no new candidate can enter the `num_tokens` best (0 while there are fewer)."""
        return heapq.nlargest(num_tokens, self.scores)[-1] if len(self.scores) >= num_tokens else 0.0


def expand_and_rerank(expand: Expand, num_tokens: int, *, width: int, levels: int, end_ids: Collection[int] = ()) -> Growth:
    """EAGLE-2 (2406.16858, section 4): expand the `width` best nodes of each level by `width` children; the best candidates stay.

    levels: passes of the draft. Ends early when no node of the frontier could enter the final tree, which changes nothing (ours).
    """
    growth = Growth()
    frontier = [-1]
    for _ in range(levels):
        new = growth.expand(frontier, expand, width)
        bar = growth.threshold(num_tokens)
        alive = [i for i in new if growth.scores[i] > bar and growth.tokens[i] not in end_ids]
        frontier = sorted(sorted(alive, key=lambda i: -growth.scores[i])[:width])
        if not frontier:
            break
    return growth


def opt_tree(
    expand: Expand, num_tokens: int, *, width: int, levels: int, least_gain: float, end_ids: Collection[int] = ()
) -> Growth:
    """OPT-Tree (2406.17276, algorithm 1): the tree of `num_tokens` nodes with the largest sum of path probabilities.

    width: children of a node that are looked at (the paper: `num_tokens`). Goes one level deeper while the last one raised that sum
    by at least `least_gain` tokens, which is what a level must pay.
    """
    growth = Growth()
    frontier, before = [-1], 0.0
    for _ in range(levels):
        new = growth.expand(frontier, expand, width)
        total = sum(heapq.nlargest(num_tokens, growth.scores))
        frontier = [i for i in new if growth.tokens[i] not in end_ids]
        frontier = sorted(sorted(frontier, key=lambda i: -growth.scores[i])[:num_tokens])
        if total - before < least_gain or not frontier:
            break
        before = total
    return growth


def grow_best(num_tokens: int, children: Callable[[Growth, int], Children]) -> Growth:
    """The tree of `num_tokens` nodes with the largest sum of path probabilities, for drafts whose children cost nothing to look up.

    children(growth, node): what may follow a node (-1: the root); empty where nothing is known. Best-first search over node values,
    which gives OPT-Tree's optimum.
    """
    growth = Growth()
    known: dict[int, Children] = {}
    heap: list[tuple[float, int, int, int]] = []

    def offer(parent: int, rank: int) -> None:
        """Queue the child of this rank, if there is one."""
        if rank < len(known[parent]):
            above = growth.scores[parent] if parent >= 0 else 1.0
            heapq.heappush(heap, (-above * known[parent][rank][1], len(growth.tokens), parent, rank))

    known[-1] = children(growth, -1)
    offer(-1, 0)
    while heap and len(growth.tokens) < num_tokens:
        _, _, parent, rank = heapq.heappop(heap)
        node = growth.add(known[parent][rank][0], parent, known[parent][rank][1])
        known[node] = children(growth, node)
        offer(node, 0)
        offer(parent, rank + 1)
    return growth


def grow_slots(num_tokens: int, fill: Callable[[int], tuple[int, float, bool] | None]) -> tuple[list[int], list[int], list[float]]:
    """DySpec (2410.11744), rebuilt: fill the slot that verification most probably reaches, again and again.

    fill(parent): draw one more child of `parent`; returns (token, its probability among those left, whether it may have
    children), or None when nothing is left. A slot's value uses only tokens drawn before, so the shape never depends on the token
    drawn in the slot itself: sampled trees stay lossless. Returns tokens, parents and the probabilities.
    """
    tokens: list[int] = []
    parents: list[int] = []
    probs: list[float] = []
    heap: list[tuple[float, int, int]] = [(-1.0, 0, -1)]
    count = 0
    while heap and len(tokens) < num_tokens:
        negative, _, parent = heapq.heappop(heap)
        filled = fill(parent)
        if filled is None:
            continue
        token, prob, open_below = filled
        tokens.append(token)
        parents.append(parent)
        probs.append(prob)
        for value, node in ((negative * prob, len(tokens) - 1), (negative * (1.0 - prob), parent)):
            count += 1
            if value < 0.0 and (node == parent or open_below):
                heapq.heappush(heap, (value, count, node))
    return tokens, parents, probs

"""Tree shapes that are planned ahead: from counts, from acceptance by rank (Sequoia), and their size from measured costs."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from paceline.drafting.trees import RankPath


def from_counts(counts: Mapping[RankPath, float], num_nodes: int) -> list[RankPath]:
    """The `num_nodes` paths that were accepted most often, parents before children.

    counts: how often each rank path was reached and accepted; it never grows along a path, so the best set is prefix-closed
    when ties go to the shorter path. The first m paths are the best tree of m nodes. Source: STAND (2506.04708), Medusa's search.
    """
    return sorted(counts, key=lambda path: (-counts[path], len(path), path))[:num_nodes]


def best_first(rank_probs: Sequence[float], num_nodes: int, max_depth: int | None = None) -> tuple[list[RankPath], float]:
    """The best tree of `num_nodes` nodes (root excluded) and its expected emitted tokens, without a programme (ours).

    rank_probs: chance that the b-th child is the accepted one, non-increasing. Then taking the largest path product again and
    again gives Sequoia's optimum when depth is free, and a good tree of bounded depth otherwise.
    Raises ValueError when the probabilities increase.
    """
    if any(a < b for a, b in pairwise(rank_probs)):
        raise ValueError(f"rank_probs = {list(rank_probs)}: must not increase")
    paths: list[RankPath] = []
    expected = 1.0
    heap: list[tuple[float, int, RankPath, float]] = []

    def push(above: RankPath, above_prob: float, rank: int) -> None:
        if rank < len(rank_probs) and (max_depth is None or len(above) < max_depth):
            heapq.heappush(heap, (-above_prob * rank_probs[rank], len(above) + 1, (*above, rank), above_prob))

    push((), 1.0, 0)
    while heap and len(paths) < num_nodes:
        negative, _, path, above_prob = heapq.heappop(heap)
        paths.append(path)
        expected -= negative
        push(path, -negative, 0)
        push(path[:-1], above_prob, path[-1] + 1)
    return paths, expected


@dataclass(frozen=True, slots=True)
class SequoiaTable:
    """Expected emitted tokens of the best tree with exactly m nodes (root included) and at most l levels below the root."""

    rank_probs: tuple[float, ...]
    values: list[list[float]]
    """values[m][l]; minus infinity where no such tree exists."""
    splits: dict[tuple[int, int, int], int]
    """(m, l, b) -> nodes of the tree without its b-th and last child."""
    branches: dict[tuple[int, int], int]
    """(m, l) -> children of the root in the best tree."""

    def paths(self, nodes: int, levels: int) -> list[RankPath]:
        """The best tree's rank paths, root excluded, parents before children."""
        found: list[RankPath] = []
        m = nodes
        for b in range(self.branches[nodes, levels], 0, -1):
            keep = self.splits[m, levels, b]
            below = self.paths(m - keep, levels - 1)
            found += [(b - 1,), *((b - 1, *path) for path in below)]
            m = keep
        return sorted(found, key=lambda path: (len(path), path))


def sequoia(rank_probs: Sequence[float], max_nodes: int, max_levels: int) -> SequoiaTable:
    """Sequoia's dynamic programme (2402.12374, section 3.1): optimal trees for every size and depth. O(nodes^2 * levels * ranks).

    max_nodes counts the root, max_levels does not.
    """
    none = float("-inf")
    values = [[none] * (max_levels + 1) for _ in range(max_nodes + 1)]
    splits: dict[tuple[int, int, int], int] = {}
    branches: dict[tuple[int, int], int] = {}
    for levels in range(max_levels + 1):
        with_children = [none, 1.0] + [none] * (max_nodes - 1)  # by m: best tree whose root has exactly b children, b = 0
        best = list(with_children)
        branches[1, levels] = 0
        for b, prob in enumerate(rank_probs if levels else (), start=1):
            grown = [none] * (max_nodes + 1)
            for m in range(b + 1, max_nodes + 1):
                grown[m], splits[m, levels, b] = max(
                    (with_children[keep] + prob * values[m - keep][levels - 1], keep) for keep in range(1, m)
                )
                if grown[m] > best[m]:
                    best[m] = grown[m]
                    branches[m, levels] = b
            with_children = grown
        for m in range(max_nodes + 1):
            values[m][levels] = best[m]
    return SequoiaTable(tuple(rank_probs), values, splits, branches)


@dataclass(frozen=True, slots=True)
class SizeChoice:
    """A tree size, by what it yields and costs in units of a plain step."""

    nodes: int
    """Root included."""
    levels: int
    expected_emitted: float
    rate: float
    """Expected emitted tokens per unit of time; plain decoding has 1."""


def choose_size(table: SequoiaTable, verify_cost: Mapping[int, float], level_cost: float, round_cost: float = 0.0) -> SizeChoice:
    """The size and depth with the highest rate: all buckets are compared, since measured costs need not be monotone.

    verify_cost: rows of a forward -> its time over that of one row. level_cost: one draft level. round_cost: host time of a round.
    """
    choices = []
    for nodes, cost in verify_cost.items():
        for levels, expected in enumerate(table.values[nodes] if nodes < len(table.values) else ()):
            rate = expected / (round_cost + level_cost * levels + cost)
            choices.append(SizeChoice(nodes, levels, expected, rate))
    return max(choices, key=lambda choice: (choice.rate, -choice.nodes, -choice.levels))

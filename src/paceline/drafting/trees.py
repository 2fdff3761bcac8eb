"""Draft trees as data: shapes by rank, ordering, merging. Nodes exclude the root (the pending token), parents come first.

Node i of a tree has parent `parents[i] < i`, or -1 for a child of the root. Numbering (ours): the most probable child first,
so that after acceptance the kept rows are usually 0, 1, 2, ... and no cache entry has to move.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paceline.records import Draft

RankPath = tuple[int, ...]
"""A node by the ranks of its ancestors and itself: (0, 1) is the second-best child of the best child of the root."""


_UNRATED = 0.7
"""Conditional estimate for tokens whose drafter gives none."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree of child ranks, without tokens."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    """Place of each node among its siblings, best first."""

    def __len__(self) -> int:
        return len(self.parents)


def shape_of(paths: Iterable[RankPath]) -> Shape:
    """The shape of a prefix-closed set of rank paths, depth-first, so that the all-best path comes first.

    Raises ValueError when a path's parent is missing.
    """
    ordered = sorted(set(paths))
    index = {(): -1} | {path: i for i, path in enumerate(ordered)}
    for path in ordered:
        if not path or path[:-1] not in index:
            raise ValueError(f"rank path {path} has no parent in the set")
    return Shape(tuple(index[path[:-1]] for path in ordered), tuple(path[-1] for path in ordered))


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of each node; children of the root have depth 1."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 1)
    return found


def path_scores(parents: Sequence[int], confidences: Sequence[float]) -> list[float]:
    """Probability of each node's path: the product of the conditional estimates from the root down."""
    found: list[float] = []
    for parent, confidence in zip(parents, confidences, strict=True):
        found.append((found[parent] if parent >= 0 else 1.0) * confidence)
    return found


def top_nodes(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` largest scores, ascending; ties go to the node made first, which keeps the set prefix-closed."""
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return sorted(best)


def best_path_first(parents: Sequence[int], scores: Sequence[float]) -> list[int]:
    """An order of the nodes: depth-first, the most probable child first at every node.

    scores: path probabilities; ties keep their order.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    order: list[int] = []
    stack = [-1]
    while stack:
        node = stack.pop()
        if node >= 0:
            order.append(node)
        stack += sorted(children.get(node, ()), key=lambda child: (scores[child], -child))
    return order


def select(draft: Draft, nodes: Sequence[int]) -> Draft:
    """A point-mass draft reduced to `nodes`, in this order (parents first, every parent included).

    Not for drawn drafts: leaving out a drawn token by its value is a bias (see `Draft.draft_probs`). Raises ValueError for one.
    """
    if draft.draft_probs is not None:
        raise ValueError("a drawn draft cannot be reordered or reduced")
    parents = draft.parents if draft.parents is not None else range(-1, len(draft) - 1)
    place = {-1: -1} | {old: new for new, old in enumerate(nodes)}
    return Draft(
        tuple(draft.tokens[i] for i in nodes),
        tuple(place[parents[i]] for i in nodes),
        confidences=tuple(draft.confidences[i] for i in nodes) if draft.confidences else (),
        drafter=draft.drafter,
    )


def merge(drafts: Sequence[Draft], name: str, max_tokens: int) -> Draft:
    """The union of point-mass drafts as one tree (SpecInfer 2305.09781, keyed by parent and token, so branches never collide).

    A node that several drafts propose keeps the largest of their confidences; drafts without any get one that fits look-ups. With
    more than `max_tokens` nodes the most probable paths stay. Raises ValueError for drawn drafts.
    """
    tokens: list[int] = []
    parents: list[int] = []
    confidences: list[float] = []
    index: dict[tuple[int, int], int] = {}
    for draft in drafts:
        if draft.draft_probs is not None:
            raise ValueError("only point-mass drafts can be merged")
        above = draft.parents if draft.parents is not None else range(-1, len(draft) - 1)
        place = {-1: -1}
        for i, token in enumerate(draft.tokens):
            key = (place[above[i]], token)
            confidence = draft.confidences[i] if draft.confidences else _UNRATED
            if key not in index:
                index[key] = len(tokens)
                tokens.append(token)
                parents.append(key[0])
                confidences.append(confidence)
            place[i] = index[key]
            confidences[place[i]] = max(confidences[place[i]], confidence)
    union = Draft(tuple(tokens), tuple(parents), confidences=tuple(confidences), drafter=name)
    if len(union) <= max_tokens:
        return union
    return select(union, top_nodes(path_scores(parents, confidences), max_tokens))

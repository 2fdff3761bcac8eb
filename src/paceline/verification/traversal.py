"""Traversal verification: bottom-up through a sampled tree, the counterpart of block verification."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.records import Draft, Verdict
from paceline.sampling import CounterRandom, Purpose, draw
from paceline.verification.base import Rule, TargetRows
from paceline.verification.residual import draft_rows, is_empty, probability, residual, sibling_row
from paceline.verification.walk import child_lists, outcome_labels

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class _Node:
    """A node on the path under trial (index -1: the pending token)."""

    index: int
    weight: float
    """Chance to accept the path to this node if it is offered now."""
    left: torch.Tensor
    """[V] what the target has left for the next token, after the children that were rejected."""
    untried: Iterator[int]
    drawn_from: torch.Tensor | None = None
    """[W] distribution of the child under trial; None when there is nothing to draw."""
    earlier: list[int] = field(default_factory=list)
    """Tokens of rejected children."""

    def reject_child(self, token: int) -> None:
        """The child under trial and its whole subtree are out."""
        if self.drawn_from is not None:
            rest, mass = residual(self.left, self.drawn_from, self.weight)
            total = mass + 1.0 - self.weight
            self.weight = mass / total if total > 0.0 else 1.0
            if not is_empty(mass, rest):
                self.left = rest / mass
        self.earlier.append(token)


class TraversalRule(Rule):
    """Tries the deepest nodes first: a node is offered only after everything below it was rejected.

    A child x inherits weight min(1, w p(x) / q(x)). When it and its subtree are rejected, with R = max(w p - q, 0) of sum s, its
    parent's p becomes R / s and the parent's weight s / (s + 1 - w). A node without children left is accepted with
    probability w. Subtrees that are not visited cost nothing. On a chain it is block verification.
    Source: 2505.12398; siblings are drawn with or without replacement, as `Draft.without_replacement` says.
    """

    name = "traversal"
    needs_draft_probs = True

    def verify(self, target: TargetRows, draft: Draft, random: CounterRandom, position: int) -> Verdict:
        draft_rows(draft)
        children = child_lists(draft)
        trial = [_Node(-1, 1.0, target.probs(0), iter(children[0]))]
        while True:
            node = trial[-1]
            child = next(node.untried, None)
            if child is not None:
                weight = _open_child(node, draft, child)
                if weight > 0.0:
                    trial.append(_Node(child, weight, target.probs(child + 1), iter(children[child + 1])))
                    continue
            elif node.index < 0 or random.uniform(position, Purpose.ACCEPT, node.index) < node.weight:
                break
            else:
                child = trial.pop().index
            trial[-1].reject_child(draft.tokens[child])
        path = [step.index for step in trial[1:]]
        purpose = Purpose.RESIDUAL if node.earlier else Purpose.TARGET
        last = draw(node.left, random.uniform(position + len(path), purpose))
        return Verdict(tuple(path), (*(draft.tokens[i] for i in path), last), outcome_labels(draft, path))


def _open_child(node: _Node, draft: Draft, child: int) -> float:
    """Put a child under trial and return its weight; 0 when it cannot be accepted."""
    node.drawn_from = sibling_row(draft, child, node.earlier)
    if node.drawn_from is None:
        return 0.0
    token = draft.tokens[child]
    q = probability(node.drawn_from, token)
    return min(1.0, node.weight * probability(node.left, token) / q) if q > 0.0 else 0.0

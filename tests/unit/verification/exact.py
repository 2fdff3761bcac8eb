"""Exact laws of the real rules: every outcome of a run with its probability, with the uniforms integrated analytically.

A `Coin` stands for a uniform number of which only an interval is known. A comparison with it runs both ways, in turn, each with its
conditional probability. The same key gives the same coin, so a rule that used a number twice would show its bias.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import pytest
import torch

from paceline.records import Draft
from paceline.sampling import Purpose
from paceline.verification import match, residual, rrs, traversal
from paceline.verification.base import Rule, TargetRows

Outcome = TypeVar("Outcome", bound=Hashable)
Law = dict[tuple[int, ...], float]
Rows = Callable[[tuple[int, ...]], torch.Tensor]
"""Distribution of the next token after a prefix, [V] float64."""


class Coin:
    def __init__(self, branch: Branch, scale: float = 1.0, interval: list[float] | None = None) -> None:
        self._branch = branch
        self._scale = scale
        self._interval = interval if interval is not None else [0.0, 1.0]

    def __mul__(self, factor: float) -> Coin:
        return Coin(self._branch, self._scale * factor, self._interval)

    def __lt__(self, bound: float) -> bool:
        low, high = self._interval
        threshold = min(max(bound / self._scale, low), high)
        below = self._branch.choose((threshold - low) / (high - low))
        self._interval[:] = [low, threshold] if below else [threshold, high]
        return below


class Branch:
    """One run: replays decisions that were made before, then takes the first possible ones and notes the others."""

    def __init__(self, decisions: list[bool]) -> None:
        self.decisions = list(decisions)
        self._next = 0
        self.probability = 1.0
        self.others: list[list[bool]] = []
        self._coins: dict[tuple[int, int, int], Coin] = {}

    def choose(self, probability: float) -> bool:
        if self._next == len(self.decisions):
            if 0.0 < probability < 1.0:
                self.others.append([*self.decisions, False])
            self.decisions.append(probability > 0.0)
        chosen = self.decisions[self._next]
        self._next += 1
        self.probability *= probability if chosen else 1.0 - probability
        return chosen

    def uniform(self, position: int, purpose: Purpose, index: int = 0) -> Coin:
        return self._coins.setdefault((position, purpose, index), Coin(self))


def branching_draw(weights: torch.Tensor, coin: Coin) -> int:
    values = (weights / weights.sum()).cumsum(0).tolist()
    support = weights.nonzero()[:, 0].tolist()
    return next((token for token in support[:-1] if coin < values[token]), support[-1])


@contextmanager
def branching_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (match, residual, rrs, traversal):
            patch.setattr(module, "draw", branching_draw)
        yield


def outcomes(run: Callable[[Branch], Outcome]) -> dict[Outcome, float]:
    """Probability of each result of `run` over all its random decisions."""
    law: dict[Outcome, float] = defaultdict(float)
    todo: list[list[bool]] = [[]]
    with branching_draws():
        while todo:
            branch = Branch(todo.pop())
            result = run(branch)
            law[result] += branch.probability
            todo.extend(branch.others)
    return law


class TableRows(TargetRows):
    """Rows given outright, one for each node."""

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        self._rows = rows

    def argmax(self, row: int) -> int:
        return int(self._rows[row].argmax())

    def probs(self, row: int) -> torch.Tensor:
        return self._rows[row]


def dist(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def chain_draft(tokens: Sequence[int], draft_probs: Sequence[torch.Tensor]) -> Draft:
    return Draft(tuple(tokens), draft_probs=torch.stack(list(draft_probs)) if draft_probs else None)


def target_rows(draft: Draft, target: Rows, prefix: tuple[int, ...] = ()) -> TableRows:
    """The target's rows at the pending token and at every node, each after its own path."""
    paths = [prefix]
    for i, token in enumerate(draft.tokens):
        parent = i - 1 if draft.parents is None else draft.parents[i]
        paths.append((*paths[parent + 1], token))
    return TableRows([target(path) for path in paths])


def chain_law(rule: Rule, target: Rows, draft: Rows, k: int) -> dict[tuple[int, tuple[int, ...]], float]:
    """Law of (accepted, emitted) of one round with k tokens drawn from `draft`."""

    def run(branch: Branch) -> tuple[int, tuple[int, ...]]:
        tokens: list[int] = []
        rows = []
        for j in range(k):
            rows.append(draft(tuple(tokens)))
            tokens.append(branching_draw(rows[-1], branch.uniform(0, Purpose.DRAFT, j)))
        proposal = chain_draft(tokens, rows)
        verdict = rule.verify(target_rows(proposal, target), proposal, branch, 0)
        return verdict.num_accepted, verdict.emitted

    return outcomes(run)


def tree_draft(branch: Branch, draft: Rows, shape: Sequence[int], without_replacement: bool) -> Draft:
    """A sampled tree: `shape[d]` children at every node of depth d, siblings drawn in turn from the node's row."""
    tokens: list[int] = []
    parents: list[int] = []
    rows: list[torch.Tensor] = []
    frontier: list[tuple[int, tuple[int, ...]]] = [(-1, ())]
    for width in shape:
        following = []
        for node, path in frontier:
            row = draft(path)
            left = row.clone()
            for _ in range(width):
                if float(left.sum()) <= 0.0:
                    break
                token = branching_draw(left, branch.uniform(0, Purpose.DRAFT, len(tokens)))
                if without_replacement:
                    left[token] = 0.0
                following.append((len(tokens), (*path, token)))
                tokens.append(token)
                parents.append(node)
                rows.append(row)
        frontier = following
    return Draft(tuple(tokens), tuple(parents), torch.stack(rows), without_replacement=without_replacement)


def tree_law(rule: Rule, target: Rows, make: Callable[[Branch], Draft]) -> dict[tuple[int, tuple[int, ...]], float]:
    """Law of (accepted, emitted) of one round with a tree."""

    def run(branch: Branch) -> tuple[int, tuple[int, ...]]:
        proposal = make(branch)
        verdict = rule.verify(target_rows(proposal, target), proposal, branch, 0)
        return verdict.num_accepted, verdict.emitted

    return outcomes(run)


def extend(law: dict[tuple[int, tuple[int, ...]], float], target: Rows, length: int) -> Law:
    """Law of the first `length` tokens when the target goes on by itself after each outcome."""
    extended: Law = defaultdict(float)
    for (_, emitted), probability in law.items():
        _spread(extended, emitted, probability, target, length)
    return extended


def target_law(target: Rows, length: int) -> Law:
    law: Law = defaultdict(float)
    _spread(law, (), 1.0, target, length)
    return law


def _spread(law: Law, prefix: tuple[int, ...], probability: float, target: Rows, length: int) -> None:
    if len(prefix) >= length:
        law[prefix[:length]] += probability
        return
    for token, p in enumerate(target(prefix).tolist()):
        if p > 0.0:
            _spread(law, (*prefix, token), probability * p, target, length)


def total_variation(a: Law, b: Law) -> float:
    return sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in {*a, *b}) / 2


def first_token_law(law: dict[tuple[int, tuple[int, ...]], float], size: int) -> list[float]:
    marginal = [0.0] * size
    for (_, emitted), probability in law.items():
        marginal[emitted[0]] += probability
    return marginal


def mean_accepted(law: dict[tuple[int, tuple[int, ...]], float]) -> float:
    return sum(accepted * probability for (accepted, _), probability in law.items())


KINDS = ("dense", "sparse", "equal", "disjoint", "point")


def random_models(seed: int, kind: str, size: int) -> tuple[Rows, Rows]:
    """Context-dependent (target, draft) over `size` tokens, rows drawn from Dirichlet(0.8).

    sparse: zeros in both. equal: p = q. disjoint: no shared support. point: each draft row has a single token.
    """

    def rows(which: int) -> Rows:
        table: dict[tuple[int, ...], torch.Tensor] = {}

        def row(prefix: tuple[int, ...]) -> torch.Tensor:
            if prefix not in table:
                random = np.random.default_rng([seed, which, len(prefix), *prefix])
                values = random.dirichlet([0.8] * size)
                mask = _mask(kind, which, size, random)
                values = np.where(mask, values + 1e-3, 0.0)
                table[prefix] = torch.from_numpy(values / values.sum())
            return table[prefix]

        return row

    target = rows(0)
    return target, target if kind == "equal" else rows(1)


def _mask(kind: str, which: int, size: int, random: np.random.Generator) -> np.ndarray:
    mask = np.ones(size, dtype=bool)
    if kind == "sparse":
        mask = random.random(size) < 0.6
    elif kind == "disjoint":
        mask = (np.arange(size) < size // 2) == (which == 0)
    elif kind == "point" and which == 1:
        mask = np.arange(size) == random.integers(size)
    if not mask.any():
        mask[random.integers(size)] = True
    return mask


def constant(row: torch.Tensor) -> Rows:
    return lambda prefix: row


def approx(values: Iterable[float], tolerance: float = 1e-12) -> object:
    return pytest.approx(list(values), abs=tolerance, rel=0)

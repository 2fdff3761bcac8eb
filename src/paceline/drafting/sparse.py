"""A distribution over a few tokens: shaped, drawn from and described without touching the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from paceline.config import SamplingParams
from paceline.records import DraftFeatures


@dataclass(frozen=True, slots=True)
class SparseRow:
    """Probabilities of some tokens, most probable first; they need not sum to one."""

    ids: tuple[int, ...]
    probs: tuple[float, ...]

    def prob(self, token: int) -> float:
        """Probability of a token that the row holds."""
        return self.probs[self.ids.index(token)]

    def shaped(self, sampling: SamplingParams) -> SparseRow:
        """The row after temperature, top-k, top-p and min-p, summing to one. Greedy: only renormalised.

        As in `sampling.to_probs`, tokens that tie with the last one that a filter keeps are kept.
        """
        if sampling.greedy or sampling.temperature == 1.0:
            weights = list(self.probs)
        else:
            peak = self.probs[0]
            weights = [(prob / peak) ** (1.0 / max(sampling.temperature, 1e-6)) for prob in self.probs]
        if not sampling.greedy:
            weights = _filtered(weights, sampling)
        total = math.fsum(weights)
        kept = [(token, weight / total) for token, weight in zip(self.ids, weights, strict=True) if weight > 0.0]
        return SparseRow(tuple(token for token, _ in kept), tuple(prob for _, prob in kept))

    def draw(self, u: float, taken: Collection[int] = ()) -> int:
        """Inverse of the cumulative distribution at u in [0, 1), tokens in the order of their ids, without those taken.

        At least one token must be left.
        """
        left = sorted((token, prob) for token, prob in zip(self.ids, self.probs, strict=True) if token not in taken)
        rest = u * math.fsum(prob for _, prob in left)
        for token, prob in left:
            rest -= prob
            if rest < 0.0:
                return token
        return left[-1][0]

    def features(self, position: int, token: int) -> DraftFeatures:
        """Evidence on a token drawn from this row (which sums to one)."""
        second = self.probs[1] if len(self.probs) > 1 else 0.0
        entropy = -math.fsum(prob * math.log(prob) for prob in self.probs if prob > 0.0)
        return DraftFeatures(position, self.probs[0], self.prob(token), entropy, self.probs[0] - second)


def _filtered(weights: list[float], sampling: SamplingParams) -> list[float]:
    """Zero the weights (in descending order) that top-k, top-p and min-p remove."""
    if 0 < sampling.top_k < len(weights):
        floor = weights[sampling.top_k - 1]
        weights = [w if w >= floor else 0.0 for w in weights]
    if sampling.top_p < 1.0:
        need, mass = sampling.top_p * math.fsum(weights), 0.0
        for floor in weights:
            mass += floor
            if mass >= need:
                break
        weights = [w if w >= floor else 0.0 for w in weights]
    if sampling.min_p > 0.0:
        weights = [w if w >= sampling.min_p * weights[0] else 0.0 for w in weights]
    return weights

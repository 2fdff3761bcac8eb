"""Temperature scaling of a draft's confidence, fitted while it runs (2004.07453, section 3; the on-line fit is ours).

A classifier that leaves early is surer than it is right. Dividing its logits by one fitted temperature mends that: the one with
the least negative log-likelihood of what the target said. As 1 / temperature the problem is convex, and one Newton step an
observation with the curvature seen so far follows its solution without keeping any row.
"""

from __future__ import annotations

import math

import torch

_FLOOR = -1e4
"""Stands in for logits of impossible tokens, below the row's largest."""


class Calibration:
    """The temperature of one exit.

    prior: curvature that the first guess (temperature 1) counts for. memory: weight of older observations after each new one.
    """

    def __init__(self, prior: float = 30.0, memory: float = 0.9995, reach: float = 20.0) -> None:
        """reach: largest temperature; the smallest is its inverse."""
        self._inverse = 1.0
        self._curvature = prior
        self._memory = memory
        self._reach = reach
        self.count = 0
        """Observations so far."""

    @property
    def temperature(self) -> float:
        return 1.0 / self._inverse

    def learn(self, row: torch.Tensor, token: int) -> None:
        """Count one position. row: [V] float32 logits that the draft saw; token: what the target said there."""
        at_token = float(row[token])
        if not math.isfinite(at_token):
            return  # impossible for the draft (padding, bans): no temperature explains it
        largest = float(row.max())
        scores = (row - largest).clamp_min(_FLOOR)
        probs = torch.softmax(scores * self._inverse, dim=-1)
        mean = float(torch.dot(probs, scores))
        variance = float(torch.dot(probs, (scores - mean).square()))
        self._curvature = self._memory * self._curvature + variance
        step = (mean - (at_token - largest)) / self._curvature
        self._inverse = min(max(self._inverse - step, 1.0 / self._reach), self._reach)
        self.count += 1

    def confidence(self, row: torch.Tensor) -> float:
        """Largest probability of [V] float32 logits at the fitted temperature."""
        return 1.0 / float(torch.exp((row - row.max()) * self._inverse).sum())

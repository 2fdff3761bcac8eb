"""From a draft's own confidence to the chance of acceptance: online logistic regression, one for each drafter.

P(accept at position j) = sigmoid(w * logit(max q_j) + b_j), as in vLLM's online acceptance estimator (7.3 of the control
notes). The feature is a function of the draft *distribution* alone. Deviations: the fit runs over a ring of recent labels,
so that drift fades, and is regularised towards its start, so that a few labels cannot turn it over.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from paceline.control.acceptance import POSITIONS
from paceline.control.bank import HICCUP
from paceline.records import StepRecord

_CLAMP = 40.0
_LEAST = math.exp(-_CLAMP)
_SLOPE, _INTERCEPT = 0.5, -0.2
_BINS = 10


class Bin(NamedTuple):
    """One bar of a reliability diagram."""

    predicted: float
    """Mean predicted chance."""
    accepted: float
    """Mean label."""
    labels: int


def _feature(max_prob: float) -> float:
    if max_prob < _LEAST:
        return -_CLAMP
    return math.log(max_prob / (1.0 - max_prob)) if max_prob < 1.0 else _CLAMP


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _bounded(step: float) -> float:
    # Newton may overshoot where almost all labels agree.
    return min(max(step, -1.0), 1.0)


class ConfidenceModel:
    """One drafter's calibration.

    memory: labels that the fit looks back on; every: rounds between two Newton steps (the first ones come sooner); ridge:
    regularisation a label.
    """

    def __init__(self, memory: int = 256, every: int = 64, ridge: float = 1e-3) -> None:
        self._ring: deque[tuple[float, int, float]] = deque(maxlen=memory)
        self._every = every
        self._ridge = ridge
        self._wait = min(4, every)
        self._rounds = 0
        self._slope = _SLOPE
        self._intercepts = [_INTERCEPT] * POSITIONS
        self._bins = [[0.0, 0.0, 0] for _ in range(_BINS)]
        self.labels = 0
        """Labels seen in all."""

    def chance(self, position: int, max_prob: float) -> float:
        """Chance that the token drafted at `position` (from 1) is accepted, given that those before it were."""
        slot = position - 1 if position < POSITIONS else POSITIONS - 1
        return _sigmoid(self._slope * _feature(max_prob) + self._intercepts[slot])

    def update(self, confidences: Sequence[float], labels: Sequence[float]) -> None:
        """Learn from one round: largest draft probabilities and labels of the observed positions 1, 2, ..."""
        for j, (max_prob, label) in enumerate(zip(confidences, labels, strict=False)):
            slot = j if j < POSITIONS else POSITIONS - 1
            feature = _feature(max_prob)
            predicted = _sigmoid(self._slope * feature + self._intercepts[slot])
            entry = self._bins[int(predicted * _BINS) if predicted < 1.0 else _BINS - 1]
            entry[0] += predicted
            entry[1] += label
            entry[2] += 1
            self._ring.append((feature, slot, label))
        self.labels += min(len(confidences), len(labels))
        self._rounds += 1
        if self._rounds >= self._wait and self._ring:
            steps = 3 if self._wait < 32 else 1  # a step is bounded, and the start may be far off
            self._rounds, self._wait = 0, min(2 * self._wait, self._every)
            for _ in range(steps):
                self._newton_step()

    def reliability(self) -> list[Bin]:
        """Predicted against observed acceptance, by predicted chance; empty bins are left out."""
        return [Bin(p / n, y / n, int(n)) for p, y, n in self._bins if n]

    def snapshot(self) -> dict[str, Any]:
        """The fitted curve as plain data, for `restore`."""
        return {"slope": self._slope, "intercepts": list(self._intercepts), "labels": self.labels}

    def restore(self, data: dict[str, Any]) -> None:
        """Begin with a stored curve. Raises KeyError, TypeError or ValueError on data that `snapshot` did not write."""
        intercepts = [float(x) for x in data["intercepts"]]
        if len(intercepts) != POSITIONS:
            raise ValueError(f"confidence curve: {len(intercepts)} intercepts, expected {POSITIONS}")
        self._slope, self._intercepts, self.labels = float(data["slope"]), intercepts, int(data["labels"])

    def _newton_step(self) -> None:
        """One damped step on slope and intercepts; the Hessian is an arrowhead, so it is solved in O(positions)."""
        ridge = self._ridge * len(self._ring)
        gradient_w, curve_ww = ridge * (_SLOPE - self._slope), ridge
        gradient = [ridge * (_INTERCEPT - b) for b in self._intercepts]
        curve_bb = [ridge] * POSITIONS
        curve_wb = [0.0] * POSITIONS
        for feature, slot, label in self._ring:
            p = _sigmoid(self._slope * feature + self._intercepts[slot])
            error, weight = label - p, p * (1.0 - p)
            gradient_w += error * feature
            gradient[slot] += error
            curve_ww += weight * feature * feature
            curve_bb[slot] += weight
            curve_wb[slot] += weight * feature
        schur = curve_ww - sum(c * c / h for c, h in zip(curve_wb, curve_bb, strict=True))
        right = gradient_w - sum(c * g / h for c, g, h in zip(curve_wb, gradient, curve_bb, strict=True))
        damping = len(self._ring) / (len(self._ring) + 50.0)
        step = _bounded(damping * right / max(schur, 1e-9))
        self._slope = max(0.0, self._slope + step)
        for j in range(POSITIONS):
            self._intercepts[j] += _bounded((damping * gradient[j] - curve_wb[j] * step) / curve_bb[j])


class Delivered:
    """What a drafter with a stop rule delivered against what was expected of it, as one factor on its merit."""

    __slots__ = ("_emitted", "_expected_emitted", "_expected_seconds", "_seconds", "factor")

    def __init__(self) -> None:
        self._emitted = self._expected_emitted = self._seconds = self._expected_seconds = 0.0
        self.factor = 1.0

    def update(self, record: StepRecord, seconds: float) -> None:
        keep = 0.98
        self._emitted = keep * self._emitted + record.num_emitted
        self._expected_emitted = keep * self._expected_emitted + record.expected_emitted
        self._seconds = keep * self._seconds + min(seconds, HICCUP * record.expected_seconds)
        self._expected_seconds = keep * self._expected_seconds + record.expected_seconds
        if self._expected_emitted > 10.0 and self._seconds > 0.0:
            self.factor = self._emitted / self._expected_emitted * self._expected_seconds / self._seconds


@dataclass(slots=True)
class Calibrated:
    """A drafter that states its confidence."""

    model: ConfidenceModel = field(default_factory=ConfidenceModel)
    delivered: Delivered = field(default_factory=Delivered)
    asks: bool = False
    """It calls `keep_drafting`, so that a stop rule takes effect."""

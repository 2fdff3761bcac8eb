"""`dsde`: a draft length from how far and how unsteadily draft and target have differed.

Source: DSDE, arXiv 2509.01083 (formulas known from the paper). Deviations, all ours: the paper reads KL(p, q) of every verified
position; a controller here may see only the exact acceptance probability, so TV = 1 - acceptance and, by Pinsker, the
smallest divergence that allows it, 2 * TV^2, stands for the KL. The paper calibrates on the prompt; here the first rounds
at full length do. Lossless: only finished rounds are used.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.control.base import Controller, RoundContext
from paceline.control.rounds import plan_first, require, require_count, require_length, require_number
from paceline.costs import CostTable
from paceline.records import Plan, StepRecord


def scale_factor(mean_divergence: float) -> float:
    """SF = exp(2 * mean divergence of the last round) - 1; capped where the exponential would overflow."""
    return math.exp(min(2 * mean_divergence, 50.0)) - 1.0


def variance_ratio(divergences: Sequence[float], short: int = 10, long: int = 30, decay: float = 0.85) -> float:
    """WVIR: exponentially weighted variance of the last `short` values over that of the last `long`; 1 where it is 0 / 0."""
    recent, whole = (_weighted_variance(divergences[-n:], decay) for n in (short, long))
    return recent / whole if whole > 1e-12 else 1.0


def _weighted_variance(values: Sequence[float], decay: float) -> float:
    if not values:
        return 0.0
    weights = [decay**age for age in range(len(values) - 1, -1, -1)]
    total = sum(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    return sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / total


def longest(accepted_max: float, mean_divergence: float, max_divergence: float) -> float:
    """SLmax from the calibration: longest accepted run, stretched by mean over largest divergence."""
    return accepted_max * (1 + mean_divergence / (max_divergence + 1e-9))


def draft_length(scale: float, ratio: float, k_min: float, k_max: float) -> float:
    """k between k_min and k_max, shrinking with the penalty scale * ratio; k_min where the penalty exceeds 1."""
    penalty = scale * ratio
    return k_min if penalty > 1 else (1 - penalty) * (k_max - k_min) + k_min


@dataclass(frozen=True, slots=True, kw_only=True)
class DsdeOptions:
    """Options of `dsde`; windows, decay and k_min are the published ones."""

    k_min: int = 2
    k_max: int = 12
    """Length during calibration, and bound of SLmax (ours)."""
    short: int = 10
    long: int = 30
    decay: float = 0.85
    calibration_rounds: int = 8
    """Drafting rounds before the formula is used (ours)."""

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_length("k_min", self.k_min, 1)
        require(self.k_min <= self.k_max, "k_min", self.k_min, f"exceeds k_max = {self.k_max}")
        require_count("short", self.short)
        require_count("long", self.long, self.short)
        require_count("calibration_rounds", self.calibration_rounds)
        require_number("decay", self.decay, 0.0, 1.0)


@dataclass(slots=True)
class _Request:
    history: deque[float]
    last_mean: float = 0.0
    length: float = 0.0


@dataclass(slots=True)
class _Calibration:
    rounds: int = 0
    accepted_max: int = 0
    divergences: list[float] = field(default_factory=list)


class Dsde(Controller):
    """One length per request and round; in a batch no length exceeds the mean of all, so that nobody straggles."""

    name = "dsde"
    options_type = DsdeOptions

    def __init__(self, options: DsdeOptions, costs: CostTable) -> None:
        self.options = options
        self._calibration = _Calibration()
        self._longest = float(options.k_max)
        self._requests: dict[int, _Request] = {}

    def _request(self, request_id: int) -> _Request:
        fresh = _Request(deque(maxlen=self.options.long))
        return self._requests.setdefault(request_id, fresh)

    def plan(self, context: RoundContext) -> Plan:
        o, request = self.options, self._request(context.request_id)
        if self._calibration.rounds < o.calibration_rounds:
            return plan_first(context, o.k_max, "calibration")
        ratio = variance_ratio(list(request.history), o.short, o.long, o.decay)
        request.length = draft_length(scale_factor(request.last_mean), ratio, o.k_min, self._longest)
        length = request.length
        if context.batch_size > 1:
            length = min(length, sum(r.length for r in self._requests.values()) / len(self._requests))
        length = max(length, o.k_min)
        return plan_first(context, round(length), f"divergence {request.last_mean:.3f}, variance ratio {ratio:.2f}")

    def observe(self, record: StepRecord) -> None:
        divergences = [2 * (1 - a) ** 2 for a in record.labels]
        if not divergences or record.num_drafted == 0:
            return
        request = self._request(record.request_id)
        request.history.extend(divergences)
        request.last_mean = sum(divergences) / len(divergences)
        self._calibrate(record.num_accepted, divergences)

    def _calibrate(self, accepted: int, divergences: list[float]) -> None:
        seen = self._calibration
        if seen.rounds >= self.options.calibration_rounds:
            return
        seen.rounds += 1
        seen.accepted_max = max(seen.accepted_max, accepted)
        seen.divergences += divergences
        mean = sum(seen.divergences) / len(seen.divergences)
        wanted = longest(seen.accepted_max, mean, max(seen.divergences))
        self._longest = min(max(wanted, self.options.k_min), self.options.k_max)

    def finish(self, request_id: int) -> None:
        self._requests.pop(request_id, None)

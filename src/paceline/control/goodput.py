"""`goodput`: the draft length with the most expected tokens a second, from one smoothed acceptance rate and measured costs.

Source: SmartSpec / TurboSpec, arXiv 2406.14066 and the vLLM prototype (formula, smoothing and start known). Its known limits are
kept: one rate for all positions and requests, and nothing is learnt while it decodes plainly. Lossless: the length depends
on finished rounds and costs alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import Controller, RoundContext, longest_outlook
from paceline.control.rounds import BatchTally, RoundCosts, plan_first, require_length, require_number
from paceline.costs import CostTable
from paceline.records import Plan, StepRecord


def expected_emitted(alpha: float, num_draft: int) -> float:
    """E[emitted tokens] of k drafted ones with i.i.d. acceptance: (1 - alpha^(k+1)) / (1 - alpha); k + 1 at alpha = 1."""
    return num_draft + 1.0 if alpha >= 1.0 else (1 - alpha ** (num_draft + 1)) / (1 - alpha)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputOptions:
    """Options of `goodput`; decay and start are the published ones."""

    k_max: int = 16
    start: float = 0.7
    """First acceptance rate."""
    decay: float = 0.85
    """Weight of the past in the rate."""

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_number("start", self.start, 0.0, 1.0)
        require_number("decay", self.decay, 0.0, 1.0)


class Goodput(Controller):
    """Scans all lengths, plain decoding included: costs have steps, so the first decrease proves nothing."""

    name = "goodput"
    options_type = GoodputOptions

    def __init__(self, options: GoodputOptions, costs: CostTable) -> None:
        self.options = options
        self._costs = RoundCosts(costs, options.k_max)
        self.alpha = options.start
        self._tally = BatchTally()

    def plan(self, context: RoundContext) -> Plan:
        outlook = longest_outlook(context)
        if outlook is None:
            return Plan(None, 0, "nothing to draft")
        seconds = self._costs.seconds(context, outlook.drafter)
        lengths = range(min(self.options.k_max, context.max_draft, outlook.available) + 1)
        best = max(lengths, key=lambda k: expected_emitted(self.alpha, k) / seconds[k])
        return plan_first(context, best, f"acceptance rate {self.alpha:.2f}")

    def observe(self, record: StepRecord) -> None:
        sums = self._tally.add(record)
        if sums is not None and sums[1] > 0:
            self.alpha = self.options.decay * self.alpha + (1 - self.options.decay) * sums[0] / sums[1]

"""`specdecpp`: stop when some drafted token is probably rejected.

Source: SpecDec++, arXiv 2405.19715. Known: the optimal stop is a threshold on R = 1 - product of acceptance probabilities; the
threshold 0.3 and lengths 2 to 20 of the evaluation recipe. Deviation, ours: the paper's head reads the draft model's
hidden state; this one is logistic in the draft's probabilities, fitted by our own tool, and so works with any draft.
The built-in heads were fitted on real traces of the default model's own drafts (`benchmarks/fit_heads.py`): for another pair
record one and fit a head. Lossless: the token at which it stops is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import RoundContext
from paceline.control.heads import HeadSet, LogisticHead, shipped
from paceline.control.rounds import StopRule, require, require_length, require_number
from paceline.costs import CostTable
from paceline.records import DraftFeatures, Plan


def stop_threshold(draft_cost: float, verify_cost: float, run_value: float = 0.0) -> float:
    """(c2 + d) / (c1 + c2 + d): continuing pays while R is under this. Costs in one unit; d is the extra worth of a run."""
    return (verify_cost + run_value) / (draft_cost + verify_cost + run_value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecDecPpOptions:
    """Options of `specdecpp`."""

    k_min: int = 2
    k_max: int = 20
    threshold: float = 0.3
    """Stop when the chance that some drafted token is rejected exceeds this."""
    lag: bool = False
    """True: token n is judged only at step n + 1, as where the head reads the hidden state of the token fed."""
    head: str = ""
    """JSON file of a fitted head, or of one for each kind of drafter; empty: the built-in ones (see their notes)."""

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_length("k_min", self.k_min, 1)
        require(self.k_min <= self.k_max, "k_min", self.k_min, f"exceeds k_max = {self.k_max}")
        require_number("threshold", self.threshold, 0.0, 1.0)


class SpecDecPp(StopRule):
    """Cumulative product of the head's acceptance probabilities against one threshold.

    Without confidences (n-gram drafts): fixed length `k_max`.
    """

    name = "specdecpp"
    options_type = SpecDecPpOptions

    def __init__(self, options: SpecDecPpOptions, costs: CostTable) -> None:
        super().__init__()
        self.options = options
        self.k_max = options.k_max
        self.heads = HeadSet.load(options.head) if options.head else shipped(self.name)
        self._running: dict[int, tuple[LogisticHead, float]] = {}
        """By request: the head of the round's drafter, and the chance that nothing was rejected so far."""

    def plan(self, context: RoundContext) -> Plan:
        plan = super().plan(context)
        self._running[context.request_id] = self.heads.of(plan.drafter or ""), 1.0
        return plan

    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        head, before = self._running[request_id]
        after = before * head.probability(features)
        self._running[request_id] = head, after
        judged = before if self.options.lag else after
        return features.position < self.options.k_min or 1 - judged <= self.options.threshold

    def finish(self, request_id: int) -> None:
        super().finish(request_id)
        self._running.pop(request_id, None)

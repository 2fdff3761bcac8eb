"""`disco`: a classifier decides after each token whether another one follows.

Source: DISCO, arXiv 2405.04304. Known: a small classifier per draft token against a tuned threshold. Not found: its inputs; ours
are the largest and second-largest draft probability, entropy, position and the last round's acceptance rate. The built-in heads
were fitted on real traces of the default model's own drafts (`benchmarks/fit_heads.py`): for another pair record one and fit a
head. Lossless: the token at which it stops is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import RoundContext
from paceline.control.heads import ANY, HeadSet, LogisticHead, shipped
from paceline.control.rounds import StopRule, require_length, require_number
from paceline.costs import CostTable
from paceline.records import DraftFeatures, Plan, StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoOptions:
    """Options of `disco`."""

    k_max: int = 20
    threshold: float = 0.8
    """Go on while the chance of acceptance is at least this. The paper tunes it on a calibration set; 0.8 is ours: on
    replayed traces of drafts of middling quality higher was better, for close copies of the target it made no difference."""
    head: str = ""
    """JSON file of a fitted head, or of one for each kind of drafter; empty: the built-in ones (see their notes)."""

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_number("threshold", self.threshold, 0.0, 1.0)


class Disco(StopRule):
    """Go on while the head expects the token just drawn to be accepted.

    Without confidences (n-gram drafts): fixed length `k_max`.
    """

    name = "disco"
    options_type = DiscoOptions

    def __init__(self, options: DiscoOptions, costs: CostTable) -> None:
        super().__init__()
        self.options = options
        self.k_max = options.k_max
        self.heads = HeadSet.load(options.head) if options.head else shipped(self.name)
        self._head: dict[int, LogisticHead] = {}
        """By request: the head of the round's drafter."""
        self._recent: dict[int, float] = {}

    def plan(self, context: RoundContext) -> Plan:
        plan = super().plan(context)
        self._head[context.request_id] = self.heads.of(plan.drafter or ANY)
        return plan

    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        return self._head[request_id].probability(features, self._recent.get(request_id, 1.0)) >= self.options.threshold

    def observe(self, record: StepRecord) -> None:
        self.seen(record)
        if record.num_drafted and not record.truncated:
            self._recent[record.request_id] = record.num_accepted / record.num_drafted

    def finish(self, request_id: int) -> None:
        super().finish(request_id)
        self._recent.pop(request_id, None)
        self._head.pop(request_id, None)

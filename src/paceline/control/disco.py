"""`disco`: a classifier decides after each token whether another one follows.

Source: DISCO, arXiv 2405.04304. Known: a small classifier per draft token against a tuned threshold. Not found: its inputs; ours
are the largest and second-largest draft probability, entropy, position and the last round's acceptance rate. The
built-in coefficients come from synthetic rounds, not from a real pair: fit a head from a trace of the pair in use. Lossless: the
token at which it stops is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.heads import LogisticHead
from paceline.control.rounds import StopRule, require_length, require_number
from paceline.costs import CostTable
from paceline.records import DraftFeatures, StepRecord

DEFAULT_HEAD = LogisticHead(
    inputs=("max_prob", "second_prob", "entropy", "position", "recent"),
    weights=(-1.104, 2.462, -2.075, 0.095, 0.454),
    bias=3.083,
    note="synthetic: `study.trace.fit_head` on regimes confident, sampled, mid and low, 8-token drafts; not on a real pair yet",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoOptions:
    """Options of `disco`."""

    k_max: int = 20
    threshold: float = 0.8
    """Go on while the chance of acceptance is at least this. The paper tunes it on a calibration set; 0.8 is ours, a good value
    over the synthetic regimes."""
    head: str = ""
    """JSON file of a fitted head; empty: the built-in one (see its note)."""

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
        self.head = LogisticHead.load(options.head) if options.head else DEFAULT_HEAD
        self._recent: dict[int, float] = {}

    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        return self.head.probability(features, self._recent.get(request_id, 1.0)) >= self.options.threshold

    def observe(self, record: StepRecord) -> None:
        self.seen(record)
        if record.num_drafted and not record.truncated:
            self._recent[record.request_id] = record.num_accepted / record.num_drafted

    def finish(self, request_id: int) -> None:
        super().finish(request_id)
        self._recent.pop(request_id, None)

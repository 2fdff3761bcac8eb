"""`adasd_like`: the stop side of a reconstruction of AdaSD.

Source: AdaSD, arXiv 2512.11280, of which only the abstracts and a secondary summary could be read: two thresholds, one that ends
drafting and one that accepts, both updated while decoding from token entropy and Jensen-Shannon distance. The update rules here
are **ours**, not the paper's: midpoints of two running means. This stop side is lossless: the token at which it stops is kept.

The acceptance side belongs to a verification rule, which is not lossless; the two meet in records. Rules are pure functions, so the
adaptive threshold lives here: a rule that relaxes reports `Verdict.divergence` (Jensen-Shannon distance of each observed position)
and `Verdict.relaxed`, the controller answers with `Plan.tolerance`. Under lossless rules nothing is reported and the tolerance
stays None.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from paceline.control.base import RoundContext
from paceline.control.rounds import StopRule, require_count, require_length
from paceline.costs import CostTable
from paceline.records import DraftFeatures, Plan, StepRecord


@dataclass(slots=True)
class MidpointThreshold:
    """Midpoint of the mean of a quantity over accepted and over rejected tokens; insensitive to how many there are of each."""

    min_count: int = 4
    accepted_sum: float = 0.0
    accepted_count: int = 0
    rejected_sum: float = 0.0
    rejected_count: int = 0

    def add(self, value: float, accepted: bool) -> None:
        if accepted:
            self.accepted_sum += value
            self.accepted_count += 1
        else:
            self.rejected_sum += value
            self.rejected_count += 1

    @property
    def value(self) -> float | None:
        """The threshold; None until both classes have `min_count` tokens."""
        if min(self.accepted_count, self.rejected_count) < self.min_count:
            return None
        return (self.accepted_sum / self.accepted_count + self.rejected_sum / self.rejected_count) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaSdOptions:
    """Options of `adasd_like`."""

    k_max: int = 12
    """Most tokens of a round (ours)."""
    min_count: int = 4
    """Tokens of each class before the threshold is used (ours)."""

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_count("min_count", self.min_count)


class AdaSdLike(StopRule):
    """Stop after a token whose draft entropy is above the midpoint of accepted and rejected entropies.

    Both thresholds learn from the *strict* test only: if tokens that the relaxed test let through counted as accepted, the
    tolerance would feed itself. Without confidences (n-gram drafts): fixed length `k_max`.
    """

    name = "adasd_like"
    options_type = AdaSdOptions

    def __init__(self, options: AdaSdOptions, costs: CostTable) -> None:
        super().__init__()
        self.k_max = options.k_max
        self.threshold = MidpointThreshold(options.min_count)
        self.tolerance = MidpointThreshold(options.min_count)

    def plan(self, context: RoundContext) -> Plan:
        return replace(super().plan(context), tolerance=self.tolerance.value)

    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        limit = self.threshold.value
        return limit is None or features.entropy <= limit

    def observe(self, record: StepRecord) -> None:
        accepted = record.num_accepted
        observed = accepted if record.truncated else accepted + 1
        strict = [j for j in range(observed) if j not in record.relaxed]
        features = self.seen(record)
        for threshold, values in ((self.threshold, [f.entropy for f in features]), (self.tolerance, record.divergence)):
            for j in strict:
                if j < len(values):
                    threshold.add(values[j], j < accepted)

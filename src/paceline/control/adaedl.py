"""`adaedl`: stop when an entropy-based lower bound of the acceptance probability is low.

Source: AdaEDL, arXiv 2410.18351. Known: the bound 1 - sqrt(g * H(q)) from Pinsker's inequality with KL(q, p) replaced by a
multiple of the draft's entropy, and g = 0.2. Not found: how the threshold adapts and where it starts; ours is Draft&Verify's
update from 0.4. Lossless: the token at which it stops is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paceline.control.draft_verify import ExitThreshold
from paceline.control.rounds import StopRule, require_length, require_number
from paceline.costs import CostTable
from paceline.records import DraftFeatures, StepRecord


def acceptance_bound(entropy: float, g: float = 0.2) -> float:
    """1 - sqrt(g * entropy), entropy in nats; negative where the bound says nothing."""
    return 1.0 - math.sqrt(g * max(entropy, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaEdlOptions:
    """Options of `adaedl`."""

    k_max: int = 10
    g: float = 0.2
    """Multiple of the draft entropy (nats) that stands for the unknown divergence."""
    threshold: float = 0.4
    """First threshold (our choice; short answers are sensitive to it)."""
    target: float = 0.9
    """Acceptance rate to steer to (our choice)."""
    step: float = 0.01

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_number("g", self.g, 0.0, 100.0)
        for name in ("threshold", "target", "step"):
            require_number(name, getattr(self, name), 0.0, 1.0)


class AdaEdl(StopRule):
    """Stop when the bound is under the threshold. Without confidences (n-gram drafts): fixed length `k_max`."""

    name = "adaedl"
    options_type = AdaEdlOptions

    def __init__(self, options: AdaEdlOptions, costs: CostTable) -> None:
        super().__init__()
        self.k_max = options.k_max
        self.g = options.g
        self.threshold = ExitThreshold(options.threshold, options.target, options.step)

    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        return acceptance_bound(features.entropy, self.g) >= self.threshold.value

    def observe(self, record: StepRecord) -> None:
        self.seen(record)
        if record.num_drafted and not record.truncated:
            self.threshold.update(record.num_accepted, record.num_drafted, self.k_max)

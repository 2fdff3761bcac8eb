"""`svip`: stop when the draft's entropy is high.

Source: SVIP, arXiv 2411.18462 (rule and constants known from its public code). Lossless: the token at which it stops is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paceline.control.rounds import StopRule, require_length, require_number
from paceline.costs import CostTable
from paceline.records import DraftFeatures


@dataclass(frozen=True, slots=True, kw_only=True)
class SvipOptions:
    """Options of `svip`; the defaults are the published ones."""

    k_max: int = 40
    scale: float = 0.15
    """Multiple of the entropy (nats) under the root."""
    threshold: float = 0.3
    """Stop when sqrt(scale * entropy) exceeds this: with the defaults, above 0.6 nats. Not portable across temperatures."""

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_number("scale", self.scale, 0.0, 100.0)
        require_number("threshold", self.threshold, 0.0, 100.0)


class Svip(StopRule):
    """Stateless entropy stop. Without confidences (n-gram drafts): fixed length `k_max`."""

    name = "svip"
    options_type = SvipOptions

    def __init__(self, options: SvipOptions, costs: CostTable) -> None:
        super().__init__()
        self.options = options
        self.k_max = options.k_max

    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        return math.sqrt(self.options.scale * max(features.entropy, 0.0)) <= self.options.threshold

"""`draft_verify`: stop at a low draft probability, with a threshold steered to a wanted acceptance rate.

Source: Draft&Verify, arXiv 2309.08168, adaptive exit (rule and constants known from its public code). Lossless: the token at
which it stops is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.rounds import StopRule, require_length, require_number
from paceline.costs import CostTable
from paceline.records import DraftFeatures, StepRecord


@dataclass(slots=True)
class ExitThreshold:
    """A threshold that creeps up while acceptance is under `target`, and down while it is above and drafts end early."""

    value: float
    target: float = 0.9
    step: float = 0.01
    rate_decay: float = 0.5
    threshold_decay: float = 0.9
    rate: float = 0.0
    """Smoothed accepted / drafted."""

    def update(self, accepted: int, drafted: int, k_max: int) -> None:
        """Learn from a round with `drafted` >= 1 tokens; moves at most (1 - threshold_decay) * step."""
        self.rate = self.rate_decay * self.rate + (1 - self.rate_decay) * accepted / drafted
        if self.rate < self.target:
            wanted = self.value + self.step
        elif drafted == k_max:
            wanted = self.value
        else:
            wanted = self.value - self.step
        moved = self.threshold_decay * self.value + (1 - self.threshold_decay) * wanted
        self.value = min(max(moved, 0.0), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftVerifyOptions:
    """Options of `draft_verify`; all defaults are the published ones."""

    k_max: int = 8
    threshold: float = 0.8
    """First threshold: 0.8 was used for greedy decoding, 0.5 for sampling."""
    target: float = 0.9
    """Acceptance rate to steer to."""
    step: float = 0.01
    """With the smoothing below the threshold moves by 0.001 a round, which is slow for short answers; 0.1 follows faster."""
    rate_decay: float = 0.5
    threshold_decay: float = 0.9

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        for name in ("threshold", "target", "step", "rate_decay", "threshold_decay"):
            require_number(name, getattr(self, name), 0.0, 1.0)


class DraftVerify(StopRule):
    """Stop after a token with draft probability under the threshold.

    Ours: one threshold for the engine (the published loop serves one prompt at a time). Without confidences (n-gram drafts):
    fixed length `k_max`.
    """

    name = "draft_verify"
    options_type = DraftVerifyOptions

    def __init__(self, options: DraftVerifyOptions, costs: CostTable) -> None:
        super().__init__()
        self.k_max = options.k_max
        self.threshold = ExitThreshold(options.threshold, options.target, options.step, options.rate_decay, options.threshold_decay)

    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        return features.token_prob >= self.threshold.value

    def observe(self, record: StepRecord) -> None:
        self.seen(record)
        if record.num_drafted and not record.truncated:
            self.threshold.update(record.num_accepted, record.num_drafted, self.k_max)

"""`gammatune` and `gammatune_plus`: a draft length that follows the mean accepted length.

Source: arXiv 2504.00030. The paper's own pseudo-code could not be read; the rule and its defaults are those on which two
independent ports agree. Lossless: only finished rounds are used, and the plus variant keeps the token at which it stops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paceline.control.base import Controller, RoundContext
from paceline.control.rounds import plan_first, require, require_length, require_number
from paceline.costs import CostTable
from paceline.records import DraftFeatures, Plan, StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class GammaTuneOptions:
    """Options of `gammatune`, with the ports' defaults."""

    start: int = 3
    """First draft length and first running mean."""
    eta: float = 0.3
    """Weight of the newest accepted length in the mean."""
    delta: int = 2
    """Added to the length after a fully accepted draft."""
    k_min: int = 1
    """Shortest draft; with 1 speculation is never switched off."""
    k_max: int = 10

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_length("k_min", self.k_min, 1)
        require_length("start", self.start, 1)
        require_length("delta", self.delta, 0)
        require_number("eta", self.eta, 0.0, 1.0)
        require(self.k_min <= self.start <= self.k_max, "start", self.start, f"must lie in [{self.k_min}, {self.k_max}]")


@dataclass(slots=True)
class _Length:
    k: int
    mean: float


class GammaTune(Controller):
    """All accepted: `delta` longer. Otherwise: ceil of the running mean of accepted lengths. State per request."""

    name = "gammatune"
    options_type: type[GammaTuneOptions] = GammaTuneOptions

    def __init__(self, options: GammaTuneOptions, costs: CostTable) -> None:
        self.options = options
        self._lengths: dict[int, _Length] = {}

    def _state(self, request_id: int) -> _Length:
        return self._lengths.setdefault(request_id, _Length(self.options.start, float(self.options.start)))

    def plan(self, context: RoundContext) -> Plan:
        state = self._state(context.request_id)
        return plan_first(context, state.k, f"length {state.k}, mean accepted {state.mean:.2f}")

    def observe(self, record: StepRecord) -> None:
        if record.num_drafted == 0 or record.truncated:
            return
        o, state = self.options, self._state(record.request_id)
        if record.num_accepted == record.num_drafted:
            state.k = min(o.k_max, state.k + o.delta)
        else:
            mean = (1 - o.eta) * state.mean + o.eta * record.num_accepted
            state.mean = min(max(mean, o.k_min), o.k_max)
            state.k = math.ceil(state.mean - 1e-9)

    def finish(self, request_id: int) -> None:
        self._lengths.pop(request_id, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class GammaTunePlusOptions(GammaTuneOptions):
    """Options of `gammatune_plus`."""

    threshold: float = 0.4
    """Stop after a token whose largest draft probability is under this. The paper's value was not found; ours is the 0.4 that
    transformers uses."""

    def __post_init__(self) -> None:
        GammaTuneOptions.__post_init__(self)
        require_number("threshold", self.threshold, 0.0, 1.0)


class GammaTunePlus(GammaTune):
    """GammaTune that also stops at a token the draft was unsure of (the token is kept).

    A draft cut short by its own confidence and fully accepted counts as a full acceptance, as in the plain rule (our reading).
    Without confidences (n-gram drafts) it is `gammatune`.
    """

    name = "gammatune_plus"
    options_type = GammaTunePlusOptions

    def __init__(self, options: GammaTunePlusOptions, costs: CostTable) -> None:
        super().__init__(options, costs)
        self.threshold = options.threshold

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool:
        return features.max_prob >= self.threshold

"""`exl_ema`: a moving average of accepted lengths that reads a full draft as "at least one more".

Source: exllamav3, dynamic draft tokens (rule known from its public code). Lossless: only finished rounds are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paceline.control.base import Controller, RoundContext
from paceline.control.rounds import plan_first, require_count, require_length, require_number
from paceline.costs import CostTable
from paceline.records import Plan, StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ExlEmaOptions:
    """Options of `exl_ema`."""

    k_max: int = 10
    """Longest draft, and the length before anything is known (ours: there it is the user's own setting)."""
    up: float = 1.30
    """Weight of the newest round when it raises the average; above 1 it overshoots, so that the length climbs fast."""
    down: float = 0.65
    """Weight of the newest round when it lowers the average."""
    off_below: float = 0.3
    """Drafting is skipped while the average is under this; 0 never skips."""
    probe_every: int = 16
    """While skipping, one round in so many drafts two tokens."""

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_number("up", self.up, 0.0, 2.0)
        require_number("down", self.down, 0.0, 1.0)
        require_number("off_below", self.off_below, 0.0, 63.0)
        require_count("probe_every", self.probe_every)


@dataclass(slots=True)
class _Average:
    value: float | None = None
    skipped: int = 0


class ExlEma(Controller):
    """Next length = ceil(average), one average per request; the first finished round sets it."""

    name = "exl_ema"
    options_type = ExlEmaOptions

    def __init__(self, options: ExlEmaOptions, costs: CostTable) -> None:
        self.options = options
        self._averages: dict[int, _Average] = {}

    def plan(self, context: RoundContext) -> Plan:
        o, state = self.options, self._averages.setdefault(context.request_id, _Average())
        if state.value is None:
            return plan_first(context, o.k_max, "nothing known yet")
        if state.value < o.off_below:
            state.skipped += 1
            if state.skipped < o.probe_every:
                return Plan(None, 0, f"average {state.value:.2f} under {o.off_below:g}")
            state.skipped = 0
            return plan_first(context, min(2, o.k_max), "probe", probe=True)
        state.skipped = 0
        length = min(max(math.ceil(state.value - 1e-9), 1), o.k_max)
        return plan_first(context, length, f"average accepted {state.value:.2f}")

    def observe(self, record: StepRecord) -> None:
        if record.num_drafted == 0 or record.truncated:
            return
        o, state = self.options, self._averages.setdefault(record.request_id, _Average())
        length = record.num_accepted + (record.num_accepted == record.num_drafted)
        if state.value is None:
            state.value = float(length)
        else:
            state.value += (o.up if length > state.value else o.down) * (length - state.value)

    def finish(self, request_id: int) -> None:
        self._averages.pop(request_id, None)

"""Small worlds for controllers: a drafter with given acceptance and costs, run round by round in plain Python."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from paceline.control.base import Controller, RoundContext
from paceline.control.pacer import PacerOptions
from paceline.costs import CostTable, DraftCost
from paceline.records import Outlook, Plan, StepRecord

MS = 1e-3
START = PacerOptions().start
"""Plain steps that the time bank starts with."""


def table(verify_ms: list[float], *, draft_ms: float = 0.0, overhead_ms: float = 0.0, drafter: str = "draft") -> CostTable:
    """Verification of 1, 2, ... rows, the same at every context."""
    verify = [ms * MS for ms in verify_ms]
    rows = list(range(1, len(verify) + 1))
    return CostTable(rows, [0, 4096], [verify, verify], overhead_ms * MS, {drafter: DraftCost(draft_ms * MS)})


def linear(first_ms: float, slope_ms: float, rows: int = 64) -> list[float]:
    """t_v(n) = first + slope * (n - 1)."""
    return [first_ms + slope_ms * n for n in range(rows)]


def record(plan: Plan, accepted: int = 0, **fields: object) -> StepRecord:
    """The record of a planned round; times are zero unless given."""
    values: dict[str, object] = {
        "request_id": 0,
        "drafter": plan.drafter,
        "num_planned": plan.num_draft,
        "num_drafted": plan.num_draft,
        "num_accepted": accepted,
        "num_emitted": accepted + 1,
        "context_length": 100,
        "probe": plan.probe,
        "expected_emitted": plan.expected_emitted,
        "expected_seconds": plan.expected_seconds,
    }
    return StepRecord(**(values | fields))  # type: ignore[arg-type]


@dataclass
class Run:
    """Totals of a simulated generation."""

    seconds: float = 0.0
    tokens: int = 0
    least_slack: float = float("inf")
    """(1 + eps) * plain time of all tokens + the start - time, at its lowest; seconds."""
    probes: int = 0

    @property
    def ms_per_token(self) -> float:
        return self.seconds / self.tokens / MS


def simulate(
    controller: Controller,
    costs: CostTable,
    accept: Callable[[int], float],
    tokens: int,
    *,
    seed: int = 0,
    max_draft: int = 10,
    drafter: str = "draft",
    slower: Callable[[int], float] = lambda _: 1.0,
) -> Run:
    """One request of `tokens` tokens. accept: chance by emitted tokens; slower: factor on the time of a speculative round."""
    rng, run = random.Random(seed), Run()
    plain = costs.t_plain(100)
    while run.tokens < tokens:
        plan = controller.plan(RoundContext(0, 100, max_draft, (Outlook(drafter, max_draft),)))
        k, chance, accepted = plan.num_draft, accept(run.tokens), 0
        while accepted < k and rng.random() < chance:
            accepted += 1
        factor = slower(run.tokens) if k else 1.0
        draft = costs.t_draft(drafter, k) * factor
        verify = costs.t_verify(k + 1, 100) * factor
        seconds = draft + verify + (costs.round_overhead if k else 0.0)
        run.seconds += seconds
        run.tokens += accepted + 1
        run.probes += plan.probe
        run.least_slack = min(run.least_slack, 1.01 * plain * run.tokens + START * plain - run.seconds)
        times = {"draft_seconds": draft, "verify_seconds": verify, "round_seconds": seconds}
        controller.observe(record(plan, accepted, **times))
    return run

"""Contexts, records and features for controller tests."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable, DraftCost
from paceline.records import DraftFeatures, Outlook, Plan, StepRecord

COSTS = CostTable(
    rows=[1, 2, 3, 4, 5],
    contexts=[0],
    verify=[[0.020, 0.0205, 0.021, 0.0215, 0.026]],
    round_overhead=0.0005,
    drafters={"model": DraftCost(per_token=0.002)},
)
"""The worked example of a cost table with a step at five rows: t_draft 2 ms, overhead 0.5 ms."""


def costs() -> CostTable:
    return CostTable.from_json(COSTS.to_json())


def context(
    *, available: int = 63, max_draft: int = 63, request_id: int = 0, batch: int = 1, signal: int = 0, drafter: str = "model"
) -> RoundContext:
    outlook = Outlook(drafter, available, signal)
    return RoundContext(request_id, context_length=100, max_draft=max_draft, outlooks=(outlook,), batch_size=batch)


def record(
    accepted: int,
    drafted: int,
    *,
    request_id: int = 0,
    seconds: float = 0.0,
    acceptance: Sequence[float] = (),
    batch: int = 1,
    truncated: bool = False,
    divergence: Sequence[float] = (),
    relaxed: Sequence[int] = (),
) -> StepRecord:
    return StepRecord(
        request_id=request_id,
        drafter="model" if drafted else None,
        num_planned=drafted,
        num_drafted=drafted,
        num_accepted=accepted,
        num_emitted=accepted + 1,
        context_length=100,
        round_seconds=seconds,
        verify_seconds=seconds,
        batch_size=batch,
        acceptance=tuple(acceptance),
        truncated=truncated,
        divergence=tuple(divergence),
        relaxed=tuple(relaxed),
    )


def shown(position: int = 1, *, max_prob: float = 0.9, token_prob: float | None = None, entropy: float = 0.3) -> DraftFeatures:
    return DraftFeatures(position, max_prob, max_prob if token_prob is None else token_prob, entropy, margin=max_prob / 2)


def play(controller: Controller, accepted: int, features: Sequence[DraftFeatures], **about: object) -> Plan:
    """One round: plan, show the features of all drafted tokens, report what was accepted."""
    plan = controller.plan(context())
    for feature in features:
        controller.keep_drafting(0, feature)
    controller.observe(record(accepted, len(features), **about))  # type: ignore[arg-type]
    return plan


def lengths(controller: Controller, accepted: Sequence[int]) -> list[int]:
    """Planned length after each round of fully used plans with these accepted counts."""
    planned = []
    for count in accepted:
        drafted = controller.plan(context()).num_draft
        controller.observe(record(min(count, drafted), drafted))
        planned.append(controller.plan(context()).num_draft)
    return planned

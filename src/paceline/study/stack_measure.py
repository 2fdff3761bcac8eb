"""Measures what `stacks` needs: passes, drafts and acceptances of all levels, from real rounds of the real engine (ours).

A controller that goes round a list of lengths drives one drafter at a time. Lengths do not depend on the text, so rounds of length
T or more show survival up to T without bias, and times fall out for every number of rows. Inner levels are measured where they
work: as cascades that draft for the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median

from paceline.config import SamplingParams
from paceline.control.base import Controller, RoundContext
from paceline.drafting.base import Drafter
from paceline.drafting.hierarchy import CascadeDrafter
from paceline.engine import Engine
from paceline.errors import OptionError
from paceline.records import Plan, StepRecord
from paceline.study.stacks import StackLevel

_CYCLE = (0, 8, 2, 16, 4, 8, 1, 16)
"""Draft lengths in turn; long ones more often, since a position is seen only when those before it were accepted."""
_HANDED_UP = 16
"""Tokens that an inner level is asked for at once while it is measured."""
Survival = tuple[float, ...]


class Touring(Controller):
    """Asks one drafter for the lengths of a list in turn, and keeps the records."""

    name = "touring"

    def __init__(self, drafter: str, lengths: Sequence[int] = _CYCLE) -> None:
        self._drafter = drafter
        self._lengths = lengths
        self._round = 0
        self._planned = 0
        self.rounds: list[tuple[int, StepRecord]] = []
        """What was asked for, and what came of it."""

    def plan(self, context: RoundContext) -> Plan:
        self._planned = min(self._lengths[self._round % len(self._lengths)], context.max_draft)
        self._round += 1
        outlook = next((o for o in context.outlooks if o.drafter == self._drafter), None)
        num_draft = min(self._planned, outlook.available) if outlook is not None else 0
        return Plan(self._drafter if num_draft else None, num_draft)

    def observe(self, record: StepRecord) -> None:
        self.rounds.append((self._planned, record))
        self._planned = 0  # a round near the end of a text has no plan


def measure_levels(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, progress: Callable[[str], None] = lambda _: None
) -> tuple[list[StackLevel], dict[tuple[str, str], float | tuple[float, ...]]]:
    """Levels in the order of the engine's drafters, its target last, and the acceptance of every pair that can be stacked.

    A drafter that runs parts of the target is not tried below another model. The engine's controller and drafters are put back.
    Raises OptionError when it has no drafter.
    """
    drafters, controller = list(engine.drafters), engine.controller
    if not drafters:
        raise OptionError("draft = 'none': there is nothing to stack; name drafters, the cheapest first")
    acceptance: dict[tuple[str, str], float | tuple[float, ...]] = {}
    levels: list[StackLevel] = []
    try:
        passes: list[StepRecord] = []  # plain ones are among them, so that a passing disturbance meets all rows alike
        for index, upper in enumerate(drafters):
            progress(f"measuring {upper.name}")
            tour = Touring(upper.name)
            passes += _run(engine, [upper], tour, prompts, params)
            acceptance[upper.name, "target"] = survival(tour.rounds)
            fixed, per_token = _draft_line(engine, upper.name, [record for _, record in tour.rounds])
            inner: list[StepRecord] = []
            for lower in drafters[:index]:
                if not _fits_below(engine, lower, upper):
                    continue
                progress(f"measuring {lower.name} for {upper.name}")
                level_tour = Touring(lower.name)
                cascade = CascadeDrafter(upper, lower, f"cascade:{lower.name}>{upper.name}")
                cascade.controller = level_tour
                _run(engine, [cascade], Touring(cascade.name, (_HANDED_UP,)), prompts, params)
                inner += [record for _, record in level_tour.rounds]
                acceptance[lower.name, upper.name] = survival(level_tour.rounds)
            rows, seconds = _passes(inner)
            levels.append(StackLevel(upper.name, per_token, fixed, rows, seconds))
    finally:
        engine.drafters, engine.controller = drafters, controller
    rows, seconds = _passes(passes)
    return [*levels, StackLevel("target", seconds[0], rows=rows, passes=seconds)], acceptance


def _fits_below(engine: Engine, lower: Drafter, upper: Drafter) -> bool:
    return upper.verifier is not None and (lower.share_of_target is None or upper.verifier is engine.runner)


def _run(
    engine: Engine, drafters: list[Drafter], tour: Touring, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[StepRecord]:
    engine.drafters, engine.controller = drafters, tour
    for prompt in prompts:
        engine.generate(list(prompt), params)
    return [record for _, record in tour.rounds]


def survival(rounds: Iterable[tuple[int, StepRecord]]) -> Survival:
    """Share of the rounds asked for at least T tokens in which at least T were accepted, for T = 1, 2, ... while there are such
    rounds. A drafter that had nothing to propose accepted nothing. A round cut by a stop condition is left out."""
    shares: list[float] = []
    whole = [(asked, record.num_accepted) for asked, record in rounds if not record.truncated]
    while reached := [accepted > len(shares) for asked, accepted in whole if asked > len(shares)]:
        shares.append(min(fmean(reached), shares[-1] if shares else 1.0))
    return tuple(shares)


def _passes(records: Sequence[StepRecord]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Seconds of a round outside drafting, by rows: the median of each number of rows that was seen, made monotone."""
    seen: dict[int, list[float]] = {}
    for record in records:
        if not record.warmup:
            rows = record.batch_rows or record.num_drafted + 1
            seen.setdefault(rows, []).append(record.round_seconds - record.draft_seconds - record.control_seconds)
    enough = min(3, max(map(len, seen.values()), default=0))
    curve: list[tuple[int, float]] = []
    for rows in sorted(seen):
        if len(seen[rows]) >= enough:
            curve.append((rows, max(median(seen[rows]), curve[-1][1] if curve else 0.0)))
    return tuple(rows for rows, _ in curve), tuple(seconds for _, seconds in curve)


def _draft_line(engine: Engine, name: str, records: Sequence[StepRecord]) -> tuple[float, float]:
    """Seconds of a draft as (fixed, per token): the shape of the engine's first figures, with the size that was seen."""
    shape = engine.costs.drafters[name]
    least = 1 if shape.per_token == 0 else 0  # a look-up takes its time even when it finds nothing
    pairs = [(record.draft_seconds, shape.seconds(max(record.num_drafted, least))) for record in records if not record.warmup]
    scale = median([seen / expected for seen, expected in pairs if expected > 0] or [1.0])
    return scale * shape.fixed, scale * shape.per_token

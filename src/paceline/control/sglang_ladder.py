"""`sglang_ladder`: climbs and descends a hand-written ladder of draft lengths, one ladder per range of batch sizes.

Source: SGLang's adaptive speculative steps (rule and constants known from its public code). It reads acceptance only, no costs:
the ladders encode the hardware. Ours: records of a batch are averaged before each update. Lossless: only finished rounds
are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.control.base import Controller, RoundContext
from paceline.control.rounds import BatchTally, plan_first, require, require_count, require_length, require_list, require_number
from paceline.costs import CostTable
from paceline.records import Plan, StepRecord


def next_steps(ladder: Sequence[int], current: int, ema: float, down: float = -0.25, up: float = 0.0) -> int:
    """The length that follows `current` (a member of the sorted ladder) when the mean accepted length is `ema`."""
    start = i = ladder.index(current)
    if current == 0:
        return next((steps for steps in ladder if steps > 0), 0)
    while i > 0 and ema <= (0.5 if ladder[i - 1] == 0 else ladder[i - 1] - 0.5) + down:
        i -= 1
    if i == start:
        while i + 1 < len(ladder) and ema > ladder[i] - 0.5 + up:
            i += 1
    return ladder[i]


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangLadderOptions:
    """Options of `sglang_ladder`; all defaults are the published ones."""

    slots: Sequence[tuple[int, Sequence[int]]] = ((1, (1, 3, 5, 7)), (8, (0, 1, 3)), (32, (0, 1)), (64, (0,)))
    """(smallest batch size, draft lengths), both sorted."""
    start: int = 3
    """First length, or the longest of the ladder that does not exceed it."""
    decay: float = 0.8
    """Weight of the past in the mean accepted length."""
    warmup: int = 10
    """Rounds before the first change."""
    every: int = 5
    """Rounds between changes."""
    down: float = -0.25
    up: float = 0.0

    def __post_init__(self) -> None:
        require_list("slots", self.slots)
        for slot in self.slots:
            require(isinstance(slot, (list, tuple)) and len(slot) == 2, "slots", slot, "each must be (batch size, lengths)")
            require_count("slots", slot[0])
            require_list("slots", slot[1])
            for steps in slot[1]:
                require_length("slots", steps)
            require(list(slot[1]) == sorted(set(slot[1])), "slots", slot[1], "lengths must rise")
        object.__setattr__(self, "slots", tuple((size, tuple(ladder)) for size, ladder in self.slots))
        sizes = [size for size, _ in self.slots]
        require(sizes[0] == 1 and sizes == sorted(set(sizes)), "slots", sizes, "sizes must rise from 1")
        require_length("start", self.start)
        require_count("warmup", self.warmup, 0)
        require_count("every", self.every)
        require_number("decay", self.decay, 0.0, 1.0)
        require_number("down", self.down, -10.0, 10.0)
        require_number("up", self.up, -10.0, 10.0)


@dataclass(slots=True)
class _Slot:
    ladder: Sequence[int]
    steps: int
    ema: float
    rounds: int = 0
    tally: BatchTally = field(default_factory=BatchTally)


class SglangLadder(Controller):
    """State per slot; while the length is 0 the average is frozen, and the next change probes the lowest positive length."""

    name = "sglang_ladder"
    options_type = SglangLadderOptions

    def __init__(self, options: SglangLadderOptions, costs: CostTable) -> None:
        self.options = options
        self._slots: list[tuple[int, _Slot]] = []
        for size, ladder in options.slots:
            steps = max((s for s in ladder if s <= options.start), default=ladder[0])
            self._slots.append((size, _Slot(ladder, steps, steps - 1.0)))

    def _slot(self, batch_size: int) -> _Slot:
        return next(slot for size, slot in reversed(self._slots) if size <= max(batch_size, 1))

    def plan(self, context: RoundContext) -> Plan:
        slot = self._slot(context.batch_size)
        return plan_first(context, slot.steps, f"mean accepted {slot.ema:.2f}")

    def observe(self, record: StepRecord) -> None:
        o, slot = self.options, self._slot(record.batch_size)
        sums = slot.tally.add(record)
        if sums is None:
            return
        accepted, _, drafting = sums
        if slot.steps > 0 and drafting == 0:
            return
        if slot.steps > 0:
            slot.ema = o.decay * slot.ema + (1 - o.decay) * accepted / drafting
        slot.rounds += 1
        if slot.rounds > o.warmup and slot.rounds % o.every == 0:
            slot.steps = next_steps(slot.ladder, slot.steps, slot.ema, o.down, o.up)

"""The pacer in C against the pacer in Python: the same plans and, to the bit, the same state after the same rounds."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from paceline.control import acceptance, chances, core, offers, pricing, quality
from paceline.control.base import RoundContext
from paceline.control.pacer import Pacer, PacerOptions
from paceline.costs import CostTable, DraftCost
from paceline.records import Outlook, Plan, StepRecord

LIBRARY = core.load_library()
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason=str(LIBRARY))
MS = 1e-3
ROUNDS = 1200
TASKS = ("", "code", "@1.0", "code@0.7")


@dataclass
class World:
    """A machine and drafts whose costs and quality wander, and requests one after another."""

    seed: int
    rng: random.Random = field(init=False)
    now: int = 0
    request: int = 0
    task: str = ""
    context: int = 100
    chance: float = 0.7
    load: float = 1.0
    draft_load: float = 1.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.load = (1.0, 0.8)[self.seed % 2]

    @property
    def names(self) -> tuple[str, ...]:
        """Drafters: one alone in every other world."""
        return ("tree", "chain", "unknown") if self.seed % 2 else ("tree",)

    @property
    def chances(self) -> tuple[float, ...]:
        """Of acceptance: good, hopeless, sure, or all of them by turns."""
        return ((0.6, 0.8, 0.95), (0.0, 0.0, 0.05), (1.0,), (0.0, 0.05, 0.3, 0.6, 0.8, 1.0))[self.seed % 4]

    def table(self) -> CostTable:
        step, cliff = ((0.1, 6.0), (0.8, 2.0), (3.0, 60.0), (1.0, 20.0), (1.0, 30.0))[self.seed % 5]
        verify = [[base + step * rows + (cliff if rows > 5 else 0.0) for rows in range(24)] for base in (10.0, 14.0)]
        drafters = {"tree": DraftCost(0.02 * MS), "chain": DraftCost(0.4 * MS, 0.2 * MS, 0.05 * MS)}
        return CostTable(list(range(1, 25)), [0, 2048], [[MS * ms for ms in line] for line in verify], 0.1 * MS, drafters)

    def contexts(self, batch: int) -> list[RoundContext]:
        rng = self.rng
        outlooks = []
        for name in self.names[: rng.choice((1, 1, 2, 3))]:
            available = rng.choice((0, 1, 3, 8, 16, 16)) if self.seed % 5 else rng.choice((3, 16))
            lag = rng.choice((3, 20)) if name == "chain" and rng.random() < 0.05 else 0
            signal = rng.choice((0, 1, 2, 3, 4, 8, 12, 17, 30))
            outlooks.append(Outlook(name, available, signal, lag, chances=self.chances_of(name, available)))
        most = rng.choice((0, 1, 5, 16, 16, 16, 16, 16)) if self.seed % 5 else 16
        return [
            RoundContext(self.request + i, self.context, most, tuple(outlooks), batch, self.task, 200 - self.now % 200)
            for i in range(batch)
        ]

    def chances_of(self, name: str, available: int) -> tuple[float, ...]:
        """What the drafter says of its own nodes, best first; nothing in every third world."""
        if name != "tree" or self.seed % 3 == 0:
            return ()
        return tuple(sorted((self.rng.choice((0.02, 0.3, 1.0)) * self.rng.random() for _ in range(available)), reverse=True))

    def wander(self) -> None:
        """Some things change for a while, or for good."""
        rng = self.rng
        self.now += 1
        if rng.random() < 0.01:
            self.chance = rng.choice(self.chances)
        if rng.random() < 0.01:
            self.load, self.draft_load = rng.choice((0.3, 0.7, 0.93, 1.0, 1.08, 3.0)), rng.choice((1.0, 1.0, 4.0))

    def record(self, context: RoundContext, plan: Plan, costs: CostTable, rows: int) -> StepRecord:
        rng, batch = self.rng, context.batch_size
        drafted = plan.num_draft if rng.random() < 0.9 else rng.randint(0, plan.num_draft)
        levels = drafted if plan.drafter != "tree" or rng.random() < 0.5 else rng.randint(min(drafted, 1), drafted)
        said = next((o.chances for o in context.outlooks if o.drafter == plan.drafter), ())[:drafted]
        accepted = next((j for j in range(levels) if rng.random() >= self.chance), levels)
        truncated = rng.random() < 0.05
        labels = (1.0,) * accepted + (0.0,) * (accepted < levels)
        if self.task.endswith("1.0"):
            labels = tuple(rng.random() for _ in labels)
        slow = self.load * (rng.uniform(1.6, 6.0) if rng.random() < 0.04 else rng.uniform(0.97, 1.03))
        verify = slow * costs.t_verify(rows, context.context_length)
        looking = rng.uniform(0.0, 6.0 if rng.random() < 0.05 else 0.05) * MS
        draft = self.draft_load * costs.t_draft(plan.drafter or "", drafted) + looking
        rest = rng.uniform(0.0, 0.3) * MS
        return StepRecord(
            context.request_id,
            plan.drafter,
            plan.num_draft,
            drafted,
            accepted,
            accepted + 1,
            context.context_length,
            next((o.signal for o in context.outlooks if o.drafter == plan.drafter), 0),
            draft,
            verify,
            rng.uniform(0.0, 0.05) * MS,
            verify + draft + rest if rng.random() < 0.95 else 0.0,
            batch,
            rows if rng.random() < 0.9 or batch > 1 else 0,
            acceptance=labels if rng.random() < 0.8 else (),
            truncated=truncated,
            probe=plan.probe,
            warmup=rng.random() < 0.02,
            expected_emitted=plan.expected_emitted,
            expected_seconds=plan.expected_seconds,
            task=context.task,
            num_levels=levels,
            chances=tuple(said),
            path=tuple(sorted(rng.sample(range(drafted), accepted))),
        )


def make(seed: int) -> Pacer:
    return Pacer(PacerOptions(eps=(0.009, 0.05)[seed % 2], start=(30.0, 4.0, 1.5)[seed % 3]), World(seed).table())


def nudge(rng: random.Random, pacers: tuple[Pacer, Pacer]) -> None:
    """Bring both near thresholds that hardly a stream of rounds comes by."""
    slack, change = rng.uniform(-0.5, 1.5), rng.uniform(0.85, 1.15) if rng.random() < 0.7 else rng.choice((0.3, 0.45, 2.2, 3.0))
    value, deviation = rng.uniform(0.7, 1.1), rng.uniform(0.0, 0.3)
    for pacer in pacers:
        bank, costs = pacer._bank, pacer._costs.state
        bank.slack = slack * bank._start * bank._opened_at
        costs.machine_at_plain = change * costs.scales.machine
        for lane in pacer._lanes.values():
            lane.arbiter._estimate.value, lane.arbiter._estimate.deviation = value, deviation


def run(seed: int, pacers: tuple[Pacer, Pacer], rounds: int = ROUNDS) -> list[str]:
    """Show both the same rounds. Returns the reasons of all plans, which must be the same."""
    world, reasons = World(seed), []
    costs = world.table()
    for _ in range(rounds):
        world.wander()
        rng = world.rng
        batch = 3 if rng.random() < 0.01 else 1
        if rng.random() < 0.05:
            nudge(rng, pacers)
        contexts = world.contexts(batch)
        unseen, other_unseen = (p.plan_unseen(world.task, batch) for p in pacers)
        plans, other = ([unseen] * batch, [other_unseen] * batch) if unseen else (p.plan_batch(contexts) for p in pacers)
        assert plans == other, f"round {world.now}"
        assert len({bytes(pacer._bank) for pacer in pacers}) == 1, f"round {world.now}"
        reasons += [f"{plan.reason} {bool(plan.num_draft)}" for plan in plans]
        rows = sum(plan.num_draft + 1 for plan in plans)
        for context, plan in zip(contexts, plans, strict=True):
            record = world.record(context, plan, costs, rows)
            for pacer in pacers:
                pacer.observe(record)
        world.context += 2
        if rng.random() < 0.01:
            for pacer in pacers:
                for i in range(3):
                    pacer.finish(world.request + i)
            world.request, world.task, world.context = world.request + 3, rng.choice(TASKS), rng.randint(1, 3000)
    for pacer in pacers:
        pacer._take_in()
    return reasons


def flat(states: Mapping[object, ctypes.Structure] | Iterable[tuple[object, ctypes.Structure]]) -> dict[object, bytes]:
    return {key: bytes(state) for key, state in dict(states).items()}


def state_of(pacer: Pacer) -> dict[str, dict[object, bytes]]:
    """All that was learnt. What stands as it began may be there or not."""
    known = pacer._quality.acceptance
    level, own, rests = bytes(acceptance.Shift(0.99, 6.0)), bytes(acceptance.WatchedShift(0.96, 6.0).state), bytes(offers.Rests())
    width, untold = bytes(quality.Width()), [bytes(chances.ChanceTable(t)) for t in (0.0, 0.7, 1.0)]
    return {
        "banks": flat({"bank": pacer._bank}),
        "costs": flat({"costs": pacer._costs.state}),
        "lanes": flat({key: lane.state for key, lane in pacer._lanes.items()}),
        "rests": {
            (key, name): state for key, lane in pacer._lanes.items() for name, state in flat(lane._rests).items() if state != rests
        },
        "pools": flat({key: pool.state for key, pool in known._pools.items() if pool.is_open}),
        "own": {
            (request, name): state
            for request, shifts in known._requests.items()
            for name, state in flat({name: shift.state for name, shift in shifts.items()}).items()
            if state != own
        },
        "levels": {key: state for key, state in flat(known._levels).items() if state != level},
        "widths": {key: state for key, state in flat(pacer._quality._widths).items() if state != width},
        "chances": {key: state for key, state in flat(pacer._quality._chances).items() if state not in untold},
        "lines": flat(pacer._costs._lines),
        "probes": flat({key: state for key, state in pacer._probes._states.items() if state.interval}),
    }


def differing(seed: int, rounds: int = ROUNDS) -> list[str]:
    """The parts of the state that differ after the same rounds."""
    with_c, without = make(seed), make(seed)
    without._core = None
    run(seed, (with_c, without), rounds)
    ours, theirs = state_of(with_c), state_of(without)
    return [part for part in ours if ours[part] != theirs[part]]


@pytest.mark.parametrize("seed", range(12))
def test_plans_and_state_are_those_of_the_reference(seed: int) -> None:
    assert differing(seed) == []


def differing_verdicts(seed: int) -> list[str]:
    """As `differing`, of rounds about as fast as plain ones whose drafts are never accepted, whatever would be planned."""
    rng, pacers, worth = random.Random(seed), (make(seed), make(seed)), 1.0
    pacers[1]._core = None
    outlook = Outlook("tree", 1, 17)
    for number in range(1500):
        context = RoundContext(0, 100, 1, (outlook,))
        if number % (8 if seed > 3 else 32) == 0:
            worth = rng.uniform(*((0.8, 1.0), (0.4, 1.4), (0.8, 1.0), (0.4, 1.4), (0.92, 1.1), (0.97, 1.04))[seed])
        seconds = 10.0 * MS / worth * rng.uniform(0.8, 1.2)
        plan = Plan("tree", 1, expected_seconds=seconds) if number > 10 and (seed < 4 or number % 16) else Plan(None, 0)
        made = World(seed).record(context, plan, World(seed).table(), 1 + plan.num_draft)
        shown = {"num_accepted": 0, "num_emitted": 1, "acceptance": (), "truncated": False, "round_seconds": seconds}
        for pacer in pacers:
            pacer.plan(context)
            pacer._running[0] = offers.RunningDraft("tree", "")
            pacer.observe(replace(made, **shown, verify_seconds=0.9 * seconds, draft_seconds=0.0, num_drafted=plan.num_draft))
    ours, theirs = map(state_of, pacers)
    return [part for part in ours if ours[part] != theirs[part]]


@pytest.mark.parametrize("seed", range(6))
def test_verdicts_on_rounds_that_barely_lose_are_those_of_the_reference(seed: int) -> None:
    assert differing_verdicts(seed) == []


def test_usual_rounds_are_left_to_c(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("_take_in_reference", "_offer"):
        monkeypatch.setattr(Pacer, name, counted(name, getattr(Pacer, name), asked))
    pacer, world = make(1), World(1)
    costs, world.task = world.table(), "@1.0"
    for number in range(400):
        context = RoundContext(0, 100 + number, 16, (Outlook("tree", 16, 3),), 1, "@1.0")
        plan = pacer.plan(context)
        pacer.observe(world.record(context, plan, costs, plan.num_draft + 1))
    assert len(asked) < 10


def counted(name: str, method: Callable[..., object], calls: list[str]) -> Callable[..., object]:
    def call(*given: object) -> object:
        calls.append(name)
        return method(*given)

    return call


def test_structures_are_laid_out_alike() -> None:
    assert not isinstance(LIBRARY, str)
    states = (pricing.CostState, acceptance.PoolState, acceptance.WatchedState, chances.ChanceTable)
    ours = (core._Core, core._Standing, offers.LaneState, *states)
    assert [LIBRARY.paceline_pacer_size(i) for i in range(len(ours))] == [ctypes.sizeof(each) for each in ours]


def test_without_a_compiler_python_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_NATIVE", "0")
    core.load_library.cache_clear()
    assert make(0)._core is None
    monkeypatch.undo()
    core.load_library.cache_clear()

"""Any controller over a synthetic or recorded world, in milliseconds and without torch (ours).

The simulated engine follows the contract of the real one: outlooks and limits before a round, features while drafting, records
after it. Times come from the regime's cost table with a little noise. Beyond the first rejection a draft is off the text; the
features shown there are those of the text positions all the same.

Regrets are shares of time: 0.05 against a reference means that it took 5 % longer. `best_fixed` is the best of plain decoding
and `fixed_K` on the same regime. `best_k_in_hindsight` knows every coin and picks drafter and length of each round by dynamic
programming: the exact optimum (noise apart) for one sequence; for batches a reference only, as it takes all sequences of a round
to draft alike.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from paceline.control import registry
from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable
from paceline.errors import OptionError
from paceline.records import DraftFeatures, Outlook, Plan, StepRecord
from paceline.study.environment import environment
from paceline.study.regimes import MAX_DRAFT, Regime, Stream, all_regimes, entropy_of, margin_of

FIXED_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
OFFLINE = "offline_policy"


class _Plain(Controller):
    """Never drafts."""

    name = "plain"

    def plan(self, context: RoundContext) -> Plan:
        return Plan(None, 0, "plain")


@dataclass(frozen=True, slots=True)
class World:
    """A regime with its streams drawn."""

    regime: Regime
    streams: tuple[Stream, ...]
    tokens: int
    seed: int


@dataclass(slots=True)
class Outcome:
    """Totals of one run."""

    seconds: float = 0.0
    tokens: int = 0
    rounds: int = 0
    """Rounds of single sequences."""
    drafted: int = 0
    accepted: int = 0
    control_seconds: float = 0.0
    """Real time spent in the controller."""


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """One line of the result; see the module's text for the regrets."""

    regime: str
    controller: str
    tokens_per_second: float
    speedup_vs_plain: float
    regret_vs_best_fixed: float
    regret_vs_best_k_in_hindsight: float
    acceptance_rate: float | None
    rounds: int
    controller_us_per_round: float


@dataclass(slots=True)
class _Sequence:
    request_id: int
    position: int
    """Next text position."""
    end: int

    @property
    def remaining(self) -> int:
        return self.end - self.position


@dataclass(slots=True)
class _Drafted:
    sequence: _Sequence
    plan: Plan
    context: RoundContext
    outlook: Outlook | None = None
    count: int = 0
    accepted: int = 0
    confidences: tuple[float, ...] = ()
    acceptance: tuple[float, ...] = ()


def draw_world(regime: Regime, seed: int, tokens: int) -> World:
    """Draw a regime's streams; the same seed gives the same text to every controller."""
    streams = regime.build(random.Random(f"{seed}:{regime.name}"), tokens)
    return World(regime, streams, min(tokens, len(streams[0].accept)), seed)


class Simulator:
    """Runs one controller over one world."""

    def __init__(self, world: World, controller: Controller, on_record: Callable[[StepRecord], None] | None = None) -> None:
        self.world = world
        self.controller = controller
        self.outcome = Outcome()
        self._costs = world.regime.table()
        self._noise = random.Random(world.seed)
        self._active: list[_Sequence] = []
        self._next_start = 0
        self._next_id = 0
        self._on_record = on_record

    def run(self) -> Outcome:
        """Decode the whole text."""
        while self.outcome.tokens < self.world.tokens:
            batch, factor = self.world.regime.load(self.outcome.tokens / self.world.tokens)
            self._admit(batch)
            self._round(factor)
        return self.outcome

    def _admit(self, batch: int) -> None:
        length = self.world.regime.request_tokens
        while len(self._active) < batch and self._next_start < self.world.tokens:
            end = min(self._next_start + length, self.world.tokens)
            self._active.append(_Sequence(self._next_id, self._next_start, end))
            self._next_id += 1
            self._next_start = end

    def _round(self, factor: float) -> None:
        drafts: list[_Drafted] = []
        rows = 0
        for sequence in self._active:
            drafts.append(self._draft(sequence, rows))
            rows += drafts[-1].count + 1
        context = max(d.context.context_length for d in drafts)
        verify = self._costs.t_verify(rows, context) * factor * self._noise_factor()
        draft = max((self._costs.t_draft(d.plan.drafter or "", d.count) for d in drafts), default=0.0) * factor
        overhead = self._costs.round_overhead if any(d.count for d in drafts) else 0.0
        seconds = draft + verify + overhead
        emitted = sum(d.accepted + 1 for d in drafts)
        self.outcome.seconds += seconds
        self.outcome.tokens += emitted
        for d in drafts:
            self._commit(d, verify, seconds, rows, emitted, factor)
        self._active = [s for s in self._active if s.remaining > 0]

    def _noise_factor(self) -> float:
        return math.exp(self._noise.gauss(0.0, self.world.regime.noise))

    def _outlooks(self, sequence: _Sequence, limit: int) -> tuple[Outlook, ...]:
        at = sequence.position
        return tuple(Outlook(s.drafter, min(s.available[at], limit), s.signal[at]) for s in self.world.streams)

    def _draft(self, sequence: _Sequence, other_rows: int) -> _Drafted:
        limit = min(MAX_DRAFT, sequence.remaining - 1)
        regime = self.world.regime
        start = sequence.request_id * regime.request_tokens
        context = RoundContext(
            request_id=sequence.request_id,
            context_length=regime.prompt_tokens + sequence.position - start,
            max_draft=limit,
            outlooks=self._outlooks(sequence, limit),
            batch_size=len(self._active),
            other_rows=other_rows,
            task=regime.name,
        )
        began = perf_counter()
        plan = self.controller.plan(context)
        self.outcome.control_seconds += perf_counter() - began
        drafted = _Drafted(sequence, plan, context)
        if plan.drafter is not None and plan.num_draft > 0:
            self._propose(drafted)
        return drafted

    def _propose(self, drafted: _Drafted) -> None:
        plan, at = drafted.plan, drafted.sequence.position
        index = next(i for i, s in enumerate(self.world.streams) if s.drafter == plan.drafter)
        stream, drafted.outlook = self.world.streams[index], drafted.context.outlooks[index]
        if plan.num_draft > drafted.outlook.available:
            raise OptionError(
                f"controller = {self.controller.name!r}: planned {plan.num_draft} tokens where {drafted.outlook.available} exist"
            )
        drafted.count = plan.num_draft
        if stream.max_prob:
            for depth in range(1, plan.num_draft + 1):
                if not self._asks(drafted, stream, at + depth - 1, depth):
                    drafted.count = depth
                    break
            drafted.confidences = tuple(stream.max_prob[at : at + drafted.count])
        drafted.accepted = stream.run_length(at, drafted.count)
        if self.world.regime.exact_labels:
            observed = min(drafted.accepted + 1, drafted.count)
            drafted.acceptance = tuple(stream.chance(at + j, j + 1) for j in range(observed))

    def _asks(self, drafted: _Drafted, stream: Stream, position: int, depth: int) -> bool:
        max_prob = stream.max_prob[position]
        features = DraftFeatures(depth, max_prob, stream.token_prob[position], entropy_of(max_prob), margin_of(max_prob))
        began = perf_counter()
        more = self.controller.keep_drafting(drafted.sequence.request_id, features)
        self.outcome.control_seconds += perf_counter() - began
        return more

    def _commit(self, d: _Drafted, verify: float, seconds: float, rows: int, emitted: int, factor: float) -> None:
        record = StepRecord(
            request_id=d.sequence.request_id,
            drafter=d.plan.drafter if d.count else None,
            num_planned=d.plan.num_draft,
            num_drafted=d.count,
            num_accepted=d.accepted,
            num_emitted=d.accepted + 1,
            context_length=d.context.context_length,
            signal=d.outlook.signal if d.outlook else 0,
            draft_seconds=self._costs.t_draft(d.plan.drafter or "", d.count) * factor,
            verify_seconds=verify,
            round_seconds=seconds,
            batch_size=d.context.batch_size,
            batch_rows=rows,
            batch_emitted=emitted,
            confidences=d.confidences,
            acceptance=d.acceptance,
            probe=d.plan.probe,
            expected_emitted=d.plan.expected_emitted,
            expected_seconds=d.plan.expected_seconds,
            task=d.context.task,
        )
        d.sequence.position += record.num_emitted
        began = perf_counter()
        self.controller.observe(record)
        if d.sequence.remaining <= 0:
            self.controller.finish(d.sequence.request_id)
        self.outcome.control_seconds += perf_counter() - began
        self.outcome.rounds += 1
        self.outcome.drafted += d.count
        self.outcome.accepted += d.accepted
        if self._on_record is not None:
            self._on_record(record)


def hindsight_seconds(world: World) -> float:
    """Least time for the text by one who knows every coin; see the module's text for batches."""
    regime, costs, total = world.regime, world.regime.table(), 0.0
    for start in range(0, world.tokens, regime.request_tokens):
        end = min(start + regime.request_tokens, world.tokens)
        batch, factor = regime.load(start / world.tokens)
        best = [0.0] * (end - start + 1)
        for at in range(end - 1, start - 1, -1):
            context = regime.prompt_tokens + at - start
            least = costs.t_plain(context, batch) / batch * factor + best[at + 1 - start]
            for stream in world.streams:
                run = stream.run_length(at, min(MAX_DRAFT, end - at - 1, stream.available[at]))
                for k in range(1, run + 1):
                    draft = costs.t_draft(stream.drafter, k) * factor + costs.round_overhead
                    seconds = (draft + costs.t_verify(batch * (k + 1), context) * factor) / batch
                    least = min(least, seconds + best[at + k + 1 - start])
            best[at - start] = least
        total += best[0]
    return total


def make_controller(name: str, costs: CostTable, world: World) -> Controller:
    """`plain`, `fixed_K`, `offline_policy` (trained on another draw of the same regime), or a registered controller.

    Raises OptionError for anything else.
    """
    if name == "plain":
        return _Plain()
    if name == OFFLINE:
        from paceline.study.offline_policy import train_for_world

        return train_for_world(world, costs)
    prefix, _, length = name.rpartition("_")
    if prefix == "fixed" and length.isdigit():
        return registry.create("fixed", costs, {"num_draft": int(length)})
    return registry.create(name, costs)


def controller_names() -> tuple[str, ...]:
    """All that `run_replay` knows: references, registered controllers (but `fixed`, which needs a length), the learnt policy."""
    fixed = tuple(f"fixed_{k}" for k in FIXED_LENGTHS)
    return ("plain", *fixed, *(name for name in registry.names() if name != "fixed"), OFFLINE)


def run_world(world: World, controllers: Sequence[str]) -> list[ReplayRow]:
    """All controllers over one world, in the order given; the references are always run, if not always listed."""
    references = ("plain", *(f"fixed_{k}" for k in FIXED_LENGTHS))
    outcomes = {
        name: Simulator(world, make_controller(name, world.regime.table(), world)).run()
        for name in dict.fromkeys((*references, *controllers))
    }
    plain = outcomes["plain"]
    best_fixed = min(outcomes[name].seconds / outcomes[name].tokens for name in references)
    hindsight = hindsight_seconds(world) / world.tokens
    return [_row(world.regime.name, name, outcomes[name], plain, best_fixed, hindsight) for name in controllers]


def _row(regime: str, name: str, run: Outcome, plain: Outcome, best_fixed: float, hindsight: float) -> ReplayRow:
    per_token = run.seconds / run.tokens
    return ReplayRow(
        regime=regime,
        controller=name,
        tokens_per_second=1 / per_token,
        speedup_vs_plain=plain.seconds / plain.tokens / per_token,
        regret_vs_best_fixed=per_token / best_fixed - 1,
        regret_vs_best_k_in_hindsight=per_token / hindsight - 1,
        acceptance_rate=run.accepted / run.drafted if run.drafted else None,
        rounds=run.rounds,
        controller_us_per_round=1e6 * run.control_seconds / run.rounds,
    )


def pick_regimes(names: Sequence[str]) -> list[Regime]:
    """Regimes by name; `all`, a shape (`high`) or a curve (`gpu-8b`) stands for several. Raises OptionError for unknown names."""
    known = all_regimes()
    picked: dict[str, Regime] = {}
    for wanted in names:
        found = {n: r for n, r in known.items() if wanted in ("all", n, *n.split("@"))}
        if not found:
            raise OptionError(f"regimes = {wanted!r}: unknown; choose `all` or among {', '.join(known)}")
        picked |= found
    return list(picked.values())


def pick_controllers(names: Sequence[str]) -> list[str]:
    """Controllers by name; `all` stands for every one."""
    picked = [name for wanted in names for name in (controller_names() if wanted == "all" else (wanted,))]
    return list(dict.fromkeys(picked))


def run_replay(
    regimes: Sequence[str | Regime],
    controllers: Sequence[str],
    seed: int = 0,
    tokens: int = 2000,
    command: str = "",
) -> dict[str, Any]:
    """The whole table, ready for JSON: `{results: [ReplayRow, ...], environment, command}`.

    regimes: names (see `pick_regimes`) or regimes of one's own. tokens: length of each regime's text. command: the command line to
    record with the result.
    Raises OptionError for unknown names and for tokens < 2.
    """
    if tokens < 2:
        raise OptionError(f"tokens = {tokens}: must be at least 2")
    chosen = [r for item in regimes for r in (pick_regimes([item]) if isinstance(item, str) else [item])]
    names = pick_controllers(controllers)
    rows = [row for regime in chosen for row in run_world(draw_world(regime, seed, tokens), names)]
    setting = {"seed": seed, "tokens": tokens, "curves": {r.curve.name: r.curve.to_json() for r in chosen}}
    return {"results": [asdict(row) for row in rows], "environment": {**environment(), "replay": setting}, "command": command}


def plot_replay(results: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Heat chart of speed against plain decoding, regimes by controllers, written to `path`.

    results: the `results` of `run_replay`. Raises OptionError when matplotlib is missing or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("plot: needs matplotlib; install the `study` extra") from error
    if not results:
        raise OptionError("plot: no results to draw")
    regimes = list(dict.fromkeys(row["regime"] for row in results))
    names = list(dict.fromkeys(row["controller"] for row in results))
    speed = {(row["regime"], row["controller"]): row["speedup_vs_plain"] for row in results}
    grid = [[math.log2(max(speed.get((regime, name), math.nan), 1 / 64)) for name in names] for regime in regimes]
    figure = Figure(figsize=(2.5 + 0.42 * len(names), 2.0 + 0.32 * len(regimes)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid, cmap="RdYlGn", vmin=-1.5, vmax=1.5, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(regimes)), regimes, fontsize=7)
    for i, regime in enumerate(regimes):
        for j, name in enumerate(names):
            if (regime, name) in speed:
                axes.text(j, i, f"{speed[regime, name]:.2f}", ha="center", va="center", fontsize=5)
    axes.set_title("Speed against plain decoding (1.00 = plain)", fontsize=9)
    figure.savefig(path, dpi=150)

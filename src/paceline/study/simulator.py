"""The simulated engine: one controller over one world, without torch (ours).

It follows the contract of the real one: outlooks and limits before a round, features while drafting, records after it. Times come
from the regime's cost table with a little noise. A draft with a cost of catching up has a cache of its own: what was emitted
while others drafted, and at first the prompt, is fed to it before it drafts. Beyond the first rejection a draft is off the text;
the features shown there are those of the text positions all the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable
from paceline.errors import OptionError
from paceline.records import DraftFeatures, Outlook, Plan, StepRecord
from paceline.study.regimes import MAX_DRAFT, Regime, Stream, entropy_of, margin_of

_NO_OUTLOOK = Outlook("", 0)


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


@dataclass(slots=True)
class _Sequence:
    request_id: int
    position: int
    """Next text position."""
    end: int
    caught_up: dict[str, int] = field(default_factory=dict)
    """Text position up to which each drafter's own cache has been fed; absent: not even the prompt."""

    @property
    def remaining(self) -> int:
        return self.end - self.position


@dataclass(slots=True)
class _Drafted:
    sequence: _Sequence
    plan: Plan
    context: RoundContext
    outlook: Outlook = _NO_OUTLOOK
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
        self._laggards = {name for name, cost in self._costs.drafters.items() if cost.per_catch_up > 0}
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
            # Requests over the present load wait: else a fast controller, which is in another part of a request when the load
            # changes, would be measured under another load than a slow one.
            self._round(self._active[:batch], factor)
        return self.outcome

    def _admit(self, batch: int) -> None:
        length = self.world.regime.request_tokens
        while len(self._active) < batch and self._next_start < self.world.tokens:
            end = min(self._next_start + length, self.world.tokens)
            self._active.append(_Sequence(self._next_id, self._next_start, end))
            self._next_id += 1
            self._next_start = end

    def _round(self, running: Sequence[_Sequence], factor: float) -> None:
        drafts = self._draft(running)
        rows = sum(d.count + 1 for d in drafts)
        context = max(d.context.context_length for d in drafts)
        verify = self._costs.t_verify(rows, context) * factor * self._noise_factor()
        draft = max(self._draft_seconds(d) for d in drafts) * factor
        overhead = self._costs.round_overhead if any(d.count for d in drafts) else 0.0
        seconds = draft + verify + overhead
        emitted = sum(d.accepted + 1 for d in drafts)
        self.outcome.seconds += seconds
        self.outcome.tokens += emitted
        for d in drafts:
            self._commit(d, draft if d.count else 0.0, verify, seconds, rows, emitted)
        self._active = [s for s in self._active if s.remaining > 0]

    def _noise_factor(self) -> float:
        return math.exp(self._noise.gauss(0.0, self.world.regime.noise))

    def _draft_seconds(self, drafted: _Drafted) -> float:
        return self._costs.t_draft(drafted.outlook.drafter, drafted.count, drafted.outlook.catch_up)

    def _outlooks(self, sequence: _Sequence, limit: int) -> tuple[Outlook, ...]:
        at, prompt = sequence.position, self.world.regime.prompt_tokens
        start = sequence.request_id * self.world.regime.request_tokens

        def lag(drafter: str) -> int:
            return at - sequence.caught_up.get(drafter, start - prompt) if drafter in self._laggards else 0

        return tuple(
            Outlook(s.drafter, min(s.available[at], limit), s.signal[at], lag(s.drafter), together=True) for s in self.world.streams
        )

    def _draft(self, running: Sequence[_Sequence]) -> list[_Drafted]:
        contexts = [self._context(sequence, len(running)) for sequence in running]
        began = perf_counter()
        unseen = self.controller.plan_unseen(contexts[0].task, len(running))
        plans = [unseen] * len(running) if unseen is not None else self.controller.plan_batch(contexts)
        self.outcome.control_seconds += perf_counter() - began
        drafts = [_Drafted(*parts) for parts in zip(running, plans, contexts, strict=True)]
        self._propose([d for d in drafts if d.plan.drafter is not None and d.plan.num_draft > 0])
        return drafts

    def _context(self, sequence: _Sequence, batch: int) -> RoundContext:
        limit = min(MAX_DRAFT, sequence.remaining - 1)
        regime = self.world.regime
        start = sequence.request_id * regime.request_tokens
        return RoundContext(
            request_id=sequence.request_id,
            context_length=regime.prompt_tokens + sequence.position - start,
            max_draft=limit,
            outlooks=self._outlooks(sequence, limit),
            batch_size=batch,
            task=regime.name,
        )

    def _propose(self, drafts: Sequence[_Drafted]) -> None:
        """Draft token by token, all sequences in step."""
        streams = [self._stream_of(drafted) for drafted in drafts]
        going = [(d, stream) for d, stream in zip(drafts, streams, strict=True) if stream.max_prob]
        for depth in range(1, max((d.plan.num_draft for d, _ in going), default=0) + 1):
            asked, going = going, []
            for d, stream in asked:
                more = self._asks(d, stream, d.sequence.position + depth - 1, depth)
                if more and depth < d.plan.num_draft:
                    going.append((d, stream))
                else:
                    d.count = depth
        for d, stream in zip(drafts, streams, strict=True):
            at = d.sequence.position
            if stream.max_prob:
                d.confidences = tuple(stream.max_prob[at : at + d.count])
            d.accepted = stream.run_length(at, d.count)
            if self.world.regime.exact_labels:
                observed = min(d.accepted + 1, d.count)
                d.acceptance = tuple(stream.chance(at + j, j + 1) for j in range(observed))

    def _stream_of(self, drafted: _Drafted) -> Stream:
        plan = drafted.plan
        index = next(i for i, s in enumerate(self.world.streams) if s.drafter == plan.drafter)
        drafted.outlook, drafted.count = drafted.context.outlooks[index], plan.num_draft
        if plan.num_draft > drafted.outlook.available:
            raise OptionError(
                f"controller = {self.controller.name!r}: planned {plan.num_draft} tokens where {drafted.outlook.available} exist"
            )
        return self.world.streams[index]

    def _asks(self, drafted: _Drafted, stream: Stream, position: int, depth: int) -> bool:
        max_prob = stream.max_prob[position]
        features = DraftFeatures(depth, max_prob, stream.token_prob[position], entropy_of(max_prob), margin_of(max_prob))
        began = perf_counter()
        more = self.controller.keep_drafting(drafted.sequence.request_id, features)
        self.outcome.control_seconds += perf_counter() - began
        return more

    def _commit(self, d: _Drafted, draft: float, verify: float, seconds: float, rows: int, emitted: int) -> None:
        record = StepRecord(
            request_id=d.sequence.request_id,
            drafter=d.plan.drafter if d.count else None,
            num_planned=d.plan.num_draft,
            num_drafted=d.count,
            num_accepted=d.accepted,
            num_emitted=d.accepted + 1,
            context_length=d.context.context_length,
            signal=d.outlook.signal,
            draft_seconds=draft,
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
        if d.count:
            # The last drafted token was never fed: after a full acceptance it is missing.
            d.sequence.caught_up[d.outlook.drafter] = d.sequence.position - (d.accepted == d.count)
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
    """Least time for the text by one who knows every coin, drafters' lags apart; see `study.replay` for batches.

    A draft that must catch up is charged for a request's prompt, once, and for no later lag: then this is a bound that nobody
    quite attains.
    """
    regime, costs, total = world.regime, world.regime.table(), 0.0
    prompt = {s.drafter: costs.t_draft(s.drafter, 1, regime.prompt_tokens) - costs.t_draft(s.drafter, 1) for s in world.streams}
    free = [s for s in world.streams if prompt[s.drafter] == 0]
    entry = min((seconds for seconds in prompt.values() if seconds > 0), default=0.0)
    for start in range(0, world.tokens, regime.request_tokens):
        end = min(start + regime.request_tokens, world.tokens)
        batch, factor = regime.load(start / world.tokens)
        least = _least_seconds(world, costs, world.streams, (start, end)) + entry * factor / batch
        if len(free) < len(world.streams):
            least = min(least, _least_seconds(world, costs, free, (start, end)))
        total += least
    return total


def _least_seconds(world: World, costs: CostTable, streams: Sequence[Stream], span: tuple[int, int]) -> float:
    """The best sequence of rounds over one request, by dynamic programming from its end."""
    regime, (start, end) = world.regime, span
    batch, factor = regime.load(start / world.tokens)
    best = [0.0] * (end - start + 1)
    for at in range(end - 1, start - 1, -1):
        context = regime.prompt_tokens + at - start
        least = costs.t_plain(context, batch) / batch * factor + best[at + 1 - start]
        for stream in streams:
            limit = min(MAX_DRAFT, end - at - 1, stream.available[at], stream.bluff or MAX_DRAFT)
            for k in range(1, stream.run_length(at, limit) + 1):
                draft = costs.t_draft(stream.drafter, k) * factor + costs.round_overhead
                seconds = (draft + costs.t_verify(batch * (k + 1), context) * factor) / batch
                least = min(least, seconds + best[at + k + 1 - start])
        best[at - start] = least
    return best[0]

"""A stop-or-continue policy learnt offline from recorded rounds: how far learning gets on one regime (ours; an experiment).

Fitted Q over a table (bin of the product of the draft's largest probabilities so far, recent acceptance, tokens drafted), solved
backwards within a round. The price of time is not given but found with the policy: Dinkelbach's iteration evaluates the greedy
policy on the recorded drafts (long enough to tell what any shorter draft would have got) and sets the price to its tokens a
second, until both agree. Trained on one draw of a regime and run on another it is an upper-bound experiment, not a controller
to ship: it has seen the regime, and learns nothing while running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import numpy as np

from paceline.control import registry
from paceline.control.base import Controller, RoundContext
from paceline.control.mdp import StopModel, bin_of
from paceline.costs import CostTable
from paceline.errors import OptionError
from paceline.records import DraftFeatures, Plan, StepRecord
from paceline.study.regimes import MAX_DRAFT
from paceline.study.simulator import Simulator, World, draw_world
from paceline.study.trace import Round, Tracing

CONFIDENCE_BINS = 12
RECENT_BINS = 4
_ITERATIONS = 8
_FORGET = 24
"""Plain rounds after which the recent acceptance counts as unknown, so that a request is not given up for good."""
_TRAINING_TOKENS = 4000


@dataclass(frozen=True, slots=True)
class OfflinePolicy:
    """What was learnt of one drafter."""

    drafter: str
    worth: tuple[float, ...]
    """In tokens, of drafting one more from each state of a `StopModel`; drafting pays above 0."""
    confident: bool
    """False: the drafter shows no confidences, and the signal of its match is the evidence throughout."""
    price: float
    """Tokens a second that all policies together reach on the recorded drafts."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """One recorded draft."""

    drafter: str
    recent: int
    first: int
    evidence: list[int]
    accepted: int


class _Rounds:
    """Collects in memory what `Tracing` would write to a file."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []

    def add(self, finished: Round) -> None:
        self.rounds.append(finished)


def record_world(world: World, num_draft: int = MAX_DRAFT) -> list[Round]:
    """Rounds of a world under `fixed` at `num_draft`: the longest drafts tell most."""
    kept = _Rounds()
    inner = registry.create("fixed", world.regime.table(), {"num_draft": num_draft})
    Simulator(world, Tracing(inner, kept)).run()
    return kept.rounds


def _empty_model() -> StopModel:
    return StopModel(CONFIDENCE_BINS, RECENT_BINS, MAX_DRAFT)


def _signal_bin(signal: int) -> int:
    return min(signal, CONFIDENCE_BINS - 1)


def _samples(rounds: Sequence[Round]) -> list[_Sample]:
    recent: dict[int, int] = {}
    samples = []
    for finished in rounds:
        record = finished.record
        if record.drafter is None or record.num_drafted == 0 or record.truncated:
            continue
        first = _signal_bin(record.signal)
        products = accumulate((f.max_prob for f in finished.features), mul)
        bins = [bin_of(p, 1.0, CONFIDENCE_BINS) for p in products] or [first] * record.num_drafted
        state = recent.get(record.request_id, RECENT_BINS - 1)
        samples.append(_Sample(record.drafter, state, first, bins, record.num_accepted))
        recent[record.request_id] = bin_of(record.num_accepted / record.num_drafted, 1.0, RECENT_BINS)
    return samples


def train(rounds: Sequence[Round], costs: CostTable) -> tuple[OfflinePolicy, ...]:
    """One policy for each drafter that drafted, at a common price. Raises OptionError when none did."""
    samples = _samples(rounds)
    if not samples:
        raise OptionError("trace: no round drafted anything; record with `fixed`")
    context = int(np.median([r.record.context_length for r in rounds]))
    models: dict[str, StopModel] = {}
    for s in samples:
        models.setdefault(s.drafter, _empty_model()).learn(s.recent, s.evidence, s.accepted, s.first)
    seconds = {name: np.array([_seconds(costs, name, k, context) for k in range(MAX_DRAFT + 1)]) for name in models}

    def solve(price: float) -> dict[str, list[float]]:
        return {name: model.solve(price, np.diff(seconds[name]).tolist()) for name, model in models.items()}

    price = 1 / costs.t_plain(context)
    worth = solve(price)
    for _ in range(_ITERATIONS):
        reached = _evaluate(samples, worth, seconds)
        if reached <= price * (1 + 1e-6):
            break
        price = reached
        worth = solve(price)
    confident = {r.record.drafter for r in rounds if r.features}
    return tuple(OfflinePolicy(name, tuple(w), name in confident, price) for name, w in worth.items())


def _seconds(costs: CostTable, drafter: str, num_draft: int, context: int) -> float:
    overhead = costs.round_overhead + costs.t_draft(drafter, num_draft) if num_draft else 0.0
    return overhead + costs.t_verify(num_draft + 1, context)


def _evaluate(samples: Sequence[_Sample], worth: dict[str, list[float]], seconds: dict[str, np.ndarray]) -> float:
    """Tokens a second of the greedy policies on the recorded drafts; a draft that they would prolong counts as recorded."""
    model = _empty_model()
    tokens = time = 0.0
    for s in samples:
        length, evidence = 0, s.first
        while length < len(s.evidence) and worth[s.drafter][model.index(evidence, s.recent, length)] > 0:
            evidence = s.evidence[length]
            length += 1
        tokens += min(length, s.accepted) + 1
        time += float(seconds[s.drafter][length])
    return tokens / time


class OfflineController(Controller):
    """Runs learnt policies: the drafter worth most now, its table's stop rule; nothing is learnt while running."""

    name = "offline_policy"

    def __init__(self, policies: Sequence[OfflinePolicy]) -> None:
        self.policies = {policy.drafter: policy for policy in policies}
        self._model = _empty_model()
        self._recent: dict[int, int] = {}
        self._idle: dict[int, int] = {}
        self._running: dict[int, OfflinePolicy] = {}
        self._product: dict[int, float] = {}

    def _worth(self, policy: OfflinePolicy, request_id: int, evidence: int, position: int) -> float:
        recent = self._recent.get(request_id, RECENT_BINS - 1)
        return policy.worth[self._model.index(evidence, recent, min(position, MAX_DRAFT))]

    def plan(self, context: RoundContext) -> Plan:
        request_id = context.request_id
        offers = [
            (self._worth(self.policies[o.drafter], request_id, _signal_bin(o.signal), 0), o)
            for o in context.outlooks
            if o.available > 0 and o.drafter in self.policies
        ]
        worth, outlook = max(offers, key=lambda offer: offer[0], default=(0.0, None))
        if outlook is None or worth <= 0:
            return Plan(None, 0, "policy: plain")
        self._product[request_id] = 1.0
        policy = self._running[request_id] = self.policies[outlook.drafter]
        length, signal = 1, _signal_bin(outlook.signal)
        limit = min(MAX_DRAFT, context.max_draft, outlook.available)
        while length < limit and (policy.confident or self._worth(policy, request_id, signal, length) > 0):
            length += 1
        return Plan(outlook.drafter, min(length, limit), f"policy: worth {worth:.2f} tokens")

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool:
        self._product[request_id] *= features.max_prob
        evidence = bin_of(self._product[request_id], 1.0, CONFIDENCE_BINS)
        return self._worth(self._running[request_id], request_id, evidence, features.position) > 0

    def observe(self, record: StepRecord) -> None:
        request_id = record.request_id
        if record.num_drafted == 0:
            self._idle[request_id] = self._idle.get(request_id, 0) + 1
            if self._idle[request_id] >= _FORGET:
                self._recent.pop(request_id, None)
        elif not record.truncated:
            self._idle[request_id] = 0
            self._recent[request_id] = bin_of(record.num_accepted / record.num_drafted, 1.0, RECENT_BINS)

    def finish(self, request_id: int) -> None:
        for state in (self._recent, self._idle, self._running, self._product):
            state.pop(request_id, None)


def train_for_world(world: World, costs: CostTable) -> OfflineController:
    """Train on another draw of the world's regime (on the same one where the regime is a trace, which has but one)."""
    other = draw_world(world.regime, world.seed + 1_000_003, max(world.tokens, _TRAINING_TOKENS))
    return OfflineController(train(record_world(other), costs))

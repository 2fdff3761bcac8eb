"""`mdp`: stop or continue, by a tabular decision process learnt while running.

In the manner of JointAdaSpec (public code): states of entropy bin, divergence bin and draft length, with neighbour smoothing where
visits are few. Deviations, ours: its state holds KL(q, p) of the coming token, which asks the target before every decision,
and which no controller here is given. The state is draft entropy (nats) and the last round's acceptance rate instead, and the
entropy is summed over the draft so far: without the target's view of them, earlier doubtful tokens must not be forgotten; the
verification threshold stays at 1, so it is lossless; since a round only moves forward, one backward pass replaces value
iteration; acceptance is shrunk towards the mean of its position, not by Laplace's rule, whose 1/2 is far too hopeful deep in a
draft. Reward: accepted tokens minus seconds at the current price, in place of 0.01 per millisecond.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from paceline.control.base import RoundContext, longest_outlook
from paceline.control.rounds import (
    Price,
    RoundCosts,
    StopRule,
    plan_first,
    require,
    require_count,
    require_length,
    require_number,
)
from paceline.costs import CostTable
from paceline.records import DraftFeatures, Plan, StepRecord

ENTROPY_TOP = 6.0
MIN_VISITS = 5
"""States with fewer visits borrow those of the neighbouring evidence bins."""
PRIOR_VISITS = 2
"""Weight of the position's mean acceptance in that of each state."""


def bin_of(value: float, top: float, bins: int) -> int:
    """Index of `value` in `bins` equal bins of [0, top]; the last one is open."""
    return min(max(int(value / top * bins), 0), bins - 1)


def state_index(evidence: int, other: int, position: int, num_others: int, num_positions: int) -> int:
    """Row of the table: evidence major, position minor."""
    return (evidence * num_others + other) * num_positions + position


@dataclass(slots=True)
class _Cell:
    """What was seen after drafting one more token from a state."""

    visits: int
    accepted: int
    nexts: list[int]


class StopModel:
    """Counts over (evidence, recent, position), and the policy that follows from them at a price.

    evidence: bin of what the draft has said of its tokens so far (before the first: 0, or what else is known); recent: bin of
    the last round's acceptance rate; position: tokens drafted so far.
    """

    def __init__(self, evidence_bins: int, recent_bins: int, k_max: int) -> None:
        self.evidence_bins = evidence_bins
        self.recent_bins = recent_bins
        self.k_max = k_max
        self._cells: dict[int, _Cell] = {}
        self._visits = [0] * k_max
        self._accepted = [0] * k_max

    def index(self, evidence: int, recent: int, position: int) -> int:
        return state_index(evidence, recent, position, self.recent_bins, self.k_max + 1)

    def learn(self, recent: int, evidence: Sequence[int], accepted: int, first: int = 0) -> None:
        """One round: evidence bin after each drafted token, how many were accepted, and the evidence before the first one."""
        before = first
        for position, after in enumerate(evidence[: self.k_max]):
            index = self.index(before, recent, position)
            cell = self._cells.setdefault(index, _Cell(0, 0, [0] * self.evidence_bins))
            cell.visits += 1
            cell.accepted += accepted > position
            self._visits[position] += 1
            self._accepted[position] += accepted > position
            cell.nexts[after] += 1
            before = after

    def _pooled(self, evidence: int, recent: int, position: int) -> _Cell:
        """A state's counts; with its evidence neighbours' where it has too few of its own."""
        own = self._cells.get(self.index(evidence, recent, position))
        if own is not None and own.visits >= MIN_VISITS:
            return own
        pooled = _Cell(0, 0, [0] * self.evidence_bins)
        for near in range(max(evidence - 1, 0), min(evidence + 2, self.evidence_bins)):
            cell = self._cells.get(self.index(near, recent, position))
            if cell is not None:
                pooled.visits += cell.visits
                pooled.accepted += cell.accepted
                pooled.nexts = [a + b for a, b in zip(pooled.nexts, cell.nexts, strict=True)]
        return pooled

    def solve(self, price: float, marginal_seconds: Sequence[float]) -> list[float]:
        """Worth, in tokens, of drafting one more from each state; drafting pays where it is above 0.

        price: tokens a second. marginal_seconds[j]: what token j + 1 adds to the round, for j < k_max. States never seen
        at all are worth 0.
        """
        worth = [0.0] * (self.evidence_bins * self.recent_bins * (self.k_max + 1))
        for position in range(self.k_max - 1, -1, -1):
            cost = price * marginal_seconds[position]
            prior = PRIOR_VISITS * self._accepted[position] / max(self._visits[position], 1)
            for recent in range(self.recent_bins):
                later = [max(worth[self.index(e, recent, position + 1)], 0.0) for e in range(self.evidence_bins)]
                for evidence in range(self.evidence_bins):
                    cell = self._pooled(evidence, recent, position)
                    if cell.visits:
                        chance = (cell.accepted + prior) / (cell.visits + PRIOR_VISITS)
                        future = sum(n * v for n, v in zip(cell.nexts, later, strict=True)) / cell.visits
                        worth[self.index(evidence, recent, position)] = chance - cost + future
        return worth


@dataclass(frozen=True, slots=True, kw_only=True)
class MdpOptions:
    """Options of `mdp`."""

    k_max: int = 8
    entropy_bins: int = 20
    recent_bins: int = 5
    explore: float = 0.05
    """Chance of a round that drafts `k_max` whatever the policy says."""
    first_solve: int = 32
    """Drafting rounds before the first solution, which all explore; the next ones follow at twice the rounds each, at most
    256 apart."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_count("entropy_bins", self.entropy_bins)
        require_count("recent_bins", self.recent_bins)
        require_count("first_solve", self.first_solve)
        require_number("explore", self.explore, 0.0, 1.0)
        require(isinstance(self.seed, int), "seed", self.seed, "must be a whole number")


class Mdp(StopRule):
    """Learns one table for the engine. A drafter without confidences is taken to have entropy 0 everywhere."""

    name = "mdp"
    options_type = MdpOptions

    def __init__(self, options: MdpOptions, costs: CostTable) -> None:
        super().__init__()
        self.options = options
        self.k_max = options.k_max
        self._costs = RoundCosts(costs, options.k_max)
        self.price = Price()
        self.model = StopModel(options.entropy_bins, options.recent_bins, options.k_max)
        self._worth: list[float] | None = None
        self._rounds = 0
        self._next_solve = options.first_solve
        self._random = random.Random(options.seed)
        self._recent: dict[int, int] = {}
        self._exploring: set[int] = set()
        self._entropy: dict[int, float] = {}
        self._seconds: list[float] = []

    def _recent_bin(self, request_id: int) -> int:
        return self._recent.get(request_id, self.options.recent_bins - 1)

    def _pays(self, request_id: int, evidence: int, position: int) -> bool:
        if self._worth is None or request_id in self._exploring:
            return True
        return self._worth[self.model.index(evidence, self._recent_bin(request_id), position)] > 0

    def plan(self, context: RoundContext) -> Plan:
        super().plan(context)
        request_id, outlook = context.request_id, longest_outlook(context)
        if outlook is None:
            return Plan(None, 0, "nothing to draft")
        self._seconds = self._costs.seconds(context, outlook.drafter)
        self._exploring.discard(request_id)
        self._entropy[request_id] = 0.0
        explores = self._worth is None or self._random.random() < self.options.explore
        if explores:
            self._exploring.add(request_id)
        length = self.k_max if self._pays(request_id, 0, 0) else 0
        return plan_first(context, length, "explores" if explores else "table", probe=explores)

    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        if features.position >= self.k_max:
            return False
        total = self._entropy.get(request_id, 0.0) + features.entropy
        self._entropy[request_id] = total
        return self._pays(request_id, self._bin(total), features.position)

    def _bin(self, entropy: float) -> int:
        return bin_of(entropy, ENTROPY_TOP, self.options.entropy_bins)

    def observe(self, record: StepRecord) -> None:
        features = self.seen(record)
        self.price.add(record)
        if record.num_drafted == 0 or record.truncated:
            return
        entropies = [f.entropy for f in features] + [0.0] * (record.num_drafted - len(features))
        bins = [self._bin(total) for total in accumulate(entropies)]
        self.model.learn(self._recent_bin(record.request_id), bins, record.num_accepted)
        rate = record.num_accepted / record.num_drafted
        self._recent[record.request_id] = bin_of(rate, 1.0, self.options.recent_bins)
        self._rounds += 1
        if self._rounds >= self._next_solve:
            self._next_solve = self._rounds + min(self._rounds, 256)
            marginal = [after - before for before, after in pairwise(self._seconds)]
            self._worth = self.model.solve(self.price.value(self._seconds[0]), marginal)

    def finish(self, request_id: int) -> None:
        super().finish(request_id)
        self._recent.pop(request_id, None)
        self._entropy.pop(request_id, None)
        self._exploring.discard(request_id)

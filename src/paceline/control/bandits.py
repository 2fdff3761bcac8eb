"""`ucb` and `exp3`: draft lengths as arms of a bandit.

Source: BanditSpec, arXiv 2505.15141: index and weights are the paper's (the square root of the index is restored from the usual
self-normalised bound; the released code differs and is not followed). Known objective: tokens a round, as if rounds cost the
same. Ours: rounds are charged for their time, Y' = Y - rho * (T - t_plain) with rho = the best ratio of sums so far, so that
the bandit maximises tokens a second, and plain decoding is an arm of known value 1. Lossless: only finished rounds are used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.control.base import Controller, RoundContext
from paceline.control.rounds import (
    Price,
    plan_first,
    require,
    require_length,
    require_list,
    require_number,
    round_seconds,
    round_yield,
)
from paceline.costs import CostTable
from paceline.records import Plan, StepRecord


def ucb_index(mean: float, count: int, time: int, arms: int, longest: int, delta: float) -> float:
    """mean + (L/2) * sqrt((1 + n) / n^2 * (1 + 2 log(K t^2 sqrt(1 + n) / delta))); n = count >= 1, t = time, K = arms."""
    inside = 1 + 2 * math.log(arms * time**2 * math.sqrt(1 + count) / delta)
    return mean + longest / 2 * math.sqrt((1 + count) / count**2 * inside)


def exp3_weights(losses: Sequence[float], time: int) -> list[float]:
    """Probabilities of the arms at round `time` >= 1: softmax of -eta * losses with eta = sqrt(log K / (t K))."""
    eta = math.sqrt(math.log(len(losses)) / (time * len(losses)))
    low = min(losses)
    raw = [math.exp(-eta * (loss - low)) for loss in losses]
    total = sum(raw)
    return [w / total for w in raw]


@dataclass(frozen=True, slots=True, kw_only=True)
class UcbOptions:
    """Options of `ucb`."""

    lengths: Sequence[int] = (1, 2, 4, 8)
    """Draft lengths to choose from; plain decoding (0) is always there besides."""
    delta: float = 0.1
    """Confidence of the published bound."""
    exploration: float = 0.1
    """Factor on the bonus. 1 is the published index, whose bonus shrinks over thousands of rounds; 0.1 is ours."""

    def __post_init__(self) -> None:
        _require_lengths(self)
        require_number("delta", self.delta, 1e-9, 1.0)
        require_number("exploration", self.exploration, 0.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exp3Options:
    """Options of `exp3`."""

    lengths: Sequence[int] = (1, 2, 4, 8)
    """Draft lengths to choose from; plain decoding (0) is always there besides."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require_lengths(self)
        require(isinstance(self.seed, int), "seed", self.seed, "must be a whole number")


def _require_lengths(options: UcbOptions | Exp3Options) -> None:
    require_list("lengths", options.lengths)
    object.__setattr__(options, "lengths", tuple(options.lengths))
    for length in options.lengths:
        require_length("lengths", length, 1)
    require(list(options.lengths) == sorted(set(options.lengths)), "lengths", options.lengths, "lengths must rise")


@dataclass(slots=True)
class Arm:
    """Sums over the rounds in which an arm was played; the charge for time is applied when read, at today's price."""

    count: int = 0
    tokens: float = 0.0
    extra_seconds: float = 0.0
    """Seconds beyond a plain step."""

    def mean(self, price: float) -> float:
        """Mean of Y - price * (T - t_plain)."""
        return (self.tokens - price * self.extra_seconds) / self.count


class LengthBandit(Controller):
    """What both bandits share: which arm a round belongs to, and what it earned. One bandit serves the engine."""

    def __init__(self, lengths: Sequence[int], costs: CostTable) -> None:
        self.lengths = (0, *lengths)
        self.costs = costs
        self.price = Price()
        self._plain: dict[int, float] = {}
        self._played: dict[int, int] = {}

    def begin(self, context: RoundContext, arm: int, reason: str) -> Plan:
        """Play `arm`. A round cut short by what the drafter had counts for the arm; one without drafts for none."""
        plan = plan_first(context, self.lengths[arm], reason)
        self._plain[context.request_id] = round_seconds(self.costs, context, None, 0)
        if plan.num_draft or arm == 0:
            self._played[context.request_id] = arm
        return plan

    def outcome(self, record: StepRecord) -> tuple[int, float, float] | None:
        """(arm, tokens, seconds beyond plain) of a round to learn from, else None."""
        arm = self._played.pop(record.request_id, None)
        if arm is None or record.truncated or record.warmup:
            return None
        self.price.add(record)
        tokens, seconds = round_yield(record)
        return arm, tokens, seconds - self._plain[record.request_id]

    def finish(self, request_id: int) -> None:
        self._played.pop(request_id, None)
        self._plain.pop(request_id, None)


class Ucb(LengthBandit):
    """Each length once, then the largest upper confidence bound; plain decoding has the known value 1 and no bonus."""

    name = "ucb"
    options_type = UcbOptions

    def __init__(self, options: UcbOptions, costs: CostTable) -> None:
        super().__init__(options.lengths, costs)
        self.options = options
        self.arms = [Arm() for _ in self.lengths]

    def plan(self, context: RoundContext) -> Plan:
        untried = next((i for i, arm in enumerate(self.arms) if i > 0 and arm.count == 0), None)
        if untried is not None:
            return self.begin(context, untried, "first try")
        price = self.price.value(round_seconds(self.costs, context, None, 0))
        indices = [1.0] + [self._index(arm, price) for arm in self.arms[1:]]
        best = max(range(len(indices)), key=indices.__getitem__)
        return self.begin(context, best, f"index {indices[best]:.2f} tokens")

    def _index(self, arm: Arm, price: float) -> float:
        time = 1 + sum(a.count for a in self.arms)
        mean = arm.mean(price)
        bound = ucb_index(mean, arm.count, time, len(self.arms), self.lengths[-1], self.options.delta)
        return mean + self.options.exploration * (bound - mean)

    def observe(self, record: StepRecord) -> None:
        outcome = self.outcome(record)
        if outcome is not None:
            arm = self.arms[outcome[0]]
            arm.count += 1
            arm.tokens += outcome[1]
            arm.extra_seconds += outcome[2]


class Exp3(LengthBandit):
    """Exponential weights on importance-weighted losses (L + 1 - Y') / L, clipped to [0, 2]."""

    name = "exp3"
    options_type = Exp3Options

    def __init__(self, options: Exp3Options, costs: CostTable) -> None:
        super().__init__(options.lengths, costs)
        self._random = random.Random(options.seed)
        self.losses = [0.0] * len(self.lengths)
        self.time = 1
        self._chance: dict[int, float] = {}

    def plan(self, context: RoundContext) -> Plan:
        weights = exp3_weights(self.losses, self.time)
        arm = self._random.choices(range(len(weights)), weights)[0]
        self._chance[context.request_id] = weights[arm]
        return self.begin(context, arm, f"drawn with chance {weights[arm]:.2f}")

    def observe(self, record: StepRecord) -> None:
        outcome = self.outcome(record)
        if outcome is None:
            return
        arm, tokens, extra = outcome
        seconds = self._plain[record.request_id]
        self.learn(arm, tokens - self.price.value(seconds) * extra, self._chance[record.request_id])

    def learn(self, arm: int, value: float, chance: float) -> None:
        """One round in which `arm`, drawn with probability `chance`, earned `value` = Y' tokens."""
        longest = self.lengths[-1]
        loss = min(max((longest + 1 - value) / longest, 0.0), 2.0)
        self.losses[arm] += loss / chance
        self.time += 1

    def finish(self, request_id: int) -> None:
        super().finish(request_id)
        self._chance.pop(request_id, None)

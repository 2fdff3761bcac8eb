"""`tapout`: a bandit over stop rules.

Source: TapOut, arXiv 2511.02017. Known (abstract): an online, training-free bandit chooses among parameter-free stop strategies
from past reward. Not verified: its arms, and its reward (reported as half A / k_max, half A / k). Ours: the arms below, a choice of
that reward or of the priced one of `bandits.py`, and discounted UCB1. Lossless: the arm is chosen from finished rounds, and
every arm keeps the token at which it stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from paceline.control.base import RoundContext
from paceline.control.rounds import (
    Price,
    StopRule,
    plan_first,
    require,
    require_length,
    require_number,
    round_seconds,
    round_yield,
)
from paceline.costs import CostTable
from paceline.records import DraftFeatures, Plan, StepRecord

Stop = Callable[[DraftFeatures, float], bool]
"""(features of the token just drawn, product of the round's largest probabilities so far) -> stop?"""


@dataclass(frozen=True, slots=True)
class Strategy:
    """One arm: a length and a stop rule."""

    name: str
    length: int
    stop: Stop | None = None


def strategies(k_max: int) -> tuple[Strategy, ...]:
    """Plain decoding, three lengths and three stop rules; lengths never exceed `k_max`."""
    fixed = tuple(Strategy(f"fixed {k}", k) for k in (2, 4, 8) if k <= k_max)
    rules = (
        Strategy("confidence 0.4", k_max, lambda f, _: f.max_prob < 0.4),
        Strategy("entropy 0.6", k_max, lambda f, _: f.entropy > 0.6),
        Strategy("survival 0.3", k_max, lambda _, survival: survival < 0.3),
    )
    return (Strategy("plain", 0), *fixed, *rules)


def ucb1(mean: float, count: float, time: float) -> float:
    """mean + sqrt(2 ln t / n)."""
    return mean + math.sqrt(2 * math.log(max(time, 1.0)) / count)


def blended_reward(accepted: int, drafted: int, k_max: int) -> float:
    """Half acceptance per slot, half acceptance rate."""
    return 0.5 * accepted / k_max + 0.5 * accepted / drafted


@dataclass(frozen=True, slots=True, kw_only=True)
class TapOutOptions:
    """Options of `tapout`."""

    k_max: int = 12
    reward: str = "priced"
    """`priced`: (tokens charged for time) / (k_max + 1); `blended`: the one attributed to the paper, blind to time."""
    discount: float = 0.98
    """Weight of the past in an arm's mean and count."""
    exploration: float = 0.02
    """Factor on the UCB1 bonus (1: the textbook one; arms differ by little of the range, so ours is 0.02)."""

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require(self.reward in ("priced", "blended"), "reward", self.reward, "choose `priced` or `blended`")
        require_number("discount", self.discount, 0.5, 1.0)
        require_number("exploration", self.exploration, 0.0, 100.0)


@dataclass(slots=True)
class _Arm:
    strategy: Strategy
    count: float = 0.0
    reward: float = 0.0


class TapOut(StopRule):
    """Each arm once, then discounted UCB1. Without confidences the stop rules are the fixed length `k_max`."""

    name = "tapout"
    options_type = TapOutOptions

    def __init__(self, options: TapOutOptions, costs: CostTable) -> None:
        super().__init__()
        self.options = options
        self.costs = costs
        self.price = Price()
        self.arms = [_Arm(s) for s in strategies(options.k_max)]
        self._chosen: dict[int, _Arm] = {}
        self._survival: dict[int, float] = {}
        self._plain: dict[int, float] = {}

    def plan(self, context: RoundContext) -> Plan:
        request_id, arm = context.request_id, self._choose()
        self._chosen[request_id] = arm
        self._survival[request_id] = 1.0
        self._plain[request_id] = round_seconds(self.costs, context, None, 0)
        return plan_first(context, arm.strategy.length, arm.strategy.name)

    def _choose(self) -> _Arm:
        untried = next((arm for arm in self.arms if arm.count == 0), None)
        if untried is not None:
            return untried
        time = sum(arm.count for arm in self.arms)

        def index(arm: _Arm) -> float:
            mean = arm.reward / arm.count
            return mean + self.options.exploration * (ucb1(mean, arm.count, time) - mean)

        return max(self.arms, key=index)

    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        arm = self._chosen.get(request_id)
        survival = self._survival.get(request_id, 1.0) * features.max_prob
        self._survival[request_id] = survival
        return arm is None or arm.strategy.stop is None or not arm.strategy.stop(features, survival)

    def observe(self, record: StepRecord) -> None:
        arm = self._chosen.pop(record.request_id, None)
        if arm is None or record.truncated or record.warmup or (record.num_drafted == 0 and arm.strategy.length > 0):
            return
        self.price.add(record)
        reward = self._reward(record)
        for other in self.arms:
            other.count *= self.options.discount
            other.reward *= self.options.discount
        arm.count += 1
        arm.reward += reward

    def _reward(self, record: StepRecord) -> float:
        k_max = self.options.k_max
        if self.options.reward == "blended":
            return blended_reward(record.num_accepted, record.num_drafted, k_max) if record.num_drafted else 0.0
        tokens, seconds = round_yield(record)
        plain = self._plain[record.request_id]
        value = tokens - self.price.value(plain) * (seconds - plain)
        return min(max(value / (k_max + 1), 0.0), 1.0)

    def finish(self, request_id: int) -> None:
        super().finish(request_id)
        for state in (self._chosen, self._survival, self._plain):
            state.pop(request_id, None)

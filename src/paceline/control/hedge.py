"""`hedge`: exponential weights over draft lengths, every length scored after every round.

Source: HedgeSpec, arXiv 2510.20064, which weighs drafters by NormalHedge on exact 1 - TV at each position. Known: full
information, and the value sum of products of 1 - TV. Ours: the experts are lengths (one verified round tells what every
shorter one would have got), plain Hedge with discounted gains, values charged for time, and 1 - TV is the exact acceptance
that a record carries (0 or 1 where it carries none). Lossless: only finished rounds are used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from paceline.control.base import Controller, RoundContext, longest_outlook
from paceline.control.rounds import Price, RoundCosts, plan_first, require, require_length, require_number
from paceline.costs import CostTable
from paceline.records import Plan, StepRecord


def hedge_weights(gains: Sequence[float], eta: float) -> list[float]:
    """Softmax of eta * gains."""
    top = max(gains)
    raw = [math.exp(eta * (gain - top)) for gain in gains]
    total = sum(raw)
    return [w / total for w in raw]


def expected_accepted(acceptance: Sequence[float]) -> float:
    """Sum over n of g_1 * ... * g_n: the expected accepted length of a chain."""
    return sum(survivals(acceptance))


def survivals(acceptance: Sequence[float]) -> list[float]:
    """S_1, S_2, ...: running products."""
    out: list[float] = []
    product = 1.0
    for a in acceptance:
        product *= a
        out.append(product)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgeOptions:
    """Options of `hedge`."""

    k_max: int = 12
    eta: float = 0.5
    """Learning rate on gains in tokens a round."""
    discount: float = 0.97
    """Weight of past gains (1: plain Hedge, which follows no drift)."""
    explore: float = 0.02
    """Chance of a random length, so that lengths that were given up are still observed."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_length("k_max", self.k_max, 1)
        require_number("eta", self.eta, 0.0, 1e3)
        require_number("discount", self.discount, 0.0, 1.0)
        require_number("explore", self.explore, 0.0, 1.0)
        require(isinstance(self.seed, int), "seed", self.seed, "must be a whole number")


class Hedge(Controller):
    """Draws a length by weight, then credits all lengths with what the round says they would have earned.

    Beyond the drafted tokens (all accepted, or exact labels) acceptance is taken to go on at the discounted mean rate.
    """

    name = "hedge"
    options_type = HedgeOptions

    def __init__(self, options: HedgeOptions, costs: CostTable) -> None:
        self.options = options
        self._costs = RoundCosts(costs, options.k_max)
        self.price = Price()
        self.gains = [0.0] * (options.k_max + 1)
        self._random = random.Random(options.seed)
        self._label_sum, self._label_count = 1.6, 2.0
        self._contexts: dict[int, RoundContext] = {}

    def plan(self, context: RoundContext) -> Plan:
        self._contexts[context.request_id] = context
        outlook = longest_outlook(context)
        if outlook is None:
            return Plan(None, 0, "nothing to draft")
        bound = min(self.options.k_max, context.max_draft, outlook.available)
        if self._random.random() < self.options.explore:
            return plan_first(context, self._random.randint(0, bound), "explores", probe=True)
        weights = hedge_weights(self.gains[: bound + 1], self.options.eta)
        length = self._random.choices(range(bound + 1), weights)[0]
        return plan_first(context, length, f"weight {weights[length]:.2f}")

    def observe(self, record: StepRecord) -> None:
        context = self._contexts.get(record.request_id)
        self.price.add(record)
        seen = record.labels
        if context is None or record.drafter is None or not seen:
            return
        decay = self.options.discount
        self._label_sum = decay * self._label_sum + sum(seen)
        self._label_count = decay * self._label_count + len(seen)
        mean = self._label_sum / self._label_count
        self.learn(self._values([*seen, *[mean] * (self.options.k_max - len(seen))], context, record.drafter))

    def _values(self, acceptance: Sequence[float], context: RoundContext, drafter: str) -> list[float]:
        """E[Y] - rho * T of every length, in tokens."""
        seconds = self._costs.seconds(context, drafter)
        price = self.price.value(seconds[0])
        emitted = accumulate(survivals(acceptance), initial=1.0)
        return [tokens - price * spent for tokens, spent in zip(emitted, seconds, strict=False)]

    def learn(self, values: Sequence[float]) -> None:
        """Add one round's value of every length (tokens)."""
        self.gains = [self.options.discount * g + v for g, v in zip(self.gains, values, strict=True)]

    def finish(self, request_id: int) -> None:
        self._contexts.pop(request_id, None)

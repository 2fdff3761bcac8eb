"""What the published controllers share: option checks, plans for the first drafter, time and yield of rounds."""

from __future__ import annotations

from abc import abstractmethod

from paceline.control.base import Controller, RoundContext, longest_outlook
from paceline.costs import CostTable
from paceline.errors import OptionError
from paceline.records import DraftFeatures, Plan, StepRecord


def require(ok: bool, name: str, value: object, need: str) -> None:
    """Raises OptionError that names the option, its value and what is needed, unless `ok`."""
    if not ok:
        raise OptionError(f"{name} = {value!r}: {need}")


def require_length(name: str, value: object, low: int = 0) -> None:
    """A draft length: a whole number in [low, 63]."""
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= 63
    require(ok, name, value, f"must be a whole number in [{low}, 63]")


def require_count(name: str, value: object, low: int = 1) -> None:
    """A number of rounds, tokens or samples: a whole number >= low."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
    require(ok, name, value, f"must be a whole number >= {low}")


def require_number(name: str, value: object, low: float, high: float) -> None:
    """A number in [low, high]; NaN is refused."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    require(ok, name, value, f"must be a number in [{low:g}, {high:g}]")


def require_list(name: str, value: object) -> None:
    """A non-empty list or tuple."""
    require(isinstance(value, (list, tuple)) and len(value) > 0, name, value, "must be a list with at least one entry")


def plan_first(context: RoundContext, length: int, reason: str, *, probe: bool = False) -> Plan:
    """Draft `length` tokens, or as many as there are, with the first drafter that has something to propose."""
    outlook = longest_outlook(context)
    if outlook is None:
        return Plan(None, 0, "nothing to draft")
    num_draft = min(length, context.max_draft, outlook.available)
    return Plan(outlook.drafter, num_draft, reason, probe=probe) if num_draft > 0 else Plan(None, 0, reason)


def round_yield(record: StepRecord) -> tuple[float, float]:
    """Tokens and seconds of a round; in a batch both are a sequence's even share of the whole round."""
    batch = max(record.batch_size, 1)
    return (record.batch_emitted or record.num_emitted * batch) / batch, record.round_seconds / batch


def round_seconds(costs: CostTable, context: RoundContext, drafter: str | None, num_draft: int) -> float:
    """Predicted seconds of a round in which every sequence drafts `num_draft` tokens (0: a plain step), a sequence's share."""
    batch = max(context.batch_size, 1)
    if drafter is None or num_draft == 0:
        return costs.t_plain(context.context_length, batch) / batch
    verify = costs.t_verify(batch * (num_draft + 1), context.context_length)
    return (costs.round_overhead + costs.t_draft(drafter, num_draft) + verify) / batch


class RoundCosts:
    """`round_seconds` of all lengths, kept while batch, drafter and context (to 64 tokens) stay the same."""

    def __init__(self, costs: CostTable, k_max: int) -> None:
        self._costs = costs
        self._k_max = k_max
        self._key: tuple[object, ...] = ()
        self._seconds: list[float] = []

    def seconds(self, context: RoundContext, drafter: str) -> list[float]:
        """Seconds of a sequence's share of the round for each length 0..k_max; do not write into it."""
        key = drafter, context.batch_size, context.context_length >> 6, self._costs.scale
        if key != self._key:
            self._key = key
            self._seconds = [round_seconds(self._costs, context, drafter, k) for k in range(self._k_max + 1)]
        return self._seconds


class Price:
    """Tokens a second that time is worth: the better of plain decoding and of the (discounted) ratio of sums seen so far."""

    def __init__(self, discount: float = 0.99) -> None:
        self._discount = discount
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, record: StepRecord) -> None:
        """Learn from a finished round; cold rounds and rounds without a time are left out."""
        tokens, seconds = round_yield(record)
        if record.warmup or seconds <= 0:
            return
        self._tokens = self._discount * self._tokens + tokens
        self._seconds = self._discount * self._seconds + seconds

    def value(self, plain_seconds: float) -> float:
        """Tokens a second, for one sequence; `plain_seconds` is its share of a plain step (0: unknown)."""
        plain = 1.0 / plain_seconds if plain_seconds > 0 else 0.0
        return max(plain, self._tokens / self._seconds if self._seconds > 0 else 0.0)


class BatchTally:
    """Adds up the records of one batched round; `add` gives the sums once all sequences have reported."""

    def __init__(self) -> None:
        self._accepted = self._drafted = self._drafting = self._seen = 0

    def add(self, record: StepRecord) -> tuple[int, int, int] | None:
        """(accepted, drafted, sequences that drafted) when the round is complete, else None."""
        self._seen += 1
        if not record.truncated:
            self._accepted += record.num_accepted
            self._drafted += record.num_drafted
            self._drafting += record.num_drafted > 0
        if self._seen < record.batch_size:
            return None
        sums = self._accepted, self._drafted, self._drafting
        self._accepted = self._drafted = self._drafting = self._seen = 0
        return sums


class StopRule(Controller):
    """Base of rules that plan `k_max` tokens and stop while drafting; keeps the features of the round under way.

    Drafters without confidences (n-gram, suffix) never ask `keep_drafting`, or ask it with probabilities of 1: there a stop
    rule is the fixed length `k_max`.
    """

    k_max: int
    """Most tokens of a round; set by the subclass."""

    def __init__(self) -> None:
        self._features: dict[int, list[DraftFeatures]] = {}

    def plan(self, context: RoundContext) -> Plan:
        self._features.pop(context.request_id, None)
        return plan_first(context, self.k_max, f"up to {self.k_max}, {self.name} stops")

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool:
        self._features.setdefault(request_id, []).append(features)
        return self.go_on(request_id, features)

    @abstractmethod
    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        """The rule itself, asked after each drawn token (which is kept)."""

    def finish(self, request_id: int) -> None:
        self._features.pop(request_id, None)

    def seen(self, record: StepRecord) -> list[DraftFeatures]:
        """The features of the finished round, forgotten here; at most one for each drafted token."""
        return self._features.pop(record.request_id, [])[: record.num_drafted]

"""One forward for many sequences: which of their possible draft tokens are worth a place in it.

DSpark's ranking (arXiv 2607.05147; 7.6 of the control notes), but before anything is drafted, so that it decides on drafting, too:
a drafted token is kept with the product of its path's rates, so chances only fall along a draft, and taking tokens in the order of
their chances takes beginnings of drafts. One scan in that order finds the round with the most tokens a second; its start is plain
decoding. Ours: the price of drafts whose steps are shared, and the stop rule. A shared step is dear and a row is cheap, so likely
tokens far down one draft may be worth less than unlikelier ones of all drafts: there is a scan for each depth that drafts may have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace, nlargest
from math import prod

import numpy as np

from paceline.control.base import RoundContext
from paceline.records import Outlook

_LEAST_CHANCE = 0.02
"""Chance of acceptance under which a token is no candidate, unless it is a draft's first one."""
_DEEP = 8
"""Depth up to which rounds are searched, or twice what each sequence has on average, if that is more."""
_HEAVIEST, _PACE = 2.0, 3
"""Largest weight of a sequence's tokens (and its inverse the least), and drafted tokens that tell its pace."""


@dataclass(slots=True)
class Share:
    """What one sequence could bring to the round."""

    context: RoundContext
    outlook: Outlook
    rates: list[float]
    """Chances of the draft's tokens, each given that those before it are accepted."""
    fixed: float
    per_token: float
    """Its drafter's seconds: for a draft, and for each token."""
    once: float
    """Seconds before its first drafted token: what the draft's cache must catch up."""
    weight: float = 1.0
    """What a token of this sequence counts for; 1 on average."""
    num_draft: int = 0
    """Tokens that it was given."""
    emitted: float = 1.0
    """Tokens that it expects to emit."""


@dataclass(slots=True)
class Allocation:
    """Rounds with 0, 1, 2, ... drafted tokens in all, in the order of their chances."""

    shares: Sequence[Share]
    forwards: Sequence[float]
    """As in `allocate`."""
    order: list[int]
    """The share that each token belongs to."""
    seconds: list[float]
    """Of the whole round."""
    emitted: list[float]
    """Tokens that drafts are expected to add to one for each sequence. Of sequences that would not end last they count for less: a
    batch is hardly done earlier for them."""

    def best(self, batch: int) -> int:
        """Drafted tokens in all (1 at least) of the round with the most tokens a second."""
        return max(range(1, len(self.seconds)), key=lambda m: (batch + self.emitted[m]) / self.seconds[m])

    def give(self, count: int) -> None:
        """Write the first `count` tokens to the shares."""
        for share in self.shares:
            share.num_draft, share.emitted = 0, 1.0
        chances = [1.0] * len(self.shares)
        for i in self.order[:count]:
            share = self.shares[i]
            chances[i] *= share.rates[share.num_draft]
            share.num_draft += 1
            share.emitted += chances[i]


def weigh(shares: Sequence[Share]) -> None:
    """Let tokens count for more in sequences that have more rounds left than others at their present pace.

    A batch is done when its slowest sequence is. Taking the likeliest tokens alone lets the easy sequences run away, and those
    that are left then end in rounds that are no longer full, which take about as long as full ones.
    """
    left = []
    for share in shares:
        chance = tokens = 1.0
        for rate in share.rates[:_PACE]:
            chance *= rate
            tokens += chance
        left.append(share.context.remaining / tokens)
    mean = sum(left) / len(left)
    weights = [min(max(rounds / mean, 1.0 / _HEAVIEST), _HEAVIEST) for rounds in left]
    norm = len(weights) / sum(weights)
    for share, weight in zip(shares, weights, strict=True):
        share.weight = norm * weight


def allocate(
    shares: Sequence[Share],
    forwards: Sequence[float],
    serial: float,
    each: float,
    once: float = 0.0,
    most: int | None = None,
    deepest: int | None = None,
) -> Allocation:
    """Price all rounds that take the likeliest tokens. Weights decide who gets a place, and never make a gain larger.

    forwards: seconds of a forward with 0, 1, 2, ... drafted rows, at least one for each rate and one more; serial: 1 where drafts
    of a batch are made one after another, 0 where they share their steps; each, once: seconds of a drafted token, and of a round
    with any, outside forward and draft; most: drafted tokens in all; deepest: and of a sequence.
    """
    if most is None:
        most = sum(len(share.rates) for share in shares)
    # Of each share the next token alone is in the heap: few of all tokens are ever looked at.
    heap = [(-share.weight * share.rates[0], i, 1, share.rates[0]) for i, share in enumerate(shares)]
    heapify(heap)
    depth_of: dict[str, int] = {}
    found = Allocation(shares, forwards, [], [forwards[0]], [0.0])
    host, emitted = once, 0.0
    while heap and len(found.order) < most:
        _, i, depth, chance = heap[0]
        share = shares[i]
        following = chance * share.rates[depth] if depth < min(len(share.rates), deepest or depth + 1) else 0.0
        if following >= _LEAST_CHANCE:
            heapreplace(heap, (-share.weight * following, i, depth + 1, following))
        else:
            heappop(heap)
        drafter = share.outlook.drafter
        host += each + serial * share.per_token
        if depth == 1:
            host += share.once + serial * share.fixed
        if depth > (deep := depth_of.get(drafter, 0)):
            host += (1.0 - serial) * (share.per_token * (depth - deep) + (share.fixed if deep == 0 else 0.0))
            depth_of[drafter] = depth
        emitted += chance * min(share.weight, 1.0)
        found.order.append(i)
        # Near equals are noisy: a row is never a gain of time.
        found.seconds.append(max(forwards[len(found.order)], forwards[0]) + host)
        found.emitted.append(emitted)
    return found


def best_round(
    shares: Sequence[Share],
    forwards: Sequence[float],
    serial: float,
    each: float,
    once: float = 0.0,
    most: int | None = None,
    *,
    batch: int,
) -> tuple[Allocation, int]:
    """The round with the most tokens a second, whatever depth its drafts have: the scan that found it, and its drafted tokens.

    As `allocate` with every `deepest` in turn and `Allocation.best` of each, which is the readable form; here over arrays, one row
    for each depth, for it runs in every round. Arguments as there; batch: sequences, also those without a draft.
    """
    last = len(forwards) - 1 if most is None else min(len(forwards) - 1, most)
    width = min(max(len(share.rates) for share in shares), max(_DEEP, 2 * last // len(shares)))
    chances = np.array([(share.rates + [0.0] * width)[:width] for share in shares]).cumprod(1)
    weights = np.array([share.weight for share in shares])
    likely = chances >= _LEAST_CHANCE
    likely[:, 0] = True
    (places,) = likely.ravel().nonzero()
    places = places[(-(weights[:, None] * chances).ravel()[places]).argsort(kind="stable")]
    owners, depths = np.divmod(places, width)
    depths += 1
    taken = depths <= np.arange(1, depths.max() + 1)[:, None]
    counts = taken.cumsum(1)
    emitted = (taken * (chances.ravel()[places] * np.minimum(weights, 1.0)[owners])).cumsum(1)
    own = np.array([(each + serial * s.per_token, s.once + serial * s.fixed) for s in shares])[owners]
    host = (taken * (own[:, 0] + (depths == 1) * own[:, 1])).cumsum(1)
    reached = taken * depths
    drafters = {share.outlook.drafter: share for share in shares}
    for drafter, share in drafters.items() if serial < 1.0 else ():
        mine = reached
        if len(drafters) > 1:
            mine = reached * np.array([one.outlook.drafter == drafter for one in shares])[owners]
        deep = np.maximum.accumulate(mine, 1)
        host += (1.0 - serial) * (share.per_token * deep + share.fixed * (deep > 0))
    rows = np.maximum(forwards, forwards[0])[np.minimum(counts, last)]  # near equals are noisy
    seconds = rows + once + host
    speeds = (taken & (counts <= last)) * (batch + emitted) / seconds
    depth, place = divmod(int(speeds.argmax()), len(places))
    kept = taken[depth] & (counts[depth] <= last)
    found = Allocation(
        shares,
        forwards,
        owners[kept].tolist(),
        [forwards[0], *seconds[depth, kept].tolist()],
        [0.0, *emitted[depth, kept].tolist()],
    )
    return found, int(counts[depth, place])


@dataclass(slots=True)
class JointRound:
    """The stop rule of a batch: each goes on while its next token is worth its row, and all while they are worth a step together.

    A draft that stops early leaves its rows to those that want more than they were given, so that the forward gets no more rows
    than were priced (a step in its cost may be right behind them).
    """

    price: float
    """Tokens a second that time is worth."""
    row: float
    """Seconds of another row."""
    serial: float
    """As in `allocate`."""
    free_rows: int = 0
    depth: int = 0
    """Of the longest draft that was planned. A step beyond must pay for itself with rows that were left."""
    hopes: dict[str, dict[int, float]] = field(default_factory=dict)
    """Of those that still draft, by drafter and request: weighted chance of the next token beyond what its own time is worth."""

    def join(self, share: Share, *, stops: bool) -> JointDraft:
        """A draft of this round."""
        draft = JointDraft(self, share, stops)
        self.depth = max(self.depth, share.num_draft)
        self._hope(draft, share.rates[0])
        return draft

    def goes_on(self, draft: JointDraft, position: int) -> bool:
        """Whether a sequence drafts a token more than it will have anyway. position: tokens of its draft that are known."""
        share = draft.share
        rates, due = share.rates, position + share.outlook.ahead
        chance = draft.survival * prod(rates[position : due + 1]) if due < len(rates) else 0.0
        hopes, own = self._hope(draft, chance)
        step = (1.0 - self.serial) * share.per_token
        worth = [hope for hope in hopes.values() if hope > 0.0]
        if due >= self.depth:
            worth = nlargest(self.free_rows, worth)
        pays = own > 0.0 and sum(worth) > self.price * step
        if pays and (due < share.num_draft or self.free_rows > 0):
            if due >= share.num_draft:
                share.num_draft += 1
                self.free_rows -= 1
            return True
        del hopes[share.context.request_id]
        self.free_rows += share.num_draft - due
        return False

    def _hope(self, draft: JointDraft, chance: float) -> tuple[dict[int, float], float]:
        share = draft.share
        own = min(share.weight, 1.0) * chance - self.price * (self.row + self.serial * share.per_token)
        hopes = self.hopes.setdefault(share.outlook.drafter, {})
        hopes[share.context.request_id] = own
        return hopes, own


@dataclass(slots=True)
class JointDraft:
    """One sequence's draft in a joint round."""

    round: JointRound
    share: Share
    stops: bool
    """It may end before, or go on after, what its share was given."""
    survival: float = 1.0

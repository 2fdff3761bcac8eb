"""The two length rules of transformers' assisted generation: `hf_heuristic` and `hf_confidence`.

Source: transformers 5.23, generation with an assistant (read from its code; rewritten here). Both are lossless: the length is
chosen from finished rounds, and a token that ends a draft stays in it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.control.base import Controller, RoundContext
from paceline.control.rounds import StopRule, plan_first, require, require_count, require_length, require_number
from paceline.costs import CostTable
from paceline.records import DraftFeatures, Plan, StepRecord

MIN_LABELS = 6
"""Labelled tokens before the threshold is first moved (transformers asks for more than five)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfHeuristicOptions:
    """Options of `hf_heuristic`."""

    start: int = 5
    """First draft length. transformers now starts at 20 with a constant schedule; 5 was the schedule's own start."""
    transient: bool = False
    """True: each request begins at `start`; False: at the length that the last finished request had learnt."""

    def __post_init__(self) -> None:
        require_length("start", self.start, 1)


class HfHeuristic(Controller):
    """Two more after a fully accepted draft, else one less, never under one (so it never switches off).

    Known: the rule and both persistence modes. Ours: where several requests run at once, each has its own length.
    """

    name = "hf_heuristic"
    options_type = HfHeuristicOptions

    def __init__(self, options: HfHeuristicOptions, costs: CostTable) -> None:
        self.options = options
        self._start = options.start
        self._length: dict[int, int] = {}

    def plan(self, context: RoundContext) -> Plan:
        length = self._length.setdefault(context.request_id, self._start)
        return plan_first(context, length, f"length {length}")

    def observe(self, record: StepRecord) -> None:
        if record.num_drafted == 0 or record.truncated:
            return
        length = self._length.get(record.request_id, self._start)
        grown = length + 2 if record.num_accepted == record.num_drafted else max(1, length - 1)
        self._length[record.request_id] = min(grown, 63)

    def finish(self, request_id: int) -> None:
        length = self._length.pop(request_id, self._start)
        if not self.options.transient:
            self._start = length


@dataclass(frozen=True, slots=True, kw_only=True)
class HfConfidenceOptions:
    """Options of `hf_confidence`; the first two defaults are those of transformers."""

    num_draft: int = 20
    """Most tokens of a round."""
    threshold: float = 0.4
    """Stop after a token whose draft probability is under this; 0 never stops and never learns."""
    miss_cost: float = 3.0
    """Price of losing a token that would have been accepted, in units of one wasted token."""
    window: int = 512
    """Labelled tokens kept (ours: transformers keeps all, so its update grows with the text)."""
    update_every: int = 4
    """Drafting rounds between updates of the threshold (ours, for their cost; transformers: 1)."""
    explore: float = 0.02
    """Chance of ignoring a stop, so that blocked tokens are still labelled now and then (ours; transformers: 0)."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_length("num_draft", self.num_draft, 1)
        require_number("threshold", self.threshold, 0.0, 1.0)
        require_number("miss_cost", self.miss_cost, 0.0, 1e6)
        require_count("window", self.window, MIN_LABELS)
        require_count("update_every", self.update_every)
        require_number("explore", self.explore, 0.0, 1.0)
        require(isinstance(self.seed, int), "seed", self.seed, "must be a whole number")


class HfConfidence(StopRule):
    """Stop when the drawn token's draft probability is low; the threshold follows an online ROC curve.

    Known: rule, defaults and update. Ours: the ring buffer, the exploration, and that the update needs no other package.
    Labels stay censored (nothing beyond the first rejection) and selected (only what the threshold let through).
    Without confidences (n-gram drafts): fixed length `num_draft`.
    """

    name = "hf_confidence"
    options_type = HfConfidenceOptions

    def __init__(self, options: HfConfidenceOptions, costs: CostTable) -> None:
        super().__init__()
        self.options = options
        self.k_max = options.num_draft
        self.threshold = options.threshold
        self._random = random.Random(options.seed)
        self._rounds = 0
        self._probs: deque[float] = deque(maxlen=options.window)
        self._matches: deque[bool] = deque(maxlen=options.window)

    def go_on(self, request_id: int, features: DraftFeatures) -> bool:
        return features.token_prob >= self.threshold or self._random.random() < self.options.explore

    def observe(self, record: StepRecord) -> None:
        features = self.seen(record)
        if self.options.threshold == 0 or not features:
            return
        accepted = record.num_accepted
        observed = accepted if record.truncated else accepted + 1
        for j, feature in enumerate(features[:observed]):
            self._probs.append(feature.token_prob)
            self._matches.append(j < accepted)
        self._rounds += 1
        both = len(self._probs) >= MIN_LABELS and len(set(self._matches)) == 2
        if both and self._rounds % self.options.update_every == 0:
            self.threshold = roc_threshold(self._probs, self._matches, self.options.miss_cost)


def roc_threshold(probs: Sequence[float], matches: Sequence[bool], miss_cost: float = 3.0) -> float:
    """The threshold t that minimises P(prob >= t | rejected) + miss_cost * P(prob < t | accepted).

    probs, matches: draft probability and acceptance of each labelled token; both classes must be present.
    Ties go to the higher threshold. O(n log n).
    """
    positives = sum(matches)
    negatives = len(matches) - positives
    ranked = sorted(zip(probs, matches, strict=True), reverse=True)
    best, best_cost = ranked[0][0], float("inf")
    hits = wasted = 0
    for i, (prob, match) in enumerate(ranked):
        hits += match
        wasted += not match
        if i + 1 < len(ranked) and ranked[i + 1][0] == prob:
            continue
        cost = wasted / negatives + miss_cost * (1 - hits / positives)
        if cost < best_cost - 1e-12:
            best, best_cost = prob, cost
    return best

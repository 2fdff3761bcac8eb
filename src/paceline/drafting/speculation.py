"""From places where a text has stood before to what is proposed after it: chains and trees, with estimates.

The statistics of SuffixDecoding (2411.04975), counted over places; `PlaceSource` says what an index of texts must find.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from paceline.drafting.evidence import SIGNALS, chance_signal, look_up_level
from paceline.drafting.ngram_table import NgramTable
from paceline.records import Draft

BREAK = -1
"""Ends a sequence; equals no token."""
CONTESTED, AGREED = 0.45, 0.55
"""Shares of the places that follow the first token: below the one they contradict each other, above the other they agree."""
MOST_TOKENS = 64
"""Longest proposal, whatever is asked for."""
Tokens = Sequence[int]
UNKNOWN, MOST_UNKNOWN = 3.0, 8
"""Votes for anything else than what the places say: so many for each token of the longest match, up to 8 of them. Best in a replay
of 80 answers of SmolLM2 (all categories of Spec-Bench, 128 tokens), with a table and without one, flat between 2 and 5."""
_ONE_PATH = tuple(range(-1, MOST_TOKENS - 1))


class Place(NamedTuple):
    """An earlier occurrence of the end of a text: `tokens[start:]` followed it, and `matched` tokens before agree."""

    matched: int
    start: int


class Voter(NamedTuple):
    """A place where a tree's path may go on."""

    weight: float
    tokens: Tokens
    at: int
    grows: bool
    """Behind the end of `tokens` stands what is being proposed, so that a period repeats."""


class Speculation(NamedTuple):
    """A proposed chain or tree with its estimates."""

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] | None = None
    """None for a chain."""
    confidences: tuple[float, ...] = ()
    """Per token: share of the places, among those that agree with its ancestors, where it follows."""
    chances: tuple[float, ...] = ()
    """Per token: estimated probability of the path down to it."""
    score: float = 0.0
    """Their sum: tokens that we expect to be accepted."""
    matched: int = 0

    def draft(self, num_tokens: int, name: str) -> Draft:
        """The first `num_tokens` tokens as a point-mass draft. A tree of one path is a chain, which is cheaper to verify."""
        parents = self.parents[:num_tokens] if self.parents is not None else None
        if parents == _ONE_PATH[: len(self.tokens[:num_tokens])]:
            parents = None
        shares, chances = self.confidences[:num_tokens], self.chances[:num_tokens]
        return Draft(self.tokens[:num_tokens], parents, confidences=shares, chances=chances, drafter=name)


NOTHING = Speculation()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far a speculation goes, as in the released SuffixDecoding."""

    factor: float = 1.0
    """In chains a match of m tokens may propose floor(factor * m + offset) tokens."""
    offset: float = 0.0
    min_prob: float = 0.1
    """Least estimated probability of a path."""
    tree: bool = False
    max_match: int = 64
    """Longest end of a text that is compared."""
    max_places: int = 16
    """Most places that vote (at most 64 in C)."""
    past_weight: float = 1.0
    """What a score of past outputs counts for beside one of this text (0 to 1)."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that nothing follows."""
    table: NgramTable | None = None
    """What the target tends to say next, where places do not tell; in trees."""


class PlaceSource(Protocol):
    """Texts that can be asked where they contain the end of another one."""

    @property
    def tokens(self) -> Tokens:
        """All texts, one after another, each ended by `BREAK`."""
        ...

    def places(self, tail: array[int], limit: int) -> Iterator[list[Place]]:
        """Where the end of `tail` occurs, at most `limit` places: lists of places, longest matches first.

        Every place of a list agrees in fewer tokens than those of the lists before.
        """
        ...


def speculate(
    source: PlaceSource,
    tail: array[int],
    limits: Limits,
    max_tokens: int,
    best: Speculation = NOTHING,
    *,
    grows: bool = False,
) -> Speculation:
    """The proposal after `tail` with the highest score over all match lengths; ties go to the longer match (2411.04975, section 4).

    A proposal of a shorter match scores at most its own budget, so the search ends where no budget exceeds the best score.
    best: the proposal to beat; it is returned if nothing does. grows: the source is the text itself, so that behind its end stands
    what is being proposed, and a period repeats (ours).
    """
    starts: list[int] = []
    most = min(max_tokens, MOST_TOKENS)
    for places in source.places(tail, limits.max_places):
        for i, (matched, start) in enumerate(places):
            starts.append(start)
            if i + 1 < len(places) and places[i + 1].matched == matched:
                continue  # not yet all places that agree in this many tokens
            budget = budget_of(limits, matched, most)
            if budget <= best.score:
                return best
            if limits.tree:
                voters = [Voter(1.0, source.tokens, at, grows) for at in starts]
                found = tree_walk(voters, budget, limits, matched)
            else:
                found = path_walk(source.tokens, starts, budget, limits, matched, grows)
            if found.score > best.score:
                best = found
    return best


def budget_of(limits: Limits, matched: int, most: int) -> int:
    """Tokens that a match may propose, at most `most`."""
    return min(most, int(matched * limits.factor + limits.offset + 1e-6))


def followers(tokens: Tokens, starts: Sequence[int], beyond: Sequence[int] = ()) -> dict[int, list[int]]:
    """Tokens that stand at `starts`, with the places behind each; the first-named places decide the order.

    beyond: tokens behind the end of `tokens`.
    """
    groups: dict[int, list[int]] = {}
    end, last = len(tokens), len(tokens) + len(beyond)
    for at in starts:
        token = tokens[at] if at < end else beyond[at - end] if at < last else BREAK
        if token != BREAK:
            groups.setdefault(token, []).append(at + 1)
    return groups


def path_walk(tokens: Tokens, starts: Sequence[int], budget: int, limits: Limits, matched: int, grows: bool) -> Speculation:
    """Follow the most frequent token from step to step."""
    chain: list[int] = []
    confidences: list[float] = []
    chances: list[float] = []
    path_prob, score = 1.0, 0.0
    while len(chain) < budget:
        groups = followers(tokens, starts, chain if grows else ())
        if not groups:
            break
        token = max(groups, key=lambda t: len(groups[t]))
        share = len(groups[token]) / len(starts)
        path_prob *= share
        if path_prob < limits.min_prob:
            break
        chain.append(token)
        confidences.append(share)
        chances.append(path_prob)
        score += path_prob
        if token in limits.end_ids:
            break
        starts = groups[token]
    return Speculation(tuple(chain), None, tuple(confidences), tuple(chances), score, matched)


def tree_walk(
    voters: Sequence[Voter], budget: int, limits: Limits, matched: int, unknown: float = 0.0, text: Sequence[int] = ()
) -> Speculation:
    """Emit the paths with the largest estimates first, whatever their parents.

    unknown: weight of what the places do not know, beside their votes on the first token. It goes to what `limits.table` says after
    `text` and the path, or to nobody, and falls with depth: a match that held once is likelier to hold again.
    """
    drafted: list[int] = []
    parents: list[int] = []
    confidences: list[float] = []
    chances: list[float] = []
    score = 0.0
    heap: list[tuple[float, int, float, int, tuple[int, ...], list[Voter]]] = []

    def push(parent: int, path_prob: float, path: tuple[int, ...], voters: Sequence[Voter]) -> None:
        groups: dict[int, list[Voter]] = {}
        votes: dict[int, float] = {}
        for voter in voters:
            beyond = voter.at - len(voter.tokens)
            token = voter.tokens[voter.at] if beyond < 0 else path[beyond] if voter.grows and beyond < len(path) else BREAK
            if token != BREAK:
                groups.setdefault(token, []).append(voter._replace(at=voter.at + 1))
                votes[token] = votes.get(token, 0.0) + voter.weight
        open_votes = unknown / (1.0 + 0.5 * len(path)) if voters else 1.0
        if limits.table is not None and open_votes > 0.0:
            for token, chance in limits.table.after((*text, *path)):
                votes[token] = votes.get(token, 0.0) + open_votes * chance
        total = sum(voter.weight for voter in voters) + open_votes
        for token, weight in votes.items():
            share = weight / total
            if path_prob * share >= limits.min_prob:
                heapq.heappush(heap, (-path_prob * share, parent, share, token, path, groups.get(token, [])))

    push(-1, 1.0, (), voters)
    while heap and len(drafted) < budget:
        negative, parent, share, token, path, behind = heapq.heappop(heap)
        drafted.append(token)
        parents.append(parent)
        confidences.append(share)
        chances.append(-negative)
        score -= negative
        if token not in limits.end_ids:
            push(len(drafted) - 1, -negative, (*path, token), behind)
    return Speculation(tuple(drafted), tuple(parents), tuple(confidences), tuple(chances), score, matched)


def agreement(found: Speculation) -> int:
    """Whether the places agree on the first token: 1, they do not: -1, or 0: a single place, whose vote the text's end halves."""
    share = found.confidences[0]
    return (share > AGREED) - (share < CONTESTED)


def evidence_of(found: Speculation, limits: Limits) -> int:
    """The signal of a proposal: by the estimate of its first token where all matches voted on it, else by match and agreement."""
    if not found.tokens:
        return 0
    return chance_signal(int(found.confidences[0] * 255.0)) if limits.tree else signal(found.matched, agreement(found))


def signal(matched: int, agrees: int) -> int:
    """Evidence of a proposal after `matched` tokens, as `Outlook.signal` carries it."""
    return SIGNALS[look_up_level(matched, agrees)]

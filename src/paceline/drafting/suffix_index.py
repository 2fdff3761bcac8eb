"""Where a text has stood before, and what followed: the data structure of the suffix drafter.

SuffixDecoding (2411.04975) keeps suffix trees with a count in each node. The count of a node is the number of places where its
tokens occur; here those places themselves are found, through chains of equal n-grams as in deflate (RFC 1951), and counted
when they are asked for. The statistics are the tree's, over at most `limit` places, the latest and longest matches first.
Chains follow the paper. Trees take all places of the text and of past outputs at once, each with a vote by its match (`vote`,
ours): a chain has to choose among lengths of match, a tree need not.
Appending a token costs a few dictionary-free steps; memory is a few flat arrays; the oldest sequences can be dropped (ours).

This is the readable reference, and what runs where nothing can be compiled; `suffix_native` does the same in microseconds.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, Protocol, TypeVar

from paceline.drafting.evidence import SIGNALS, look_up_level
from paceline.records import Draft

SIZES = (6, 2, 1)
"""Lengths of the n-grams that are chained, longest first."""
BREAK = -1
"""Ends a sequence; equals no token."""
CONTESTED, AGREED = 0.45, 0.55
"""Shares of the places that follow the first token: below the one they contradict each other, above the other they agree."""
MOST_TOKENS = 64
"""Longest proposal, whatever is asked for."""
Tokens = Sequence[int]
Same = TypeVar("Same", bound="TokenIndex")
_BLOCK = 8
_ONE_PATH = tuple(range(-1, MOST_TOKENS - 1))
_FACTOR, _WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1


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
    score: float = 0.0
    """Sum of the estimated probabilities of all paths: tokens that we expect to be accepted."""
    matched: int = 0

    def draft(self, num_tokens: int, name: str) -> Draft:
        """The first `num_tokens` tokens as a point-mass draft. A tree of one path is a chain, which is cheaper to verify."""
        parents = self.parents[:num_tokens] if self.parents is not None else None
        if parents == _ONE_PATH[: len(self.tokens[:num_tokens])]:
            parents = None
        return Draft(self.tokens[:num_tokens], parents, confidences=self.confidences[:num_tokens], drafter=name)


NOTHING = Speculation()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far a speculation goes, as in the released SuffixDecoding."""

    factor: float = 1.0
    """A match of m tokens may propose floor(factor * m + offset) tokens."""
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


class TokenIndex(ABC):
    """Token sequences, and what they propose after the end of a text. Not thread-safe."""

    _proposal: Speculation = NOTHING

    @abstractmethod
    def __len__(self) -> int:
        """Tokens that it holds, ends of sequences included."""

    @abstractmethod
    def extend(self, new: Sequence[int]) -> None:
        """Append tokens to the last sequence."""

    @abstractmethod
    def end_sequence(self) -> None:
        """What follows belongs to another sequence."""

    @abstractmethod
    def drop_to(self, num_tokens: int) -> None:
        """Forget whole sequences, oldest first, until at most `num_tokens` tokens are left (or one sequence)."""

    def look(self: Same, new: Sequence[int], past: Same, limits: Limits, max_tokens: int) -> tuple[int, int]:
        """Append tokens to this text, and search it and then `past` for what follows: how many tokens, and the signal (0: none).

        `proposal` has them.
        """
        self.extend(new)
        if limits.tree:
            found = self.vote(past, limits, max_tokens)
        else:
            # The text's own end is one of its places, with nothing behind it: that smooths estimates from few places.
            own = self.search(self, limits, max_tokens)
            bar = own._replace(score=own.score / limits.past_weight)
            found = past.search(self, limits, max_tokens, bar)
            found = own if found is bar else found
        self._proposal = found
        return len(found.tokens), signal(found.matched, agreement(found)) if found.tokens else 0

    def proposal(self, most: int = MOST_TOKENS) -> Speculation:
        """What the last `look` found, of which at least the first `most` tokens."""
        return self._proposal

    @abstractmethod
    def search(self: Same, text: Same, limits: Limits, max_tokens: int, best: Speculation = NOTHING) -> Speculation:
        """The best-scored chain after the end of `text` (this index or another of its kind); `best` if none beats that one."""

    @abstractmethod
    def vote(self: Same, past: Same, limits: Limits, max_tokens: int) -> Speculation:
        """A tree of what followed the end of this text, here and in `past`.

        Each place votes with the square of the tokens that it agrees in, those of `past` times `past_weight`; one more vote, as
        strong as the strongest, is for nothing. A path's estimate is its share of all votes. The longest match sets the budget.
        """

    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes that are held."""


class SuffixIndex(TokenIndex):
    """The index in plain Python."""

    def __init__(self, table_bits: int = 13) -> None:
        """table_bits: the chains' heads take 2^table_bits * 24 bytes; collisions only cost time."""
        self._tokens = array("i")
        self._base = 0  # tokens dropped so far: chains hold positions that count from the very first token
        self._mask = (1 << table_bits) - 1
        self._heads = [array("q", [-1]) * (1 << table_bits) for _ in SIZES]
        self._links = [array("q") for _ in SIZES]
        self._starts: deque[int] = deque([0])

    @property
    def tokens(self) -> array[int]:
        """All sequences, each ended by `BREAK` but for the last."""
        return self._tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, new: Sequence[int]) -> None:
        tokens, base, mask, start = self._tokens, self._base, self._mask, self._starts[-1]
        chains = list(zip(SIZES, self._heads, self._links, strict=True))
        for token in new:
            tokens.append(token)
            end = len(tokens)
            for size, heads, links in chains:
                if size > end + base - start:
                    links.append(-1)
                    continue
                key = bucket(tokens[end - size :], mask)
                links.append(heads[key])
                heads[key] = end + base

    def end_sequence(self) -> None:
        self._tokens.append(BREAK)
        for links in self._links:
            links.append(-1)
        self._starts.append(len(self._tokens) + self._base)

    def drop_to(self, num_tokens: int) -> None:
        while len(self._starts) > 1 and self._base + len(self._tokens) - self._starts[0] > num_tokens:
            self._starts.popleft()
        excess = self._starts[0] - self._base
        del self._tokens[:excess]
        for links in self._links:
            del links[:excess]
        self._base += excess

    def places(self, tail: array[int], limit: int) -> Iterator[list[Place]]:
        """Where the end of `tail` occurs, at most `limit` places: one list for each length of chain, longest matches first.

        Every place of a list agrees in fewer tokens than those of the lists before. A sequence that itself ends like the tail
        counts as a place with nothing behind it. Do not change the index while iterating.
        """
        found: set[int] = set()
        for size, heads, links in zip(SIZES, self._heads, self._links, strict=True):
            if size > len(tail):
                continue
            places = []
            at = heads[bucket(tail[-size:], self._mask)] - self._base
            steps = 2 * limit
            while at > 0 and steps and len(found) < limit:
                if at not in found:
                    matched = self._matched(at, tail)
                    if matched >= size:  # else a collision of hashes
                        found.add(at)
                        places.append(Place(matched, at))
                at = links[at - 1] - self._base
                steps -= 1
            yield sorted(places, key=attrgetter("matched"), reverse=True)

    def _matched(self, at: int, tail: array[int]) -> int:
        """How many tokens before `at` agree with the end of `tail`."""
        tokens, length, matched = self._tokens, len(tail), 0
        longest = min(at, length)
        while matched + _BLOCK <= longest:
            stop = at - matched
            if tokens[stop - _BLOCK : stop] != tail[length - matched - _BLOCK : length - matched]:
                break
            matched += _BLOCK
        while matched < longest and tokens[at - matched - 1] == tail[length - matched - 1]:
            matched += 1
        return matched

    def search(self, text: SuffixIndex, limits: Limits, max_tokens: int, best: Speculation = NOTHING) -> Speculation:
        return speculate(self, text.tokens[-limits.max_match :], limits, max_tokens, best, grows=text is self)

    def vote(self, past: SuffixIndex, limits: Limits, max_tokens: int) -> Speculation:
        tail = self.tokens[-limits.max_match :]
        voters: list[Voter] = []
        longest, total, strongest = 0, 0.0, 0.0
        for source, trust in ((self, 1.0), (past, limits.past_weight)):
            for places in source.places(tail, limits.max_places):
                for matched, start in places:
                    if source is self and start == len(self.tokens):
                        continue  # the end itself
                    weight = trust * (matched * matched)
                    voters.append(Voter(weight, source.tokens, start, source is self))
                    longest, total, strongest = max(longest, matched), total + weight, max(strongest, weight)
        budget = budget_of(limits, longest, min(max_tokens, MOST_TOKENS))
        found = tree_walk(voters, total + strongest, budget, limits, longest)
        return found if found.tokens else NOTHING

    def memory_bytes(self) -> int:
        return sum(a.itemsize * len(a) for a in (self._tokens, *self._heads, *self._links))


def bucket(gram: Sequence[int], mask: int) -> int:
    """Hash of an n-gram."""
    value = 0
    for token in gram:
        value = value * _FACTOR + token + 1 & _WORD
    return (value ^ value >> 32) & mask


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
                found = tree_walk(voters, float(len(starts)), budget, limits, matched)
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
        score += path_prob
        if token in limits.end_ids:
            break
        starts = groups[token]
    return Speculation(tuple(chain), None, tuple(confidences), score, matched)


def tree_walk(voters: Sequence[Voter], total: float, budget: int, limits: Limits, matched: int) -> Speculation:
    """Emit the paths with the largest shares of `total` votes first, whatever their parents."""
    drafted: list[int] = []
    parents: list[int] = []
    confidences: list[float] = []
    score = 0.0
    heap: list[tuple[float, int, float, int, Sequence[int], list[Voter]]] = []

    def push(parent: int, path_prob: float, path: Sequence[int], voters: Iterable[Voter]) -> None:
        groups: dict[int, list[Voter]] = {}
        votes: dict[int, float] = {}
        for voter in voters:
            beyond = voter.at - len(voter.tokens)
            token = voter.tokens[voter.at] if beyond < 0 else path[beyond] if voter.grows and beyond < len(path) else BREAK
            if token != BREAK:
                groups.setdefault(token, []).append(voter._replace(at=voter.at + 1))
                votes[token] = votes.get(token, 0.0) + voter.weight
        for token, behind in groups.items():
            prob = votes[token] / total
            if prob >= limits.min_prob:
                heapq.heappush(heap, (-prob, parent, prob / path_prob, token, path, behind))

    push(-1, 1.0, (), voters)
    while heap and len(drafted) < budget:
        negative, parent, share, token, path, behind = heapq.heappop(heap)
        drafted.append(token)
        parents.append(parent)
        confidences.append(share)
        score -= negative
        if token not in limits.end_ids:
            push(len(drafted) - 1, -negative, (*path, token), behind)
    return Speculation(tuple(drafted), tuple(parents), tuple(confidences), score, matched)


def agreement(found: Speculation) -> int:
    """Whether the places agree on the first token: 1, they do not: -1, or 0: a single place, whose vote the text's end halves."""
    share = found.confidences[0]
    return (share > AGREED) - (share < CONTESTED)


def signal(matched: int, agrees: int) -> int:
    """Evidence of a proposal after `matched` tokens, as `Outlook.signal` carries it."""
    return SIGNALS[look_up_level(matched, agrees)]

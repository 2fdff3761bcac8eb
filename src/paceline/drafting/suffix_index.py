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

from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import TypeVar

from paceline.drafting.ngram_table import MOST_ORDERS
from paceline.drafting.speculation import (
    BREAK,
    MOST_TOKENS,
    MOST_UNKNOWN,
    NOTHING,
    UNKNOWN,
    Limits,
    Place,
    Speculation,
    Voter,
    evidence_of,
    speculate,
    tree_walk,
)

SIZES = (6, 2, 1)
"""Lengths of the n-grams that are chained, longest first."""
Same = TypeVar("Same", bound="TokenIndex")
_BLOCK = 8
_FACTOR, _WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1


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
        return len(found.tokens), evidence_of(found, limits)

    def chances(self, count: int) -> Sequence[float]:
        """Estimated probabilities of the paths down to the tokens that the last `look` found: of `count` of them or more, until the
        next look."""
        return self._proposal.chances[:count]

    def proposal(self, most: int = MOST_TOKENS) -> Speculation:
        """What the last `look` found, of which at least the first `most` tokens."""
        return self._proposal

    @abstractmethod
    def search(self: Same, text: Same, limits: Limits, max_tokens: int, best: Speculation = NOTHING) -> Speculation:
        """The best-scored chain after the end of `text` (this index or another of its kind); `best` if none beats that one."""

    @abstractmethod
    def vote(self: Same, past: Same, limits: Limits, max_tokens: int) -> Speculation:
        """A tree of what followed the end of this text, here and in `past`.

        Each place votes with the square of the tokens that it agrees in, those of `past` times `past_weight`. `UNKNOWN` votes for
        each token of the longest match go to what the limits' table says, whose word alone counts where no place is.
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
        longest = 0
        for source, trust in ((self, 1.0), (past, limits.past_weight)):
            for places in source.places(tail, limits.max_places):
                for matched, start in places:
                    if source is self and start == len(self.tokens):
                        continue  # the end itself
                    voters.append(Voter(trust * (matched * matched), source.tokens, start, source is self))
                    longest = max(longest, matched)
        unknown, end = UNKNOWN * min(longest, MOST_UNKNOWN), self.tokens[-MOST_ORDERS:]
        found = tree_walk(voters, min(max_tokens, MOST_TOKENS), limits, longest, unknown, end)
        return found if found.tokens else NOTHING

    def memory_bytes(self) -> int:
        return sum(a.itemsize * len(a) for a in (self._tokens, *self._heads, *self._links))


def bucket(gram: Sequence[int], mask: int) -> int:
    """Hash of an n-gram."""
    value = 0
    for token in gram:
        value = value * _FACTOR + token + 1 & _WORD
    return (value ^ value >> 32) & mask

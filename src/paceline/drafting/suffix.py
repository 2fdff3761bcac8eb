"""SuffixDecoding: what followed the longest matching suffixes, in this text and in past outputs (2411.04975).

Needs no model and no training. The draft's length adapts to the match: long matches propose more. Costs tens of microseconds
a round. Statistics: `suffix_index`.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.options import number, whole
from paceline.drafting.suffix_index import Limits, Speculation, SuffixIndex, evidence, speculate
from paceline.records import Draft, Outlook


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixOptions:
    """Settings of `suffix`. The released code's defaults are factor 1, offset 0, min_prob 0.1, depth 64."""

    factor: float = 2.0
    """A match of m tokens may propose factor * m + offset tokens; the controller cuts further."""
    offset: float = 0.0
    min_prob: float = 0.1
    """Least estimated probability of a proposed path."""
    max_match: int = 64
    """Longest suffix that is compared."""
    max_places: int = 16
    """Most earlier places that vote."""
    store_tokens: int = 500_000
    """Tokens of past outputs that are kept, oldest requests dropped first; 0 keeps none. About 28 bytes each."""

    def __post_init__(self) -> None:
        number("factor", self.factor, 0.1, 100.0)
        number("offset", self.offset, -64.0, 64.0)
        number("min_prob", self.min_prob, 0.0, 1.0)
        whole("max_match", self.max_match, 1, 1024)
        whole("max_places", self.max_places, 1, 1024)
        whole("store_tokens", self.store_tokens, 0, 1 << 30)


class OutputStore:
    """Outputs of finished requests, bounded; may be used from several threads."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._index = SuffixIndex(table_bits=min(17, max(10, max_tokens.bit_length())))
        self._lock = threading.Lock()

    def add(self, tokens: Sequence[int]) -> None:
        """Keep an output (the end of it, at most half the store), and drop the oldest ones when there are too many."""
        kept = tokens[max(0, len(tokens) - self._max_tokens // 2) :]
        if not kept:
            return
        with self._lock:
            self._index.extend(kept)
            self._index.end_sequence()
            if len(self._index) > self._max_tokens:
                self._index.drop_to(self._max_tokens - self._max_tokens // 8)

    def speculate(self, tail: array[int], places: int, limits: Limits, max_tokens: int, end_ids: Collection[int]) -> Speculation:
        """The best proposal of the past outputs after `tail`."""
        with self._lock:
            return speculate(self._index, tail, places, limits, max_tokens, end_ids)

    def __len__(self) -> int:
        return len(self._index)

    def memory_bytes(self) -> int:
        """Bytes that the store holds."""
        return self._index.memory_bytes()


class SuffixDrafter(Drafter):
    """Drafts the best-scored continuation, from this text or from past outputs, as a chain or a tree. Point-mass."""

    options_type = SuffixOptions

    def __init__(self, options: SuffixOptions | None = None, name: str = "suffix", *, tree: bool = False) -> None:
        self.name = name
        self.options = options or SuffixOptions()
        self.limits = Limits(factor=self.options.factor, offset=self.options.offset, min_prob=self.options.min_prob, tree=tree)
        self.store = OutputStore(self.options.store_tokens)

    @classmethod
    def build(cls, spec: DrafterSpec, options: SuffixOptions, _: DrafterContext) -> SuffixDrafter:
        return cls(options, str(spec), tree=spec.tree)

    def open(self, view: SequenceView) -> SuffixSession:
        return SuffixSession(self, view)

    def finish_request(self, tokens: Sequence[int], num_prompt: int) -> None:
        self.store.add(tokens[num_prompt:])

    def memory_bytes(self) -> int:
        return self.store.memory_bytes()


class SuffixSession(DraftSession):
    """The index of one text, and the best proposal for its present end."""

    def __init__(self, drafter: SuffixDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._view = view
        self._index = SuffixIndex()
        self._best = Speculation()
        self._key = (-1, -1)

    def _find(self, max_tokens: int) -> Speculation:
        """The best proposal of at most `max_tokens` tokens (the beginning of the one found for more tokens)."""
        tokens = self._view.tokens
        length, width = self._key
        if length != len(tokens) or width < max_tokens:
            self._index.extend(tokens[len(self._index) :])
            self._best = self._search(max_tokens)
            self._key = (len(tokens), max_tokens)
        return self._best

    def _search(self, max_tokens: int) -> Speculation:
        options, limits, ends = self._drafter.options, self._drafter.limits, self._view.end_ids
        tail = self._index.tokens[-options.max_match :]
        # The text's own end is one of its places, with nothing behind it: that smooths estimates from few places.
        own = speculate(self._index, tail, options.max_places, limits, max_tokens, ends)
        if not len(self._drafter.store):
            return own
        past = self._drafter.store.speculate(tail, options.max_places, limits, max_tokens, ends)
        return own if own.score >= past.score else past

    def outlook(self, max_tokens: int) -> Outlook:
        best = self._find(max_tokens)
        available = min(len(best.tokens), max_tokens)
        return Outlook(self._drafter.name, available, evidence(best) if available else 0)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        return self._find(num_tokens).draft(num_tokens, self._drafter.name)

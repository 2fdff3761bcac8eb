"""Prompt lookup: what followed the last words before will follow them again.

Source: the prompt-lookup-decoding idea (public repository, no paper), with an index that is updated in place, the latest
occurrence, and the evidence that the controller wants (ours). Needs no model and no training; a round costs microseconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.evidence import SIGNALS, look_up_level
from paceline.drafting.options import whole
from paceline.records import Draft, Outlook

_LONGEST_EVIDENCE = 16
"""Tokens that are compared to tell how strong a match is."""
_NOWHERE = (0, 0)
_ENTRY_BYTES = 160
"""About what a key and its two places take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramOptions:
    """Settings of `ngram`."""

    max_size: int = 4
    """Longest n-gram that is looked up first (1 to 8)."""
    min_size: int = 1
    """Shortest one that may propose."""

    def __post_init__(self) -> None:
        whole("max_size", self.max_size, 1, 8)
        whole("min_size", self.min_size, 1, self.max_size)


class NgramDrafter(Drafter):
    """Drafts the continuation of the latest earlier occurrence of the longest n-gram at the end of the text. Point-mass."""

    options_type = NgramOptions

    def __init__(self, options: NgramOptions | None = None, name: str = "ngram") -> None:
        self.name = name
        self.options = options or NgramOptions()

    @classmethod
    def build(cls, spec: DrafterSpec, options: NgramOptions, _: DrafterContext) -> NgramDrafter:
        return cls(options, str(spec))

    def open(self, view: SequenceView) -> NgramSession:
        return NgramSession(self, view)


class NgramSession(DraftSession):
    """Index of one sequence: n-gram -> where its latest occurrence continues, and the one before (0: none).

    An n-gram enters the index only once a token follows it, so the tail never finds itself and every hit has a continuation.
    """

    def __init__(self, drafter: NgramDrafter, view: SequenceView) -> None:
        self._name = drafter.name
        self._view = view
        self._sizes = tuple(range(drafter.options.max_size, drafter.options.min_size - 1, -1))
        self._index: dict[tuple[int, ...], tuple[int, int]] = {}
        self._indexed = 0
        self._found_at = -1
        self._start = 0
        self._signal = 0

    def _extend_index(self) -> None:
        """Enter the n-grams that end before the last token."""
        tokens, index, sizes = self._view.tokens, self._index, self._sizes
        for end in range(self._indexed + 1, len(tokens)):
            for size in sizes:
                if size <= end:
                    gram = tuple(tokens[end - size : end])
                    index[gram] = (end, index.get(gram, _NOWHERE)[0])
        self._indexed = max(self._indexed, len(tokens) - 1)

    def _find(self) -> None:
        """Set where the continuation starts (0: no match) and how strong the evidence is."""
        tokens = self._view.tokens
        length = len(tokens)
        if self._found_at == length:
            return
        self._extend_index()
        self._found_at, self._start, self._signal = length, 0, 0
        for size in self._sizes:
            found = self._index.get(tuple(tokens[length - size :])) if size < length else None
            if found is not None:
                start, older = found
                while size < _LONGEST_EVIDENCE and size < start and tokens[start - size - 1] == tokens[length - size - 1]:
                    size += 1
                agreement = (1 if tokens[older] == tokens[start] else -1) if older else 0
                self._start, self._signal = start, SIGNALS[look_up_level(size, agreement)]
                return

    def _continuation(self, num_tokens: int) -> list[int]:
        """Up to `num_tokens` tokens from the match on, cut after an end token.

        Where the continuation reaches the end of the text it goes on with what it has just proposed, so that a period repeats.
        """
        tokens, start = self._view.tokens, self._start
        found = tokens[start : start + num_tokens]
        if len(found) < num_tokens:
            found = (found * (num_tokens // len(found) + 1))[:num_tokens]
        if not self._view.end_ids.isdisjoint(found):
            found = found[: next(i for i, token in enumerate(found) if token in self._view.end_ids) + 1]
        return found

    def rewind(self, length: int) -> bool:
        """The places before come back; of an n-gram that is withdrawn twice at once only if it is seen again."""
        tokens, index = self._view.tokens, self._index
        for end in range(self._indexed, max(length - 1, 0), -1):
            for size in self._sizes:
                gram = tuple(tokens[end - size : end]) if size <= end else ()
                _, older = index.pop(gram, _NOWHERE)
                if older:
                    index[gram] = (older, 0)
        self._indexed = min(self._indexed, max(length - 1, 0))
        self._found_at = -1
        return True

    def outlook(self, max_tokens: int) -> Outlook:
        self._find()
        if not self._start or max_tokens < 1:
            return Outlook(self._name, 0)
        return Outlook(self._name, len(self._continuation(max_tokens)), self._signal)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        self._find()
        if not self._start or num_tokens < 1:
            return Draft((), drafter=self._name)
        return Draft(tuple(self._continuation(num_tokens)), drafter=self._name)

    def memory_bytes(self) -> int:
        return sys.getsizeof(self._index) + _ENTRY_BYTES * len(self._index)

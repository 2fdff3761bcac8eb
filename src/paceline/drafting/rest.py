"""REST: what followed the same words in a corpus that the user gives (2311.08252).

Needs a corpus folder (`corpus.build_corpus`), no model. A round costs tens of microseconds while the corpus is in memory. Where the
released code drafts an arbitrary token when nothing is found, this one drafts nothing.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from pathlib import Path

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.corpus import DEPTH, Corpus
from paceline.drafting.options import number, whole
from paceline.drafting.speculation import NOTHING, Limits, Speculation, agreement, signal, speculate
from paceline.records import Draft, Outlook


@dataclass(frozen=True, slots=True, kw_only=True)
class RestOptions:
    """Settings of `rest:CORPUS`."""

    min_match: int = 2
    """Shortest context that may propose (1 to 16)."""
    max_tokens: int = 10
    """Longest chain."""
    min_prob: float = 0.05
    """Least share of the places that a proposed path needs."""
    max_places: int = 64
    """Most places that vote."""

    def __post_init__(self) -> None:
        whole("min_match", self.min_match, 1, DEPTH)
        whole("max_tokens", self.max_tokens, 1, 63)
        number("min_prob", self.min_prob, 0.0, 1.0)
        whole("max_places", self.max_places, 1, 5000)


class RestDrafter(Drafter):
    """Drafts the most frequent continuation, or the most frequent beginnings of continuations as a tree. Point-mass."""

    options_type = RestOptions

    def __init__(self, corpus: Corpus, options: RestOptions | None = None, name: str = "rest", *, tree: bool = False) -> None:
        self.name = name
        self.corpus = corpus
        self.options = options or RestOptions()
        self.limits = Limits(factor=0.0, offset=63.0, min_prob=self.options.min_prob, tree=tree, max_places=self.options.max_places)

    @classmethod
    def build(cls, spec: DrafterSpec, options: RestOptions, context: DrafterContext) -> RestDrafter:
        return cls(Corpus(Path(spec.argument), context.vocab_size), options, str(spec), tree=spec.tree)

    def open(self, view: SequenceView) -> RestSession:
        return RestSession(self, view)

    def memory_bytes(self) -> int:
        return self.corpus.memory_bytes()


class RestSession(DraftSession):
    """One sequence; nothing is kept but the proposal for its present end."""

    def __init__(self, drafter: RestDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._view = view
        self._limits = replace(drafter.limits, end_ids=view.end_ids)
        self._best = NOTHING
        self._key = (-1, -1)

    def _find(self, max_tokens: int) -> Speculation:
        length, width = self._key
        if length != len(self._view.tokens) or width < max_tokens:
            options = self._drafter.options
            tail = array("i", self._view.tokens[-DEPTH:])
            limit = min(max_tokens, options.max_tokens) if not self._limits.tree else max_tokens
            found = speculate(self._drafter.corpus, tail, self._limits, limit)
            self._best = found if found.matched >= options.min_match else NOTHING
            self._key = (len(self._view.tokens), max_tokens)
        return self._best

    def outlook(self, max_tokens: int) -> Outlook:
        best = self._find(max_tokens)
        available = min(len(best.tokens), max_tokens)
        return Outlook(self._drafter.name, available, signal(best.matched, agreement(best)) if available else 0)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        return self._find(num_tokens).draft(num_tokens, self._drafter.name)

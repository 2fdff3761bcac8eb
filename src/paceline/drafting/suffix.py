"""SuffixDecoding: what followed the longest matching suffixes, in this text and in past outputs (2411.04975).

Needs no model and no training. The draft's length adapts to the match: long matches propose more. Costs a few microseconds a round
(`suffix_native`), some hundreds where nothing can be compiled (`suffix_index`; `speculation` defines the statistics).

The chain is the paper's. The tree holds what followed any match, long or short, here or in past outputs, and what the target tends
to say after such words (`ngram_table`), most votes first (ours).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.ngram_table import NgramTable, find_shipped, load_table, vocabulary_digest
from paceline.drafting.options import number, whole
from paceline.drafting.speculation import Limits
from paceline.drafting.suffix_index import TokenIndex
from paceline.drafting.suffix_native import open_index
from paceline.errors import OptionError
from paceline.models.base import Tokenizer
from paceline.records import Draft, Outlook

_LEAST_IN_CHAINS = 0.1
_LEAST_IN_TREES, _SPEED = (0.02, 0.2), 1.5
"""The least chance of a path in a tree is what one more row costs, in plain steps, at the speed that drafting may reach; within
these bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixOptions:
    """Settings of `suffix`. The released code's defaults are factor 1, offset 0, min_prob 0.1, depth 64."""

    factor: float = 2.0
    """In chains a match of m tokens may propose factor * m + offset tokens; the controller cuts further."""
    offset: float = 0.0
    min_prob: float | None = None
    """Least estimated probability of a proposed path; None: 0.1 in chains (the released code), in trees what a row costs here."""
    table: str = "auto"
    """What trees ask for what the target tends to say: a file made by `paceline train ngrams`, `none`, or `auto` for the one that
    comes with the package, if it fits the target's vocabulary."""
    max_match: int = 64
    """Longest suffix that is compared."""
    max_places: int = 12
    """Most earlier places that vote, here and in past outputs each."""
    past_weight: float = 0.3
    """What a score, and in trees a vote, of past outputs counts for beside one of this text (0.01 to 1)."""
    store_tokens: int = 500_000
    """Tokens of past outputs that are kept, oldest requests dropped first; 0 keeps none. 16 to 28 bytes each."""

    def __post_init__(self) -> None:
        number("factor", self.factor, 0.1, 100.0)
        number("offset", self.offset, -64.0, 64.0)
        if self.min_prob is not None:
            number("min_prob", self.min_prob, 0.0, 1.0)
        if not isinstance(self.table, str) or not self.table:
            raise OptionError(f"table = {self.table!r}: must be auto, none, or the path of a file")
        whole("max_match", self.max_match, 1, 1024)
        whole("max_places", self.max_places, 1, 64)
        number("past_weight", self.past_weight, 0.01, 1.0)
        whole("store_tokens", self.store_tokens, 0, 1 << 30)


class OutputStore:
    """Outputs of finished requests, bounded; may be used from several threads."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._index = open_index(table_bits=min(17, max(10, max_tokens.bit_length())))
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

    def look(self, text: TokenIndex, new: Sequence[int], limits: Limits, max_tokens: int) -> tuple[int, int]:
        """`TokenIndex.look` of a text, with the past outputs."""
        with self._lock:
            return text.look(new, self._index, limits, max_tokens)

    def __len__(self) -> int:
        return len(self._index)

    def memory_bytes(self) -> int:
        """Bytes that the store holds."""
        return self._index.memory_bytes()


class SuffixDrafter(Drafter):
    """Drafts the best-scored continuation, from this text or from past outputs, as a chain or a tree. Point-mass."""

    options_type = SuffixOptions

    def __init__(
        self,
        options: SuffixOptions | None = None,
        name: str = "suffix",
        *,
        tree: bool = False,
        table: NgramTable | None = None,
        row_cost: float | None = None,
    ) -> None:
        """row_cost: as in `DrafterContext`."""
        self.name = name
        self.options = options or SuffixOptions()
        low, high = _LEAST_IN_TREES
        least = _LEAST_IN_CHAINS if not tree else high if row_cost is None else min(max(_SPEED * row_cost, low), high)
        self.limits = Limits(
            factor=self.options.factor,
            offset=self.options.offset,
            min_prob=least if self.options.min_prob is None else self.options.min_prob,
            tree=tree,
            max_match=self.options.max_match,
            max_places=self.options.max_places,
            past_weight=self.options.past_weight,
            table=table,
        )
        self.store = OutputStore(self.options.store_tokens)

    @classmethod
    def build(cls, spec: DrafterSpec, options: SuffixOptions, context: DrafterContext) -> SuffixDrafter:
        table = _open_table(options.table, context.tokenizer) if spec.tree else None
        return cls(options, str(spec), tree=spec.tree, table=table, row_cost=context.row_cost)

    def open(self, view: SequenceView) -> SuffixSession:
        return SuffixSession(self, view)

    def finish_request(self, tokens: Sequence[int], num_prompt: int) -> None:
        self.store.add(tokens[num_prompt:])

    def forget(self) -> None:
        self.store = OutputStore(self.options.store_tokens)

    def memory_bytes(self) -> int:
        return self.store.memory_bytes() + (self.limits.table.memory_bytes() if self.limits.table is not None else 0)


def _open_table(name: str, tokenizer: Tokenizer | None) -> NgramTable | None:
    """The table that the option names. Raises OptionError when its ids are those of another vocabulary, CacheError when damaged."""
    if name == "none" or tokenizer is None:
        return None
    if name == "auto":
        return find_shipped(tokenizer)
    table = load_table(Path(name))
    if table.vocabulary != vocabulary_digest(tokenizer):
        raise OptionError(f"table = {name!r}: was counted with another tokenizer than the target's; make one with this target")
    return table


class SuffixSession(DraftSession):
    """The index of one text, and the best proposal for its present end."""

    def __init__(self, drafter: SuffixDrafter, view: SequenceView) -> None:
        self._name = drafter.name
        self._store = drafter.store
        self._limits = replace(drafter.limits, end_ids=view.end_ids)
        self._view = view
        self._tokens = view.tokens
        self._index = open_index()
        self._indexed = self._found = self._signal = 0
        self._nothing = Outlook(drafter.name, 0)
        self._width = -1

    def _look(self, max_tokens: int) -> int:
        """How many of at most `max_tokens` tokens are there (the beginning of what was found for more tokens)."""
        tokens = self._tokens
        length = len(tokens)
        if length != self._indexed or self._width < max_tokens:
            new = tokens[self._indexed :]
            self._found, self._signal = self._store.look(self._index, new, self._limits, max_tokens)
            self._indexed, self._width = length, max_tokens
        return self._found if self._found < max_tokens else max_tokens

    def outlook(self, max_tokens: int) -> Outlook:
        available = self._look(max_tokens)
        if not available:
            return self._nothing
        chances = self._index.chances(available) if self._limits.tree else ()  # of chains the length of the match tells more
        return Outlook(self._name, available, self._signal, chances=chances)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        return self._index.proposal(self._look(num_tokens)).draft(num_tokens, self._name)

    def memory_bytes(self) -> int:
        return self._index.memory_bytes()

"""`sparse_kv`: the whole target drafts over a part of its own cache (MagicDec, 2408.11049; TriForce, 2404.11912, its middle
level).

In long contexts a pass spends its time on keys and values; with a few hundred rows of them it costs what a pass costs at a
short context, and mostly says the same. The rows are copied from the target's cache, so prompt and text are never fed twice;
after each round the copy takes over what verification wrote. Rows are chosen anew every `refresh` tokens. Costs a step at a
short context a drafted token; choosing by attention costs a pass over the last `queries` tokens, `spread` also a look at all
keys.

What 32 queries looked at says little about the next hundred. Measured on six texts of 5000 tokens with the default model and 256
rows, as the overlap of the draft's distributions with the target's over the 64 tokens that follow: SnapKV's choice (the rows of
the queries and 224 by attention) 0.84 on the text itself and 0.88 on greedy answers, the first and last rows 0.85 and 0.88. Rows
that the *following* queries look at reach 0.94 where SnapKV's have 0.47: mass, gathering and positions are right, the choice is
stale. With three quarters of the rows for the last ones and attention for the rest it is 0.88 and 0.91: hence `recent`.

It cannot pay where keys and values are a small part of what a pass reads: below `least_context` tokens nothing is proposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.drafting.base import DrafterContext, DrafterSpec, SequenceView
from paceline.drafting.options import number, whole
from paceline.drafting.self_draft.rows import attended, ends, spread
from paceline.drafting.self_draft.session import SelfDrafter, SelfSession, target_of
from paceline.drafting.temperature import check_draft_temperature
from paceline.errors import OptionError
from paceline.execution.base import Runner, Segment, SequenceHandle
from paceline.records import Outlook

CHOICES = ("ends", "attended", "spread")


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseKvOptions:
    """Settings of `sparse_kv`."""

    choose: str = "ends"
    """`ends` (first and last rows), `attended` (SnapKV) or `spread` (after TCA-Attention): see `rows.py`."""
    budget: int = 256
    """Rows kept of the context."""
    refresh: int = 128
    """Tokens after which rows are chosen anew; until then new ones are added."""
    queries: int = 32
    """Last tokens whose attention decides (`attended`, `spread`)."""
    recent: float = 0.75
    """Share of the budget that `attended` gives to the last rows, whatever was looked at (0: SnapKV's, the queries' own alone)."""
    least_context: int = 2048
    """Tokens below which nothing is proposed."""
    temperature: float | str | None = None
    """As in `model`."""

    def __post_init__(self) -> None:
        if self.choose not in CHOICES:
            raise OptionError(f"choose = {self.choose!r}: choose one of {', '.join(CHOICES)}")
        whole("budget", self.budget, 2, 1 << 20)
        whole("refresh", self.refresh, 1, 1 << 20)
        whole("queries", self.queries, 1, 256)
        number("recent", self.recent, 0.0, 0.95)
        whole("least_context", self.least_context, 2, 1 << 30)
        if self.choose != "ends" and self.queries >= self.budget:
            raise OptionError(f"queries = {self.queries}: must be under budget = {self.budget}")
        check_draft_temperature(self.temperature)


class SparseKvDrafter(SelfDrafter):
    """See the module's text."""

    options_type = SparseKvOptions
    share_of_target = 1.0
    """Of a step at the shortest context that was measured."""

    def __init__(self, runner: Runner, name: str, vocab_size: int, options: SparseKvOptions) -> None:
        super().__init__(runner, name, vocab_size, options.temperature)
        self.options = options

    @classmethod
    def build(cls, spec: DrafterSpec, options: SparseKvOptions, context: DrafterContext) -> SparseKvDrafter:
        return cls(target_of(spec, context, gathers=True), str(spec), context.vocab_size, options)

    def open(self, view: SequenceView) -> SparseKvSession:
        return SparseKvSession(self, view)


class SparseKvSession(SelfSession):
    """Holds the copy: `_kept` rows that were chosen when `_since` tokens were committed, then all rows since."""

    def __init__(self, drafter: SparseKvDrafter, view: SequenceView) -> None:
        super().__init__(drafter, view)
        self._options = drafter.options
        self._copy: SequenceHandle | None = None
        self._kept = 0
        self._since = 0

    def outlook(self, max_tokens: int) -> Outlook:
        if len(self._view.tokens) < self._options.least_context:
            return Outlook(self._drafter.name, 0)
        return super().outlook(max_tokens)

    def _enter(self, sequence: SequenceHandle) -> SequenceHandle:
        if self._copy is not None and sequence.length - self._since < self._options.refresh:
            self._runner.follow(self._copy, sequence)
            return self._copy
        self.close()
        rows = self._choose(sequence)
        self._copy = self._runner.gather(sequence, rows)
        self._kept, self._since = self._copy.length, sequence.length
        return self._copy

    def _choose(self, sequence: SequenceHandle) -> torch.Tensor:
        options, length = self._options, sequence.length
        queries = min(options.queries, length - 1)
        if options.choose == "ends" or options.budget >= length or queries < 1:
            return ends(length, options.budget)
        mass = self._runner.attention_mass(sequence, self._view.tokens[length - queries : length])
        if options.choose == "attended":
            return attended(mass, options.budget, min(max(queries, int(options.recent * options.budget)), options.budget - 1))
        layers = range(len(mass))
        return torch.stack([spread(mass[i], self._runner.read_keys(sequence, i), options.budget) for i in layers])

    def _logits(self, cache: SequenceHandle, token: int) -> torch.Tensor:
        logits = self._runner.forward([Segment(cache, [token])]).logits[0]
        self._runner.accept(cache, [0])
        return logits

    def rewind(self, length: int) -> bool:
        added = length - 1 - self._since  # the last token of what stays is pending
        if self._copy is not None and added < 0:
            self.close()
        elif self._copy is not None:
            self._runner.truncate(self._copy, min(self._copy.length, self._kept + added))
        return True

    def close(self) -> None:
        if self._copy is not None:
            self._runner.close(self._copy)
            self._copy = None

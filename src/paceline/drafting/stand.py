"""STAND: stochastic n-gram drafting from the target's own earlier distributions (2506.04708).

For every n-gram that was verified, the ten most probable next tokens and their probabilities are kept and averaged over visits.
A draft looks up the longest n-gram at its end. Greedy requests take the most probable tokens; sampled ones draw from the stored
distribution, which is known, so that they can be verified by a ratio test. Needs the target's rows of each round: about 0.1 ms a
row to learn, most of it for fetching the row. Deviations: the distribution is what is stored, renormalised after temperature and
filters; children of a node are drawn one after another without replacement (the law of Gumbel-top-k); and a tree grows with the
stored probabilities instead of a fixed template.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.options import whole
from paceline.drafting.rows import TopTokens, load_library, row_tokens, top_tokens
from paceline.drafting.sparse import SparseRow
from paceline.drafting.tree_search import Children, Growth, grow_best, grow_slots
from paceline.records import Draft, Outlook, Verdict
from paceline.sampling import CounterRandom, Purpose

KEEP = 10
"""Tokens kept of a distribution."""
_ENTRY_BYTES = 900
_SURE = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class StandOptions:
    """Settings of `stand`."""

    max_context: int = 4
    """Longest n-gram that is looked up first."""
    min_context: int = 2
    """Shortest one."""
    max_entries: int = 60_000
    """N-grams kept, the least recently used dropped first; about 900 bytes each."""

    def __post_init__(self) -> None:
        whole("max_context", self.max_context, 1, 8)
        whole("min_context", self.min_context, 1, self.max_context)
        whole("max_entries", self.max_entries, 1, 1 << 28)


class NgramMemory:
    """N-gram -> averaged distribution of what follows; bounded, least recently used first out."""

    def __init__(self, max_entries: int, keep: int = KEEP) -> None:
        self._max_entries = max_entries
        self._keep = keep
        self._entries: dict[tuple[int, ...], tuple[int, SparseRow]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, context: tuple[int, ...], row: SparseRow) -> None:
        """Average a new observation in: the k-th visit weighs 1 / k; the `keep` most probable tokens stay, not renormalised."""
        visits, old = self._entries.pop(context, (0, row))
        if visits:
            share = visits / (visits + 1)
            merged = {token: share * prob for token, prob in zip(old.ids, old.probs, strict=True)}
            for token, prob in zip(row.ids, row.probs, strict=True):
                merged[token] = merged.get(token, 0.0) + (1.0 - share) * prob
            best = sorted(merged.items(), key=lambda item: -item[1])[: self._keep]
            row = SparseRow(tuple(token for token, _ in best), tuple(prob for _, prob in best))
        elif len(self._entries) >= self._max_entries:
            del self._entries[next(iter(self._entries))]
        self._entries[context] = (visits + 1, row)

    def get(self, context: tuple[int, ...]) -> SparseRow | None:
        """What followed, if it is known."""
        found = self._entries.pop(context, None)
        if found is None:
            return None
        self._entries[context] = found  # now the most recently used
        return found[1]

    def visits(self, context: tuple[int, ...]) -> int:
        """How often the n-gram was seen."""
        return self._entries[context][0] if context in self._entries else 0


class StandDrafter(Drafter):
    """Drafts from the memory of all requests, as a chain or a tree."""

    options_type = StandOptions
    wants_logits = True
    samples = True

    def __init__(self, vocab_size: int, options: StandOptions | None = None, name: str = "stand", *, tree: bool = False) -> None:
        self.name = name
        self.tree = tree
        self.vocab_size = vocab_size
        self.options = options or StandOptions()
        self.sizes = tuple(range(self.options.max_context, self.options.min_context - 1, -1))
        self.memory = NgramMemory(self.options.max_entries)

    @classmethod
    def build(cls, spec: DrafterSpec, options: StandOptions, context: DrafterContext) -> StandDrafter:
        load_library()  # compiles now, if ever, and not in the first round
        return cls(context.vocab_size, options, str(spec), tree=spec.tree)

    def open(self, view: SequenceView) -> StandSession:
        return StandSession(self, view)

    def learn(self, context: Sequence[int], row: SparseRow) -> None:
        """Keep what follows the last tokens of a text."""
        for size in self.sizes:
            if size <= len(context):
                self.memory.add(tuple(context[-size:]), row)

    def look_up(self, context: Sequence[int]) -> tuple[int, SparseRow] | None:
        """The longest known n-gram at the end of a text: its length and what follows."""
        for size in self.sizes:
            row = self.memory.get(tuple(context[-size:])) if size <= len(context) else None
            if row is not None:
                return size, row
        return None

    def forget(self) -> None:
        self.memory = NgramMemory(self.options.max_entries)

    def memory_bytes(self) -> int:
        return len(self.memory) * _ENTRY_BYTES


class StandSession(DraftSession):
    """Drafting of one sequence."""

    def __init__(self, drafter: StandDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._view = view
        self._length = len(view.tokens)
        self._draft = Draft(())

    def outlook(self, max_tokens: int) -> Outlook:
        found = self._drafter.look_up(self._context([])) if max_tokens > 0 else None
        if found is None:
            return Outlook(self._drafter.name, 0)
        size, row = found
        return Outlook(self._drafter.name, max_tokens, 2 * size - (row.probs[0] < _SURE))

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        if not self._drafter.tree:
            self._draft = self._chain(num_tokens, keep_drafting)
        elif self._view.sampling.greedy or self._view.coupled:
            self._draft = self._chosen_tree(num_tokens)
        else:
            self._draft = self._drawn_tree(num_tokens)
        return self._draft

    def _context(self, path: Sequence[int]) -> list[int]:
        size = self._drafter.options.max_context
        return [*self._view.tokens[-size:], *path][-size:]

    def _row(self, path: Sequence[int]) -> SparseRow | None:
        """What the token after `path` is drawn from."""
        found = self._drafter.look_up(self._context(path))
        return None if found is None else found[1].shaped(self._view.sampling)

    def _uniform(self, index: int) -> float:
        first, random = len(self._view.tokens), CounterRandom(self._view.seed)
        if self._view.coupled:
            return random.uniform(first + index, Purpose.TARGET)
        return random.uniform(first, Purpose.DRAFT, index)

    def _chain(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        greedy = self._view.sampling.greedy
        tokens: list[int] = []
        rows: list[SparseRow] = []
        while len(tokens) < num_tokens:
            row = self._row(tokens)
            if row is None:
                break
            token = row.ids[0] if greedy else row.draw(self._uniform(len(tokens)))
            tokens.append(token)
            rows.append(row)
            if token in self._view.end_ids or not keep_drafting(row.features(len(tokens), token)):
                break
        confidences = tuple(row.probs[0] for row in rows)
        return Draft(tuple(tokens), None, self._dense(rows), confidences, self._drafter.name)

    def _chosen_tree(self, num_tokens: int) -> Draft:
        """The most probable paths of the stored distributions."""

        def children(growth: Growth, node: int) -> Children:
            if node >= 0 and growth.tokens[node] in self._view.end_ids:
                return ()
            row = self._row(growth.path(node))
            return () if row is None else tuple(zip(row.ids, row.probs, strict=True))

        return grow_best(num_tokens, children).draft(num_tokens, self._drafter.name)

    def _drawn_tree(self, num_tokens: int) -> Draft:
        """Children drawn without replacement, where verification will most probably look for them."""
        paths: dict[int, list[int]] = {-1: []}
        known: dict[int, SparseRow | None] = {}
        taken: dict[int, list[int]] = {}
        rows: list[SparseRow] = []

        def fill(parent: int) -> tuple[int, float, bool] | None:
            if parent not in known:
                known[parent], taken[parent] = self._row(paths[parent]), []
            row = known[parent]
            if row is None or len(taken[parent]) >= len(row.ids):
                return None
            left = 1.0 - sum(row.prob(token) for token in taken[parent])
            token = row.draw(self._uniform(len(rows)), taken[parent])
            taken[parent].append(token)
            paths[len(rows)] = [*paths[parent], token]
            rows.append(row)
            return token, min(1.0, row.prob(token) / max(left, 1e-9)), token not in self._view.end_ids

        tokens, parents, _ = grow_slots(num_tokens, fill)
        # A drawn token's own probability must not decide whether it is verified, so confidences are those of its row.
        confidences = tuple(row.probs[0] for row in rows)
        dense = self._dense(rows)
        return Draft(tuple(tokens), tuple(parents), dense, confidences, self._drafter.name, without_replacement=True)

    def _dense(self, rows: Sequence[SparseRow]) -> torch.Tensor | None:
        """[N, V] float32, or None for point-mass drafts."""
        if self._view.sampling.greedy or not rows:
            return None
        dense = np.zeros((len(rows), self._drafter.vocab_size), dtype=np.float32)
        for i, row in enumerate(rows):
            dense[i, list(row.ids)] = row.probs
        return torch.from_numpy(dense)

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        tokens, drafter, draft = self._view.tokens, self._drafter, self._draft
        if target_logits is not None:
            rows = [row for row, _ in row_tokens(tokens, self._length, draft.tokens, verdict, len(target_logits))]
            best = top_tokens(target_logits[:, : drafter.vocab_size], KEEP, rows, totals=True)
            before = tokens[max(0, self._length - drafter.options.max_context) : self._length]
            for row, top in zip(rows, best, strict=True):
                drafter.learn([*before, *self._row_path(row, verdict)], distribution(top))
        self._length = len(tokens)
        self._draft = Draft(())

    def _row_path(self, row: int, verdict: Verdict | None) -> list[int]:
        """Tokens between the old pending token and a row, the row's own included."""
        if verdict is None:
            return self._view.tokens[self._length : self._length + row]
        return self._draft.path(row)


def distribution(top: TopTokens) -> SparseRow:
    """The most probable tokens of a row at temperature 1, not renormalised."""
    return SparseRow(top.ids, tuple(math.exp(logit - top.log_total) for logit in top.logits))

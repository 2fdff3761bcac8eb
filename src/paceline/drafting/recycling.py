"""Token recycling: the target's own runners-up, kept per token and used as the next draft (2408.08696).

A matrix holds, for every token of the vocabulary, the tokens that the target last found most probable after it. A draft follows
the matrix from the pending token on: a chain of the best ones, or a tree. Costs a few microseconds a drafted token, and about
50 microseconds a verified row to learn. Needs the target's rows of each round. Point-mass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.options import whole
from paceline.drafting.rows import TopTokens, load_library, row_tokens, top_tokens
from paceline.drafting.templates import LearntTemplate
from paceline.records import Draft, Outlook, Verdict

_UNKNOWN = -1
_SIGNALS = (0.7, 0.9, 0.97, 0.99, 0.999)
_RANK_GUESS = (0.45, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecyclingOptions:
    """Settings of `token_recycling`."""

    width: int = 8
    """Successors kept for each token, and most children of a node in tree form (2 to 8); the chain uses the best one."""

    def __post_init__(self) -> None:
        whole("width", self.width, 2, len(_RANK_GUESS))


class RecyclingDrafter(Drafter):
    """Drafts along the matrix of last seen successors; the matrix serves all requests."""

    options_type = RecyclingOptions
    wants_logits = True

    def __init__(
        self, vocab_size: int, options: RecyclingOptions | None = None, name: str = "token_recycling", *, tree: bool = False
    ) -> None:
        options = options or RecyclingOptions()
        self.name = name
        self.tree = tree
        self.width = options.width if tree else 2
        self.successors = np.full((vocab_size, self.width), _UNKNOWN, dtype=np.int32)
        self.sureness = np.zeros(vocab_size, dtype=np.float32)
        """Per token: odds of its first successor against the second, as a probability."""
        self.template = LearntTemplate(_RANK_GUESS[: self.width])

    @classmethod
    def build(cls, spec: DrafterSpec, options: RecyclingOptions, context: DrafterContext) -> RecyclingDrafter:
        load_library()  # compiles now, if ever, and not in the first round
        return cls(context.vocab_size, options, str(spec), tree=spec.tree)

    def open(self, view: SequenceView) -> RecyclingSession:
        return RecyclingSession(self, view)

    def learn(self, token: int, top: TopTokens) -> None:
        """Replace what may follow a token."""
        if token < len(self.successors):
            self.successors[token, : len(top.ids)] = top.ids
            self.sureness[token] = 1.0 / (1.0 + math.exp(top.logits[1] - top.logits[0]))

    def forget(self) -> None:
        self.successors.fill(_UNKNOWN)
        self.sureness.fill(0.0)
        self.template = LearntTemplate(_RANK_GUESS[: self.width])

    def memory_bytes(self) -> int:
        return self.successors.nbytes + self.sureness.nbytes


class RecyclingSession(DraftSession):
    """One sequence's walk through the matrix."""

    def __init__(self, drafter: RecyclingDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._view = view
        self._length = len(view.tokens)
        self._draft = Draft(())
        self._ranks: tuple[int, ...] = ()

    def outlook(self, max_tokens: int) -> Outlook:
        pending = self._view.tokens[-1]
        name, matrix = self._drafter.name, self._drafter.successors
        if max_tokens < 1 or pending >= len(matrix) or matrix[pending, 0] == _UNKNOWN:
            return Outlook(name, 0)
        available = len(self._fill_tree(max_tokens)[0] if self._drafter.tree else self._follow_chain(max_tokens))
        sure = float(self._drafter.sureness[pending])
        return Outlook(name, available, 1 + sum(sure >= bound for bound in _SIGNALS))

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        if self._drafter.tree:
            self._draft, self._ranks = self._fill_tree(num_tokens)
        else:
            self._draft = self._follow_chain(num_tokens)
        return self._draft

    def _follow_chain(self, num_tokens: int) -> Draft:
        matrix, sureness = self._drafter.successors, self._drafter.sureness
        token = self._view.tokens[-1]
        chain: list[int] = []
        confidences: list[float] = []
        while len(chain) < num_tokens and token < len(matrix) and token not in self._view.end_ids:
            follower = matrix.item(token, 0)
            if follower == _UNKNOWN:
                break
            chain.append(follower)
            confidences.append(sureness.item(token))
            token = follower
        return Draft(tuple(chain), confidences=tuple(confidences), drafter=self._drafter.name)

    def _fill_tree(self, num_tokens: int) -> tuple[Draft, tuple[int, ...]]:
        """The learnt template, filled from the root down, and each node's rank; what has no known successor is left out."""
        matrix, ends = self._drafter.successors, self._view.end_ids
        shape, probs = self._drafter.template.shape(num_tokens), self._drafter.template.rank_probs
        place = {-1: -1}
        tokens: list[int] = []
        parents: list[int] = []
        ranks: list[int] = []
        for node, (above, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True)):
            if above not in place:
                continue
            parent = place[above]
            before = tokens[parent] if parent >= 0 else self._view.tokens[-1]
            if before >= len(matrix) or (parent >= 0 and before in ends):
                continue
            token = matrix.item(before, rank)
            if token != _UNKNOWN:
                place[node] = len(tokens)
                tokens.append(token)
                parents.append(parent)
                ranks.append(rank)
        confidences = tuple(probs[rank] for rank in ranks)
        return Draft(tuple(tokens), tuple(parents), confidences=confidences, drafter=self._drafter.name), tuple(ranks)

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        drafter, tokens = self._drafter, self._view.tokens
        if verdict is not None and self._draft.parents is not None:
            drafter.template.learn(self._draft.parents, self._ranks, verdict)
        if target_logits is not None:
            rows = row_tokens(tokens, self._length, self._draft.tokens, verdict, len(target_logits))
            best = top_tokens(target_logits[:, : len(drafter.successors)], drafter.width, [row for row, _ in rows])
            for (_, token), top in zip(rows, best, strict=True):
                drafter.learn(token, top)
        self._length = len(tokens)
        self._draft = Draft(())

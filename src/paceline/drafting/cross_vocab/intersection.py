"""Token-level intersection: the draft draws among the tokens that both vocabularies have (`tli`, 2502.05202, section 4).

Its distribution is restricted to them and renormalised, so that it is known in the target's ids and the ratio tests apply:
lossless, and at temperature above 0 accepted more often than text that must match exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch

from paceline.config import SamplingParams
from paceline.drafting.base import KeepDrafting, SequenceView
from paceline.drafting.cross_vocab.base import TranslatedDrafter, TranslatedOptions, TranslatedSession
from paceline.drafting.cross_vocab.vocabulary import shared_ids
from paceline.errors import OptionError
from paceline.execution.base import ForwardOutput, Runner, Segment, SequenceHandle
from paceline.records import Draft


class TliDrafter(TranslatedDrafter):
    """`tli:PATH`: drafts the tokens that both vocabularies have, with their distribution.

    Cost: a forward of the draft a token, a row of the target's width for each drawn token, and an encoding of a few words a round.
    Memory: the draft's weights and cache, and the spellings of both vocabularies.
    """

    options_type = TranslatedOptions
    samples = True

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """(target id, draft id) of the shared tokens. Raises OptionError when there are none."""
        found = shared_ids(self.target_vocabulary, self.draft_vocabulary, self.vocab_size, self.draft_size)
        if not found:
            raise OptionError(f"draft = {self.name!r}: the two vocabularies share no token; use uag or slem, which go through text")
        return found

    @cached_property
    def target_ids(self) -> dict[int, int]:
        """Target id of each shared draft id."""
        return {draft: target for target, draft in self.pairs}

    def drafting_runner(self) -> Runner:
        return RestrictedRunner(self.runner, sorted(self.target_ids))

    def stop_ids(self, view: SequenceView) -> frozenset[int]:
        return frozenset(draft for target, draft in self.pairs if target in view.end_ids)

    def sampling_of(self, view: SequenceView) -> SamplingParams:
        # Where the target's own draws decide (a seeded request), a draw of the draft could only agree by chance.
        return SamplingParams() if view.coupled else super().sampling_of(view)

    def open(self, view: SequenceView) -> TliSession:
        return TliSession(self, view)

    @cached_property
    def columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[shared] int64 each: the shared tokens' columns in the target's rows, and in the draft's."""
        target, draft = zip(*self.pairs, strict=True)
        return torch.tensor(target), torch.tensor(draft)


class TliSession(TranslatedSession):
    """Drafts shared tokens for one sequence."""

    _drafter: TliDrafter

    def translated(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        drafted = self.draft_ids(num_tokens, keep_drafting)
        tokens = tuple(self._drafter.target_ids[token] for token in drafted.tokens)
        rows = None if drafted.draft_probs is None else self._in_target_ids(drafted.draft_probs)
        return Draft(tokens, draft_probs=rows, confidences=drafted.confidences, drafter=self._drafter.name)

    def _in_target_ids(self, draft_probs: torch.Tensor) -> torch.Tensor:
        """[N, V of the draft] -> [N, V of the target]; all mass lies on shared tokens."""
        target, draft = (columns.to(draft_probs.device) for columns in self._drafter.columns)
        rows = draft_probs.new_zeros(len(draft_probs), self._drafter.vocab_size)
        return rows.index_copy_(1, target, draft_probs.index_select(1, draft))


class RestrictedRunner(Runner):
    """A model that gives some tokens only: the logits of all others are minus infinity."""

    def __init__(self, runner: Runner, allowed: Sequence[int]) -> None:
        self.info = runner.info
        self._runner = runner
        self._mask = torch.full((runner.info.vocab_size,), -math.inf)
        self._mask[list(allowed)] = 0.0

    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        output = self._runner.forward(segments, want_hidden=want_hidden)
        self._mask = self._mask.to(output.logits.device)
        return ForwardOutput(output.logits + self._mask, output.hidden)

    def open(self) -> SequenceHandle:
        return self._runner.open()

    def fork(self, sequence: SequenceHandle) -> SequenceHandle:
        return self._runner.fork(sequence)

    def accept(self, sequence: SequenceHandle, rows: Sequence[int]) -> None:
        self._runner.accept(sequence, rows)

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        self._runner.truncate(sequence, length)

    def close(self, sequence: SequenceHandle) -> None:
        self._runner.close(sequence)

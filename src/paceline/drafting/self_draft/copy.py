"""Drafts of a copy of the target in fewer bits that works in the target's own cache (ours; QuantSpec, 2502.10424, drafts over a
rounded form of the target's keys and values, too).

The keys and values of committed tokens are the target's: nothing is read twice, no second cache is held, and the copy's rounding
is felt in the drafted tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftJob, SequenceView
from paceline.drafting.model import ModelDrafter, ModelOptions
from paceline.drafting.self_draft.session import SelfDrafter, SelfSession, Steps
from paceline.execution.base import Runner, Segment, SequenceHandle
from paceline.records import Draft, Outlook


class CopyDrafter(SelfDrafter):
    """runner: the copy, which can work in the target's sequences (`Runner.adopt_cache`)."""

    drafts_together = True

    @classmethod
    def over(cls, copy: Runner, spec: DrafterSpec, temperature: float | str | None, context: DrafterContext) -> Drafter:
        """A drafter that runs the copy: in the target's cache, or in one of its own where the backend wants that."""
        if context.target is not None and copy.adopt_cache(context.target):
            return cls(copy, str(spec), context.vocab_size, temperature)
        return ModelDrafter(copy, str(spec), options=ModelOptions(temperature=temperature), vocab_size=context.vocab_size)

    def memory_bytes(self) -> int:
        return self.runner.info.weight_bytes

    def open(self, view: SequenceView) -> CopySession:
        return CopySession(self, view)

    def propose_together(self, jobs: Sequence[DraftJob]) -> list[Draft]:
        """One forward of the copy a step, over all sequences that still draft."""
        drafts: list[Draft] = [Draft((), drafter=self.name)] * len(jobs)
        running: dict[int, tuple[Steps, SequenceHandle, int]] = {}
        try:
            for i, job in enumerate(jobs):
                session = job.session
                assert isinstance(session, CopySession)
                if session.sequence is not None and job.num_tokens > 0:
                    steps = session._steps(session.sequence, job.num_tokens, job.keep_drafting)
                    running[i] = (steps, *next(steps))
            while running:
                logits = self.feed([(cache, token) for _, cache, token in running.values()])
                for (i, (steps, _, _)), row in zip(list(running.items()), logits, strict=True):
                    try:
                        running[i] = (steps, *steps.send(row))
                    except StopIteration as end:
                        drafts[i] = end.value
                        del running[i]
        finally:
            for steps, _, _ in running.values():
                steps.close()
        return drafts

    def feed(self, tokens: Sequence[tuple[SequenceHandle, int]]) -> torch.Tensor:
        """Feed and commit a token in each cache; [len(tokens), V] float32, the logits that follow."""
        logits = self.runner.forward([Segment(cache, [token]) for cache, token in tokens]).logits
        for cache, _ in tokens:
            self.runner.accept(cache, [0])
        return logits


class CopySession(SelfSession):
    """See the module's text."""

    def __init__(self, drafter: CopyDrafter, view: SequenceView) -> None:
        super().__init__(drafter, view)
        self._copy = drafter

    @property
    def sequence(self) -> SequenceHandle | None:
        """The target's."""
        return self._view.sequence

    def outlook(self, max_tokens: int) -> Outlook:
        return replace(super().outlook(max_tokens), together=True)

    def _logits(self, cache: SequenceHandle, token: int) -> torch.Tensor:
        return self._copy.feed([(cache, token)])[0]

"""What self-drafts share: a chain drafted in a cache of the target's own kind, which is then put back as it was."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

import torch

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, Reviewer, SequenceView
from paceline.drafting.choice import TokenChooser
from paceline.drafting.temperature import DraftTemperature
from paceline.errors import OptionError
from paceline.execution.base import Runner, Segment, SequenceHandle
from paceline.records import Draft, Outlook, Verdict

Steps = Generator[tuple[SequenceHandle, int], torch.Tensor, Draft]


class SelfDrafter(Drafter):
    """Base of drafters that run the target, or a part of it, on the request's own sequence."""

    samples = True

    def __init__(self, runner: Runner, name: str, vocab_size: int, temperature: float | str | None = None) -> None:
        self.runner = self.verifier = runner
        self.name = name
        self.vocab_size = vocab_size
        self.temperature = DraftTemperature(temperature)

    @abstractmethod
    def open(self, view: SequenceView) -> SelfSession: ...

    def open_reviewer(self, view: SequenceView) -> SelfReviewer:
        return SelfReviewer(self, view)


def target_of(spec: DrafterSpec, context: DrafterContext, *, parts: bool = False, gathers: bool = False) -> Runner:
    """The target's runner. parts, gathers: it must have `forward_part`, or `gather`. Raises OptionError where it lacks them."""
    runner = context.target
    if runner is None:
        raise OptionError(f"draft = '{spec}': there is no target to run parts of here; use another drafter")
    if (parts and not runner.runs_parts) or (gathers and not runner.gathers):
        lack = "runs whole models only" if parts else "cannot copy parts of its cache"
        raise OptionError(f"draft = '{spec}': the {runner.info.backend} backend {lack}; use backend = 'native' or 'lean'")
    return runner


class SelfSession(DraftSession):
    """Drafts a chain in the cache that `_enter` names; its rows are taken back before the target verifies."""

    def __init__(self, drafter: SelfDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._runner = drafter.runner
        self._view = view
        temperature, sampling = drafter.temperature, view.sampling
        self._chooser = TokenChooser(view, temperature.sampling_of(sampling), drafter.vocab_size, temperature.tuner(sampling))

    def outlook(self, max_tokens: int) -> Outlook:
        room = self._runner.info.max_context - len(self._view.tokens)
        return Outlook(self._drafter.name, max(0, min(max_tokens, room)) if self._view.sequence is not None else 0)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        if self._view.sequence is None or num_tokens < 1:
            return Draft((), drafter=self._drafter.name)
        with closing(self._steps(self._view.sequence, num_tokens, keep_drafting)) as steps:
            try:
                cache, feed = next(steps)
                while True:
                    cache, feed = steps.send(self._logits(cache, feed))
            except StopIteration as end:
                draft: Draft = end.value
                return draft

    def _steps(self, sequence: SequenceHandle, num_tokens: int, keep_drafting: KeepDrafting) -> Steps:
        """Asks for the logits behind each token, in turn, and returns the draft. The cache is as before in the end."""
        cache = self._enter(sequence)
        committed = cache.length
        chosen = self._chooser.begin()
        feed = self._view.tokens[-1]
        confidences: list[float] = []
        try:
            while True:
                logits = yield cache, feed
                features = chosen.add(logits)
                confidences.append(self._confidence(logits, chosen.tokens, features.max_prob))
                feed = chosen.tokens[-1]
                done = len(chosen.tokens) >= num_tokens or feed in self._view.end_ids
                if done or not keep_drafting(replace(features, max_prob=confidences[-1])):
                    return replace(chosen.draft(self._drafter.name), confidences=tuple(confidences))
        finally:
            self._runner.truncate(cache, committed)

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        self._chooser.learn(verdict)

    def rewind(self, length: int) -> bool:
        return True

    def _enter(self, sequence: SequenceHandle) -> SequenceHandle:
        """The cache to draft in, holding what the pending token is to see. Called once a draft."""
        return sequence

    @abstractmethod
    def _logits(self, cache: SequenceHandle, token: int) -> torch.Tensor:
        """Feed and commit a token in `cache`; [V] float32, the logits that follow it."""

    def review(self, segment: Segment) -> torch.Tensor:
        """[rows asked for, V or wider] float32 logits of a chain or tree in the cache that `_enter` gave; commits nothing."""
        return self._runner.forward([segment]).logits

    def _confidence(self, logits: torch.Tensor, tokens: list[int], max_prob: float) -> float:
        """The chance given to the last of the draft's tokens so far, which was chosen from `logits`; known before the next one."""
        return max_prob


class SelfReviewer(Reviewer):
    """A self-draft that verifies for another drafter, in the cache that it would draft in; its rows are taken back likewise."""

    def __init__(self, drafter: SelfDrafter, view: SequenceView) -> None:
        self.runner = drafter.runner
        self.vocab_size = drafter.vocab_size
        self.sampling = view.sampling
        self.fed = len(view.tokens) - 1
        self._view = view
        self._session = drafter.open(view)
        self._length = 0

    def room(self, length: int) -> int:
        return self._session.outlook(self.runner.info.max_context).available

    def enter(self) -> None:
        assert self._view.sequence is not None  # else there is no room
        self.cache = self._session._enter(self._view.sequence)
        self._length = self.cache.length

    def forward(self, segment: Segment) -> torch.Tensor:
        return self._session.review(segment)

    def leave(self) -> None:
        self.runner.truncate(self.cache, self._length)

    def follow(self, shared: int, length: int) -> None:
        self.fed = length - 1  # in the target's cache, or in a copy that follows it

    def rewind(self, length: int) -> None:
        self._session.rewind(length)

    def close(self) -> None:
        self._session.close()

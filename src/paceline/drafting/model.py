"""An independent draft model: a smaller model of the same vocabulary proposes, one forward a token.

Source: speculative decoding (2211.17192, 2302.01318). The draft keeps a cache of its own, which follows the committed text
lazily: tokens that it drafted and that were kept stay, the rest is dropped, and what it has not seen (the last drafted token
after a full acceptance; whole rounds in which others drafted; the prompt, before its first round) is fed together with the
pending token when it is next asked to draft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paceline.config import SamplingParams
from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.choice import TokenChooser
from paceline.drafting.options import number
from paceline.errors import OptionError
from paceline.execution.base import Segment, prefill
from paceline.records import Draft, Outlook

if TYPE_CHECKING:
    import torch

    from paceline.execution.base import Runner, SequenceHandle

_CHUNK = 512
"""Tokens of one catch-up forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Settings of `model:PATH`."""

    temperature: float | None = None
    """Temperature of the draft when the target samples; None: the target's. 0 drafts the most probable token.

    Lossless at any value: tokens are verified against the distribution that they were drawn from.
    """

    def __post_init__(self) -> None:
        if self.temperature is not None:
            number("temperature", self.temperature, 0.0, 100.0)


class ModelDrafter(Drafter):
    """Drafts with a second model. Greedy requests: its most probable tokens (point-mass); else drawn from its distribution."""

    options_type = ModelOptions
    samples = True

    def __init__(
        self, runner: Runner, name: str = "model", *, options: ModelOptions | None = None, vocab_size: int | None = None
    ) -> None:
        """vocab_size: rows of the target's logits; None: the draft's own. A padded draft vocabulary is cut to it."""
        self.runner = runner
        self.name = name
        self.options = options or ModelOptions()
        self.vocab_size = vocab_size or runner.info.vocab_size

    @classmethod
    def build(cls, spec: DrafterSpec, options: ModelOptions, context: DrafterContext) -> ModelDrafter:
        if context.open_model is None:
            raise OptionError(f"draft = '{spec}': a second model cannot be loaded here; use a drafter without a model")
        return cls(context.open_model(spec.argument), str(spec), options=options, vocab_size=context.vocab_size)

    def open(self, view: SequenceView) -> ModelSession:
        return ModelSession(self, view)

    def sampling_of(self, sampling: SamplingParams) -> SamplingParams:
        """How draft tokens are chosen for a request with this sampling."""
        temperature = self.options.temperature
        if sampling.greedy or temperature is None:
            return sampling
        if temperature == 0:
            return replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, n=1)
        return replace(sampling, temperature=temperature)


class ModelSession(DraftSession):
    """The draft's cache of one sequence.

    Invariant: the cache holds the first `_agreed` committed tokens and then `_drafted`, tokens of this session's last draft
    of which it is not yet known whether they were kept. `_agreed` is below the committed length: the pending token is always
    fed anew.
    """

    def __init__(self, drafter: ModelDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._runner = drafter.runner
        self._view = view
        self._cache: SequenceHandle = self._runner.open()
        self._agreed = 0
        self._drafted: list[int] = []
        self._chooser = TokenChooser(view, drafter.sampling_of(view.sampling), drafter.vocab_size)

    @property
    def cached_tokens(self) -> int:
        """Tokens in the draft's cache."""
        return self._cache.length

    def _synchronise(self) -> None:
        """Keep the drafted tokens that were committed, drop the others from the cache."""
        tokens = self._view.tokens
        self._agreed = min(self._agreed, len(tokens) - 1)
        for token in self._drafted:
            if self._agreed >= len(tokens) - 1 or tokens[self._agreed] != token:
                break
            self._agreed += 1
        self._drafted = []
        if self._cache.length > self._agreed:
            self._runner.truncate(self._cache, self._agreed)

    def outlook(self, max_tokens: int) -> Outlook:
        self._synchronise()
        length = len(self._view.tokens)
        room = self._runner.info.max_context - length + 1
        available = max(0, min(max_tokens, room))
        return Outlook(self._drafter.name, available, catch_up=length - 1 - self._agreed if available else 0)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        self._synchronise()
        room = self._runner.info.max_context - len(self._view.tokens) + 1
        num_tokens = min(num_tokens, room)
        if num_tokens < 1:
            return Draft((), drafter=self._drafter.name)
        feed = self._catch_up()
        chosen = self._chooser.begin()
        while True:
            features = chosen.add(self._forward(feed))
            token = chosen.tokens[-1]
            done = len(chosen.tokens) >= num_tokens or token in self._view.end_ids
            if done or not keep_drafting(features):
                return chosen.draft(self._drafter.name)
            feed = [token]
            self._drafted.append(token)

    def _catch_up(self) -> list[int]:
        """Feed what the cache lacks but for a last piece, which ends with the pending token and is returned."""
        tokens = self._view.tokens
        missing = len(tokens) - self._agreed
        if missing > _CHUNK:
            prefill(self._runner, self._cache, tokens[self._agreed : -1], _CHUNK)
            self._agreed = len(tokens) - 1
        feed = tokens[self._agreed :]
        self._agreed = len(tokens)
        return feed

    def _forward(self, feed: list[int]) -> torch.Tensor:
        """Run and commit `feed` in the draft's cache; logits [V] of its last token."""
        logits = self._runner.forward([Segment(self._cache, feed, num_logits=1)]).logits[0]
        self._runner.accept(self._cache, range(len(feed)))
        return logits

    def observe(self, verdict: object, target_logits: torch.Tensor | None) -> None:
        self._synchronise()

    def close(self) -> None:
        self._runner.close(self._cache)

"""An independent draft model: a smaller model of the same vocabulary proposes, one forward a token.

Source: speculative decoding (2211.17192, 2302.01318). The draft keeps a cache of its own, which follows the committed text
lazily: tokens that it drafted and that were kept stay, the rest is dropped, and what it has not seen (the last drafted token
after a full acceptance; whole rounds in which others drafted; the prompt, before its first round) is fed together with the
pending token when it is next asked to draft.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from paceline.config import SamplingParams
from paceline.drafting.base import (
    Drafter,
    DrafterContext,
    DrafterSpec,
    DraftJob,
    DraftSession,
    KeepDrafting,
    Reviewer,
    SequenceView,
)
from paceline.drafting.choice import TokenChooser
from paceline.drafting.options import number, whole
from paceline.drafting.temperature import DraftTemperature, check_draft_temperature
from paceline.drafting.tree_search import Children, Growth, expand_and_rerank, opt_tree
from paceline.errors import OptionError, ResourceError
from paceline.execution.base import Decoded, Decoding, Segment, prefill
from paceline.records import UNKNOWN, DecodedToken, Draft, DraftFeatures, Outlook, Verdict

if TYPE_CHECKING:
    from paceline.execution.base import Runner, SequenceHandle

_CHUNK = 512
"""Tokens of one catch-up forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Settings of `model:PATH`."""

    temperature: float | str | None = None
    """Temperature of the draft when the target samples; None: the target's. 0 drafts the most probable token; `auto`: tuned
    between rounds towards the highest acceptance (`drafting/temperature.py`).

    Lossless at any value: tokens are verified against the distribution that they were drawn from.
    """

    tree_width: int = 4
    """Tree form: children of a node, and nodes that are expanded in a level."""
    tree_levels: int = 6
    """Tree form: most passes of the draft in a round."""
    tree_gain: float = 0.0
    """Tree form: 0 grows as EAGLE-2 does; above 0 as OPT-Tree, while a level adds this many expected tokens (try 0.3)."""

    def __post_init__(self) -> None:
        check_draft_temperature(self.temperature)
        whole("tree_width", self.tree_width, 1, 16)
        whole("tree_levels", self.tree_levels, 1, 32)
        number("tree_gain", self.tree_gain, 0.0, 63.0)


class ModelDrafter(Drafter):
    """Drafts with a second model. Greedy requests: its most probable tokens (point-mass); else drawn from its distribution.

    In tree form its most probable continuations, chosen and not drawn at any temperature.
    """

    options_type = ModelOptions
    samples = True

    def __init__(
        self,
        runner: Runner,
        name: str = "model",
        *,
        options: ModelOptions | None = None,
        vocab_size: int | None = None,
        tree: bool = False,
    ) -> None:
        """vocab_size: rows of the target's logits; None: the draft's own. A padded draft vocabulary is cut to it."""
        self.runner = runner
        self.name = name
        self.options = options or ModelOptions()
        self.vocab_size = vocab_size or runner.info.vocab_size
        self.tree = tree
        self.verifier = None if tree else runner
        self.drafts_together = runner.decodes_ahead and not tree
        self.temperature = DraftTemperature(self.options.temperature)

    @classmethod
    def build(cls, spec: DrafterSpec, options: ModelOptions, context: DrafterContext) -> ModelDrafter:
        if context.open_model is None:
            raise OptionError(f"draft = '{spec}': a second model cannot be loaded here; use a drafter without a model")
        runner = context.open_model(spec.argument)
        return cls(runner, str(spec), options=options, vocab_size=context.vocab_size, tree=spec.tree)

    @property
    def warmup_seconds(self) -> float:
        return self.runner.warmup_seconds

    def open(self, view: SequenceView) -> ModelSession:
        return ModelTreeSession(self, view) if self.tree else ModelSession(self, view)

    def propose_together(self, jobs: Sequence[DraftJob]) -> list[Draft]:
        """As the base class says: sequences whose drafts the runner can make by itself share its steps."""
        sessions = [job.session for job in jobs]
        if any(not isinstance(s, ModelSession) or not s.joins(j.num_tokens) for s, j in zip(sessions, jobs, strict=True)):
            return super().propose_together(jobs)
        joined = [(s, j) for s, j in zip(sessions, jobs, strict=True) if isinstance(s, ModelSession)]
        try:
            decoded = self.runner.decode_ahead([s.begin_ahead(j.num_tokens, j.keep_drafting) for s, j in joined])
        except ResourceError:  # memory is short: whoever finds none goes on without a draft
            return super().propose_together(jobs)
        return [session.end_ahead(found) for (session, _), found in zip(joined, decoded, strict=True)]

    def memory_bytes(self) -> int:
        return self.runner.info.weight_bytes

    def open_reviewer(self, view: SequenceView) -> ModelReviewer:
        return ModelReviewer(self, view)

    def sampling_of(self, sampling: SamplingParams) -> SamplingParams:
        """How draft tokens are chosen for a request with this sampling."""
        return self.temperature.sampling_of(sampling)


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
        sampling = view.sampling
        self._chooser = TokenChooser(view, drafter.sampling_of(sampling), drafter.vocab_size, drafter.temperature.tuner(sampling))
        self._dropped = False
        """Whether its memory ran out; the cache is closed then."""
        self._streams = drafter.runner.decodes_ahead and drafter.runner.info.vocab_size == drafter.vocab_size

    @property
    def cached_tokens(self) -> int:
        """Tokens in the draft's cache."""
        return self._cache.length

    def _synchronise(self) -> None:
        """Keep the drafted tokens that were committed, drop the others from the cache."""
        tokens = self._view.tokens
        self._agreed = min(self._agreed, len(tokens) - 1, self._cache.length)
        for token in self._drafted:
            if self._agreed >= len(tokens) - 1 or tokens[self._agreed] != token:
                break
            self._agreed += 1
        self._drafted = []
        if not self._dropped and self._cache.length > self._agreed:
            self._runner.truncate(self._cache, self._agreed)

    def outlook(self, max_tokens: int) -> Outlook:
        self._synchronise()
        available = 0 if self._dropped else max(0, min(max_tokens, self._room()))
        missing = len(self._view.tokens) - 1 - self._agreed
        together = self._drafter.drafts_together
        return Outlook(self._drafter.name, available, catch_up=missing if available else 0, together=together, ahead=int(together))

    def _room(self) -> int:
        """Tokens that fit into the draft's context; the last drafted token is never fed."""
        return self._runner.info.max_context - len(self._view.tokens) + 1

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        """As the base class says. When the draft's memory runs out, it is dropped for this request, which goes on without it."""
        self._synchronise()
        num_tokens = min(num_tokens, self._room())
        if num_tokens < 1 or self._dropped:
            return Draft((), drafter=self._drafter.name)
        try:
            return self._draft(num_tokens, keep_drafting)
        except ResourceError as error:
            warnings.warn(f"draft {self._drafter.name!r} is left out of this request: {error}", RuntimeWarning, stacklevel=2)
            self.close()
            self._dropped, self._drafted = True, []
            return Draft((), drafter=self._drafter.name)

    def _draft(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        if self._ahead:
            (decoded,) = self._runner.decode_ahead([self.begin_ahead(num_tokens, keep_drafting)])
            return self.end_ahead(decoded).settled()
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

    @property
    def _ahead(self) -> bool:
        """Whether the runner can make the next draft by itself."""
        return self._streams and self._chooser.unshaped

    def joins(self, num_tokens: int) -> bool:
        """Whether the next draft can be made together with those of other sequences."""
        self._synchronise()
        return self._ahead and not self._dropped and min(num_tokens, self._room()) > 0

    def begin_ahead(self, num_tokens: int, keep_drafting: KeepDrafting) -> Decoding:
        """What the runner is to decode ahead: the controller is asked about a token while the next one is decoded.

        A token's evidence is that of its own distribution, as one by one, so a stop depends on nothing that comes after it. The
        token that is under way at a stop is drafted, too: its time is spent, and it was so before anything was known of it.
        """
        num_tokens = min(num_tokens, self._room())
        ends = self._view.end_ids
        position = 0

        def keep_on(decoded: DecodedToken) -> bool:
            nonlocal position
            position += 1
            features = DraftFeatures(position, decoded.largest, decoded.chance, decoded.entropy, decoded.margin)
            return position < num_tokens and decoded.token not in ends and keep_drafting(features)

        law, numbers = self._chooser.ahead(num_tokens)
        return Decoding(self._cache, self._catch_up(), num_tokens, keep_on, law, numbers)

    def end_ahead(self, decoded: Decoded) -> Draft:
        """The draft that was decoded. Its last token may be late, unless the text ends before it."""
        known, late, ends = decoded.tokens, decoded.late, self._view.end_ids
        self._drafted = [d.token for d in known[: len(known) - (late is None)]]  # what was fed
        end = next((i for i, d in enumerate(known, 1) if d.token in ends), None)
        if end is not None:
            known, late = known[:end], None
        tokens = (*(d.token for d in known), *([UNKNOWN] if late is not None else ()))
        confidences, drawn = tuple(d.largest for d in known), not self._chooser.greedy
        return Draft(tokens, confidences=confidences, drafter=self._drafter.name, coupled=drawn, late=late)

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

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        self._chooser.learn(verdict)
        self._synchronise()

    def rewind(self, length: int) -> bool:
        self._synchronise()
        self._agreed = min(self._agreed, length)
        if not self._dropped:
            self._runner.truncate(self._cache, min(self._cache.length, length))
        return True

    def close(self) -> None:
        if not self._dropped:
            self._runner.close(self._cache)


class ModelTreeSession(ModelSession):
    """Drafts a tree of the most probable continuations (EAGLE-2's or OPT-Tree's growth with a whole model as the head).

    A level is one forward over the tree so far, behind the committed tokens; none of its rows is kept, accepted tokens are fed with
    the next pending token.
    """

    def _draft(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        options, ends = self._drafter.options, self._view.end_ids
        levels = min(options.tree_levels, num_tokens)
        pending = self._forward(self._catch_up())
        inner: list[int] = []

        def expand(growth: Growth, frontier: Sequence[int]) -> list[Children]:
            rows = [pending] if frontier == [-1] else self._level(growth, inner, frontier)
            width = options.tree_width
            return [self._chooser.children(row, growth.path(node), width) for node, row in zip(frontier, rows, strict=True)]

        if options.tree_gain:
            growth = opt_tree(
                expand, num_tokens, width=options.tree_width, levels=levels, least_gain=options.tree_gain, end_ids=ends
            )
        else:
            growth = expand_and_rerank(expand, num_tokens, width=options.tree_width, levels=levels, end_ids=ends)
        return growth.draft(num_tokens, self._drafter.name)

    def _level(self, growth: Growth, inner: list[int], frontier: Sequence[int]) -> list[torch.Tensor]:
        """Logits of the frontier's nodes. inner: nodes of earlier levels that were fed, in order; the frontier is added."""
        inner += frontier
        place = {-1: -1} | {node: i for i, node in enumerate(inner)}
        tokens = [growth.tokens[node] for node in inner]
        parents = [place[growth.parents[node]] for node in inner]
        segment = Segment(self._cache, tokens, parents, num_logits=len(frontier))
        return list(self._runner.forward([segment]).logits)


class ModelReviewer(Reviewer):
    """A whole model in a cache of its own, which keeps what is accepted from one draft to the next."""

    def __init__(self, drafter: ModelDrafter, view: SequenceView) -> None:
        self.runner = drafter.runner
        self.vocab_size = drafter.vocab_size
        self.sampling = drafter.sampling_of(view.sampling)
        self.cache = self.runner.open()
        self.fed = 0

    def room(self, length: int) -> int:
        return self.runner.info.max_context - length + 1  # the last emitted token is never fed

    def enter(self) -> None:
        pass

    def forward(self, segment: Segment) -> torch.Tensor:
        return self.runner.forward([segment]).logits

    def follow(self, shared: int, length: int) -> None:
        if self.fed > min(shared, length - 1):
            self.fed = min(shared, length - 1)
            self.runner.truncate(self.cache, self.fed)

    def close(self) -> None:
        self.runner.close(self.cache)

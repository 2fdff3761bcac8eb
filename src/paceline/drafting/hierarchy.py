"""Drafters that draft for drafters: `cascade:LOWER>UPPER`, of any depth.

The upper drafter's model verifies what the lower one proposes, and what it emits is the draft for the target; with
`cascade:A>B>C`, A drafts for B and B for C. Sources: HSD (2510.19705: gather at least a number of tokens before handing them up),
CS-drafting (2312.11462: the lowest level is no model at all), TriForce (2404.11912: a part of the target in the middle). Exact at
every level, by the target's own rules (`level`). Deviations: a level's controller may leave out its lower draft in any of its
rounds; lower drafts are cut so that nothing emitted has to be thrown away (HSD's buffer overshoots instead).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting import registry
from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.level import Emitted, Level
from paceline.drafting.options import whole
from paceline.errors import OptionError
from paceline.records import Draft, DraftFeatures, Outlook
from paceline.sampling import CounterRandom, Purpose

_BITS = 2.0**53


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeOptions:
    """Settings of `cascade`; they hold at every level. The drafters in it have their defaults."""

    controller: str = "pacer"
    """What decides, before each round of a level, how much the lower drafter proposes, if anything."""
    num_draft: int = 8
    """Most tokens that a lower drafter proposes at once (1 to 63)."""

    def __post_init__(self) -> None:
        controllers.info(self.controller)
        whole("num_draft", self.num_draft, 1, 63)


class CascadeDrafter(Drafter):
    """Drafts with a model that has a drafter of its own. Drawn from the model's distribution; greedy requests: its argmax."""

    options_type = CascadeOptions
    samples = True

    def __init__(
        self,
        upper: Drafter,
        lower: Drafter,
        name: str = "cascade",
        *,
        options: CascadeOptions | None = None,
        costs: CostTable | None = None,
    ) -> None:
        """upper: one with a `verifier`. costs: of its forwards and of the lower drafter; None: unknown, to be learnt."""
        self.name = name
        self.options = options or CascadeOptions()
        self.upper = upper
        self.lower = lower
        self.runner = upper.verifier
        self.share_of_target = upper.share_of_target
        self.controller = controllers.create(self.options.controller, costs or CostTable([1], [1], [[1e-3]]))

    @classmethod
    def build(cls, spec: DrafterSpec, options: CascadeOptions, context: DrafterContext) -> CascadeDrafter:
        separator = registry.TABLE[spec.kind].parts
        below, _, top = spec.argument.rpartition(separator)
        upper = registry.create(top, {}, context)
        runner = upper.verifier
        if runner is None:
            raise OptionError(f"draft = '{spec}': {top!r} cannot verify for another drafter; put a model there, as in model:PATH")
        inner = replace(context, target=runner, max_context=min(context.max_context, runner.info.max_context))
        if runner is not context.target:  # what reads or copies the target's weights would not fit this model
            inner = replace(inner, source=None, open_self=None, open_graded=None)
        if separator in below:
            lower: Drafter = cls.build(DrafterSpec(spec.kind, below), options, inner)
        else:
            lower = registry.create(below, {}, inner)
        if lower.wants_hidden:
            raise OptionError(
                f"draft = '{spec}': {below!r} reads the target's own states and drafts for nothing else; use it alone"
            )
        costs = context.level_costs(upper, lower) if context.level_costs is not None else None
        return cls(upper, lower, str(spec), options=options, costs=costs)

    def open(self, view: SequenceView) -> CascadeSession:
        return CascadeSession(self, view)

    def memory_bytes(self) -> int:
        return self.upper.memory_bytes() + self.lower.memory_bytes()

    def finish_request(self, tokens: Sequence[int], num_prompt: int) -> None:
        self.lower.finish_request(tokens, num_prompt)

    def forget(self) -> None:
        self.upper.forget()
        self.lower.forget()


class CascadeSession(DraftSession):
    """A level of one sequence, seen from above."""

    def __init__(self, drafter: CascadeDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._view = view
        self._reviewer = drafter.upper.open_reviewer(view)
        self._level = Level(self._reviewer, drafter.lower, drafter.controller, drafter.options.num_draft, view)
        self._known = len(view.tokens)
        """Leading tokens of the level's text that were committed above when it was last looked at."""

    def _synchronise(self) -> None:
        """Take the level's text back to the committed one, as far as they agree, and on from there."""
        own, committed = self._level.view.tokens, self._view.tokens
        shared = min(self._known, len(committed))
        both = min(len(own), len(committed))
        while shared < both and own[shared] == committed[shared]:
            shared += 1
        self._level.follow(shared, committed[shared:])
        self._known = len(committed)

    def outlook(self, max_tokens: int) -> Outlook:
        self._synchronise()
        length = len(self._view.tokens)
        available = max(0, min(max_tokens, self._reviewer.room(length)))
        return Outlook(self._drafter.name, available, catch_up=max(0, length - 1 - self._reviewer.fed) if available else 0)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        self._synchronise()
        num_tokens = min(num_tokens, self._reviewer.room(len(self._view.tokens)))
        if num_tokens < 1:
            return Draft((), drafter=self._drafter.name)
        self._renew_seed()
        self._reviewer.enter()
        try:
            made = self._gather(num_tokens, keep_drafting)
        finally:
            self._reviewer.leave()
        drawn = not self._level.view.sampling.greedy
        return Draft(
            tuple(emitted.token for emitted in made),
            draft_probs=torch.stack([emitted.probs for emitted in made]) if drawn else None,
            confidences=tuple(emitted.max_prob for emitted in made),
            drafter=self._drafter.name,
        )

    def _gather(self, num_tokens: int, keep_drafting: KeepDrafting) -> list[Emitted]:
        """Rounds of the level until there are enough tokens, the controller above says stop, or the text ends."""
        made: list[Emitted] = []
        going_on = True
        while going_on:
            for emitted in self._level.advance(num_tokens - len(made)):
                made.append(emitted)
                features = DraftFeatures(len(made), emitted.max_prob, emitted.token_prob, emitted.entropy, emitted.margin)
                going_on = keep_drafting(features) and going_on
            # A last single place is not worth a whole pass where the lower draft usually fills several.
            left = num_tokens - len(made) - self._level.drafted
            going_on = going_on and left > 0 and made[-1].token not in self._view.end_ids
        return made

    def _renew_seed(self) -> None:
        """New numbers below for each round above: after a rejection the level comes to the same positions again, and what became
        of its first numbers there has influenced the rejection. Coupled draws are the exception: they are to be the same."""
        view = self._view
        if not view.coupled:
            number = CounterRandom(view.seed).uniform(len(view.tokens), Purpose.DRAFT)
            self._level.view.seed = int(number * _BITS)

    def rewind(self, length: int) -> bool:
        self._known = min(self._known, length)
        self._reviewer.rewind(length)
        return True

    def close(self) -> None:
        self._level.close()
        self._reviewer.close()

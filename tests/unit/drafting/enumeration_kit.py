"""Laws of whole drafters by enumeration: every random number that a draft takes becomes a coin with all its outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch

from paceline.config import SamplingParams
from paceline.drafting import choice, hierarchy, level
from paceline.drafting.base import Drafter
from paceline.drafting.cross_vocab import base
from paceline.sampling import Purpose, SampledRows
from paceline.verification.registry import choose_rule
from toys import Language, make_view
from unit.drafting.kit import always
from unit.verification.exact import Branch, Coin, Law, branching_draw, extend, outcomes

PROMPT = (0, 1)


class BranchRandom:
    """Stands in for `CounterRandom`: a number is a coin of the running branch, the same one whenever its key returns."""

    branch: Branch

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def uniform(self, position: int, purpose: Purpose, index: int = 0) -> Coin:
        return self.branch.uniform(1000 * (self.seed + 1) + position, purpose, index)


class CountedSeeds:
    """Stands in for `CounterRandom` where seeds are renewed: a seed of its own for each (seed, position)."""

    known: ClassVar[dict[tuple[int, int], int]] = {}

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def uniform(self, position: int, purpose: Purpose) -> float:
        assert purpose == Purpose.DRAFT
        return self.known.setdefault((self._seed, position), len(self.known) + 1) / 2.0**53


def put_coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the random numbers of drafters that draw, and of those that renew their seeds."""
    for module in (level, choice):
        monkeypatch.setattr(module, "CounterRandom", BranchRandom)
    monkeypatch.setattr(choice, "draw", branching_draw)
    for module in (hierarchy, base):
        monkeypatch.setattr(module, "CounterRandom", CountedSeeds)


def rows_of(language: Language) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """A language's distribution after `PROMPT` and the given tokens."""
    return lambda prefix: torch.softmax(torch.from_numpy(language(PROMPT + prefix)), dim=-1)


def law_of_text(drafter: Drafter, target: Language, length: int, num_draft: int) -> Law:
    """Law of the first `length` tokens of a text that the drafter drafted, over as many rounds as that takes."""
    sampling = SamplingParams(temperature=1.0)

    def run(branch: Branch) -> tuple[int, tuple[int, ...]]:
        BranchRandom.branch = branch
        view = make_view(PROMPT, sampling=sampling)
        session = drafter.open(view)
        while len(view.tokens) < len(PROMPT) + length:
            draft = session.propose(num_draft, always)
            path = tuple(view.tokens)
            logits = [torch.from_numpy(target(path + draft.tokens[:j])).float() for j in range(len(draft) + 1)]
            rows = SampledRows(torch.stack(logits), sampling, view.tokens, len(PROMPT), draft)
            rule = choose_rule("auto", sampling, draft, seeded=False)
            verdict = rule.verify(rows, draft, branch, len(view.tokens))  # type: ignore[arg-type]
            view.tokens += verdict.emitted
            session.observe(verdict if draft.tokens else None, None)
        session.close()
        return 0, tuple(view.tokens[len(PROMPT) : len(PROMPT) + length])

    return extend(outcomes(run), rows_of(target), length)

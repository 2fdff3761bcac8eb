"""What the ratio rules share: probabilities of single tokens, and the part of the target that a draft leaves over."""

from __future__ import annotations

import torch

from paceline.records import Draft
from paceline.sampling import CounterRandom, Purpose, draw
from paceline.verification.base import TargetRows


def draft_rows(draft: Draft) -> torch.Tensor:
    """[N, W] the distributions that the tokens were drawn from. Raises ValueError for a point-mass draft."""
    if draft.draft_probs is None:
        raise ValueError(f"a ratio rule needs draft_probs, which the draft of {draft.drafter!r} lacks; use the rule 'match'")
    return draft.draft_probs


def probability(row: torch.Tensor, token: int) -> float:
    """Probability of a token; 0 beyond the row, since models of one tokenizer may be padded to different widths."""
    return float(row[token]) if token < row.numel() else 0.0


def residual(target_probs: torch.Tensor, draft_probs: torch.Tensor, weight: float = 1.0) -> tuple[torch.Tensor, float]:
    """max(weight * p - q, 0), [V], and its sum. q counts as 0 where it is narrower than p, and is cut where it is wider."""
    width = min(target_probs.numel(), draft_probs.numel())
    rest = target_probs * weight
    rest[:width] -= draft_probs[:width]
    rest.clamp_(min=0.0)
    return rest, float(rest.sum())


def overlap(target_probs: torch.Tensor, draft_probs: torch.Tensor, weight: float = 1.0) -> float:
    """sum min(w p, q) / w: chance that a token drawn from q is accepted."""
    width = min(target_probs.numel(), draft_probs.numel())
    weighted = target_probs[:width] if weight == 1.0 else target_probs[:width] * weight
    return min(1.0, float(torch.minimum(weighted, draft_probs[:width]).sum()) / weight)


def sibling_row(draft: Draft, child: int, earlier: list[int]) -> torch.Tensor | None:
    """[W] what a child was drawn from: without replacement, its row less the tokens of earlier siblings, renormalised.

    A row that has been reduced already comes out the same. None when earlier siblings hold all the mass: nothing could be drawn.
    """
    row = draft_rows(draft)[child]
    if not (draft.without_replacement and earlier):
        return row
    row = row.clone()
    row[[token for token in earlier if token < row.numel()]] = 0.0
    left = float(row.sum())
    return row.div_(left) if left > 1e-12 else None


def is_empty(mass: float, like: torch.Tensor) -> bool:
    """Whether a residual is all rounding error. Its mass is the chance to need it, so the choice made then hardly matters."""
    return mass <= (1e-12 if like.dtype == torch.float64 else 1e-7)


def draw_recovered(rest: torch.Tensor, mass: float, target_probs: torch.Tensor, random: CounterRandom, position: int) -> int:
    """The token that replaces a rejected one, from the residual, or from the target where that is empty."""
    return draw(target_probs if is_empty(mass, rest) else rest, random.uniform(position, Purpose.RESIDUAL))


def draw_bonus(target: TargetRows, row: int, random: CounterRandom, position: int) -> int:
    """The token after a wholly accepted path."""
    return draw(target.probs(row), random.uniform(position, Purpose.TARGET))

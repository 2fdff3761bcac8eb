"""The rule interface: pure functions from target rows and a draft to a verdict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from paceline.records import Draft, Verdict
from paceline.sampling import mass_of

if TYPE_CHECKING:
    import torch

    from paceline.sampling import CounterRandom


class Rule(ABC):
    """Decides which drafted tokens stay, and draws the token that follows them."""

    name: str = ""
    lossless: bool = True
    needs_draft_probs: bool = False
    """True for ratio tests: they need draws from a known distribution and are biased on point-mass drafts."""
    takes_trees: bool = True
    greedy_only: bool = False
    """True when the rule follows argmax and so ignores temperature."""

    @abstractmethod
    def verify(self, target: TargetRows, draft: Draft, random: CounterRandom, position: int) -> Verdict:
        """Verify one draft.

        target: processed rows: row 0 belongs to the pending token, row i + 1 to draft token i.
        draft: chain or tree, possibly empty (then the verdict is one token of row 0).
        random: numbers by key; see `CounterRandom` for which position may key what.
        position: absolute position of the first token to be emitted.
        """


class TargetRows(Protocol):
    """The target's processed distribution at each row, computed when asked for (`paceline.sampling.SampledRows`).

    Penalties depend on a row's own path, so rows are processed one by one, after the row's ancestors are known.
    """

    @abstractmethod
    def argmax(self, row: int) -> int:
        """Most probable token of the processed row (ties: lowest id)."""

    @abstractmethod
    def probs(self, row: int) -> torch.Tensor:
        """[V] float32 (or wider), processed, sums to one. The caller must not write into it."""

    def drawn(self, row: int) -> int | None:
        """The token that the row drew with the random number of its own position (`Purpose.TARGET`); None: draw it from `probs`."""
        return None

    def mass(self, row: int, tokens: Collection[int]) -> float:
        """The probability of these tokens together, all different, in `probs`."""
        return mass_of(self.probs(row), tokens)

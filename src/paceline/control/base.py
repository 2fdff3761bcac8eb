"""The controller interface: decides before a round, may stop a draft early, learns from finished rounds.

A controller sees finished `StepRecord`s, drafters' `Outlook`s and draft-side `DraftFeatures`. It is never given target data of
an unverified position: no signature here could carry it. Plain Python, no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.records import DraftFeatures, Outlook, Plan, StepRecord, light


@light
@dataclass(frozen=True, slots=True)
class RoundContext:
    """What is known before a round of one sequence."""

    request_id: int
    context_length: int
    """Committed tokens, prompt included."""
    max_draft: int
    """Upper bound for this round: configuration, remaining output and context are already taken into account."""
    outlooks: tuple[Outlook, ...]
    """One for each drafter, in the user's order of preference; empty when nothing can draft."""
    batch_size: int = 1
    task: str = ""
    """Tag of similar requests that share what was learnt."""
    remaining: int = 64
    """Tokens that the request may still emit at most."""


class Controller(ABC):
    """Decides how much to draft, with what. One instance serves an engine; state per request is keyed by `request_id`."""

    name: str = ""
    learns_late = False
    """Whether it may be shown a batch's round after it planned the next one: a device works on that one meanwhile."""

    @abstractmethod
    def plan(self, context: RoundContext) -> Plan:
        """Decide the coming round of one sequence. Must return 0 <= num_draft <= min(max_draft, available)."""

    def plan_unseen(self, task: str, batch_size: int) -> Plan | None:
        """The coming round, if it will be plain whatever there is to draft: drafters need not be asked then. None: look first.

        A shortcut for the caller; `plan` decides the same where it was not asked.
        """
        return None

    def plan_batch(self, contexts: Sequence[RoundContext]) -> list[Plan]:
        """Decide the coming round of all sequences that could draft in it, in their order. By itself one after another."""
        return [self.plan(context) for context in contexts]

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool:
        """Asked after each drawn token, which stays in the draft: shall another one follow?"""
        return True

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished round."""

    def finish(self, request_id: int) -> None:
        """The request ended: forget its own state."""

    def explain(self) -> None:
        """Give reasons with figures from now on, if that costs extra."""

    def calibration(self) -> list[dict[str, Any]]:
        """Predicted against observed acceptance, as rows of a reliability diagram; empty without such estimates."""
        return []

    def snapshot(self) -> dict[str, Any] | None:
        """What was learnt, as plain data for a stored profile; None when there is nothing worth keeping."""
        return None

    def restore(self, data: dict[str, Any]) -> None:
        """Begin with a stored profile. Raises KeyError, TypeError or ValueError on data that `snapshot` did not write."""


def longest_outlook(context: RoundContext) -> Outlook | None:
    """The first drafter, in order of preference, that has something to propose."""
    return next((o for o in context.outlooks if o.available > 0), None)

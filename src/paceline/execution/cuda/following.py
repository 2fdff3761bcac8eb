"""A draft's next steps behind a verification: the device accepts by itself and goes on, while the host still learns of it (ours).

After a verification the draft is fed what it does not know yet: the token that follows the accepted ones, and, where all were
accepted, its own last token before that. Whichever it is, these two tokens stand where acceptance ended, so one forward over two
rows a sequence serves every outcome; rows that the draft's cache held already get the same bits once more. A kernel
(`fused.accept`) counts the accepted tokens, puts the two in place, and picks the random numbers of the positions behind them. Some
steps follow. The host compares afterwards what it would feed with what the device fed, and takes these steps as its first ones, or
does without them. What is planned does not depend on them, so a draft is the same token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from paceline.execution.base import Decoding, Segment
from paceline.execution.cuda.linears import MAX_ROWS
from paceline.execution.cuda.paging import PAGE, PagedSequence
from paceline.execution.draws import AHEAD, DrawLaw

FED = 2
"""Rows of each sequence."""


class Fed(NamedTuple):
    """A sequence that decoded ahead, in the draft's cache."""

    sequence: PagedSequence
    start: int
    """Slot of the token that was pending."""
    tokens: tuple[int, ...]
    """That token and those decoded after it which the host knows."""
    steps: int
    """Tokens that were decoded after it."""
    law: DrawLaw | None = None
    numbers: Sequence[int] = ()
    """With a law: the random number of each decoded token."""


class Verification(NamedTuple):
    """A forward of the target that was begun."""

    segments: Sequence[Segment]
    """Their rows lie one after another; late tokens are places of the line that is followed."""
    tokens: torch.Tensor
    """[64] int32: of the rows, on the device; -1 - i: entry i of `late`."""
    late: torch.Tensor
    chosen: torch.Tensor
    """[64] int32: the target's token at each row."""


def matched(fed: Sequence[Fed], segments: Sequence[Segment]) -> list[tuple[int, int]] | None:
    """First row and number of rows of what verifies each draft; None where that cannot be told.

    Both are in the order of the requests, some of which draft nothing, and some perhaps with another drafter.
    """
    places: list[tuple[int, int]] = []
    drafts, first = iter(fed), 0
    for segment in segments:
        count = len(segment.tokens)
        if count > 1:
            draft = next(drafts, None)
            if draft is None or segment.parents is not None or segment.num_logits is not None:
                return None
            known = min(count, len(draft.tokens))
            if tuple(segment.tokens[:known]) != draft.tokens[:known] or not _same_numbers(draft, segment):
                return None
            places.append((first, count))
        first += count
    return places if next(drafts, None) is None else None


def _same_numbers(draft: Fed, segment: Segment) -> bool:
    """Whether the target draws with the numbers that its draft was drawn with; so it does with those of later positions."""
    if draft.law is None:
        return True
    return segment.draws is not None and len(segment.draws.ahead) >= AHEAD and draft.numbers[0] == segment.draws.numbers[0]


def numbers_ahead(fed: Sequence[Fed], segments: Sequence[Segment]) -> list[list[int]]:
    """Of each sequence the numbers of the positions behind the pending token's successor, as far as a draft may reach that begins
    behind any acceptance; none of a greedy one."""
    drafts, found = iter(fed), list[list[int]]()
    for segment in segments:
        if len(segment.tokens) > 1:
            draws = segment.draws if next(drafts).law is not None else None
            found.append([*draws.numbers[1:], *draws.ahead] if draws is not None else [])
    return found


def accepted(tokens: Sequence[int], chosen: Sequence[int]) -> tuple[int, int, int]:
    """What the device decides for a chain: accepted tokens, the token where acceptance ended, and the one that follows it.

    tokens: pending and drafted ones; chosen: the target's token at each of their rows. The readable form of `fused.accept`.
    """
    count = next((j for j, token in enumerate(tokens[1:]) if chosen[j] != token), len(tokens) - 1)
    return count, tokens[count], max(chosen[count], 0)


class Following:
    """Steps that were begun behind a verification, until the host knows whether it wants them."""

    def __init__(self, fed: Sequence[Fed], steps: int, numbers: Sequence[Sequence[int]], told: torch.Tensor, there: Any) -> None:
        """numbers: as `numbers_ahead`; told: [sequences, 2] int32 of the host, accepted tokens and the token fed last, which the
        event says are there."""
        self.steps = steps
        self.sequences = [draft.sequence for draft in fed]
        self._numbers, self._told, self._there = numbers, told, there
        self._rows = {id(draft.sequence): row for row, draft in enumerate(fed)}
        self._fed = [(draft.start, tuple(draft.sequence.pages), draft.law) for draft in fed]

    def rows(
        self, jobs: Sequence[Decoding], sequences: Sequence[PagedSequence], feeds: Sequence[Sequence[int]]
    ) -> list[int] | None:
        """The row of each job's sequence, if the device fed every one what is to be fed and draws as it is to draw; None if not.

        Sequences are as they are staged for these feeds: a slot whose page changed is not the one that was written.
        """
        self._there.synchronize()
        told, found = self._told.tolist(), list[int]()
        for job, sequence, feed in zip(jobs, sequences, feeds, strict=True):
            row = self._rows.get(id(sequence))
            if row is None or len(feed) > FED:
                return None
            (start, pages, law), (count, token) = self._fed[row], told[row]
            slot = start + count + 1
            if feed[-1] != token or sequence.committed + len(feed) != slot + 1 or job.law != law:
                return None
            if law is not None and any(a != b for a, b in zip(job.numbers, self._drawn_with(row, count), strict=False)):
                return None
            written = range((slot - 1) // PAGE, min((slot + self.steps - 1) // PAGE + 1, len(sequence.pages)))
            if any(sequence.pages[page] != pages[page] for page in written):
                return None
            found.append(row)
        return found

    def _drawn_with(self, row: int, count: int) -> Sequence[int]:
        return self._numbers[row][count : count + self.steps]


def fits(fed: Sequence[Fed]) -> bool:
    """Whether one forward holds them all."""
    return 0 < FED * len(fed) <= MAX_ROWS

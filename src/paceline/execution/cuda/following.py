"""A draft's next forward behind a verification: the device accepts by itself and goes on, while the host still learns of it (ours).

After a verification the draft is fed what it does not know yet: the token that follows the accepted ones, and, where all were
accepted, its own last token before that. Whichever it is, these two tokens stand where acceptance ended, so one forward over two
rows a sequence serves every outcome; rows that the draft's cache held already get the same bits once more. A kernel
(`fused.accept`) counts the accepted tokens and puts the two in place. The host compares afterwards what it would feed with what the
device fed, and takes the forward as its first one, or does without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from paceline.execution.base import Segment
from paceline.execution.cuda.linears import MAX_ROWS
from paceline.execution.cuda.paging import PAGE, PagedSequence

FED = 2
"""Rows of each sequence."""


class Fed(NamedTuple):
    """A sequence that decoded ahead, in the draft's cache."""

    sequence: PagedSequence
    start: int
    """Slot of the token that was pending."""
    tokens: tuple[int, ...]
    """That token and those decoded after it which the host knows."""


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
            if tuple(segment.tokens[:known]) != draft.tokens[:known]:
                return None
            places.append((first, count))
        first += count
    return places if next(drafts, None) is None else None


def accepted(tokens: Sequence[int], chosen: Sequence[int]) -> tuple[int, int, int]:
    """What the device decides for a chain: accepted tokens, the token where acceptance ended, and the one that follows it.

    tokens: pending and drafted ones; chosen: the target's token at each of their rows. The readable form of `fused.accept`.
    """
    count = next((j for j, token in enumerate(tokens[1:]) if chosen[j] != token), len(tokens) - 1)
    return count, tokens[count], max(chosen[count], 0)


class Following:
    """A forward that was begun behind a verification, until the host knows whether it wants it."""

    def __init__(self, fed: Sequence[Fed], told: torch.Tensor, there: Any) -> None:
        """told: [sequences, 2] int32 of the host, accepted tokens and the token fed last, which the event says are there."""
        self._told, self._there = told, there
        self._places = {id(draft.sequence): place for place, draft in enumerate(fed)}
        self._fed = [(draft.start, tuple(draft.sequence.pages)) for draft in fed]

    def rows(self, sequences: Sequence[PagedSequence], feeds: Sequence[Sequence[int]]) -> list[int] | None:
        """The row of each sequence's last token, if the forward fed every one what is to be fed; None if not.

        Sequences are as they are staged for these feeds: a slot whose page changed is not the one that was written.
        """
        self._there.synchronize()
        told, found = self._told.tolist(), list[int]()
        for sequence, feed in zip(sequences, feeds, strict=True):
            place = self._places.get(id(sequence))
            if place is None or len(feed) > FED:
                return None
            (start, pages), (count, token) = self._fed[place], told[place]
            slot = start + count + 1
            if feed[-1] != token or sequence.committed + len(feed) != slot + 1:
                return None
            if any(sequence.pages[at // PAGE] != pages[at // PAGE] for at in (slot - 1, slot)):
                return None
            found.append(FED * place + FED - 1)
        return found


def fits(fed: Sequence[Fed]) -> bool:
    """Whether one forward holds them all."""
    return 0 < FED * len(fed) <= MAX_ROWS

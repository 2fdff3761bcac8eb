"""Paged keys and values: pages of 64 tokens, shared between forks, taken back by setting a length (ours; the page table is
vLLM's idea, arXiv 2309.06180, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.errors import OptionError, ResourceError
from paceline.execution.base import SequenceHandle
from paceline.execution.draws import AHEAD

PAGE = 64


class PagedSequence:
    """A sequence's place in the cache; made by `PagedCache.open`. A `SequenceHandle`."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        """Row of the page table."""
        self.pages: list[int] = []
        self.committed = 0
        self.staged = 0
        """Uncommitted tokens of the last segment."""
        self.closed = False

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self.committed


def owned(sequence: SequenceHandle) -> PagedSequence:
    """A sequence of such a cache. Raises OptionError for those of other runners."""
    if not isinstance(sequence, PagedSequence):
        raise OptionError(f"sequence = {sequence!r}: opened by another runner")
    return sequence


class PagedCache:
    """Keys and values of all sequences: [layers, pages, kv heads, 64, D] each. Page 0 takes what nobody reads."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, pages: int, max_context: int, max_sequences: int, device: torch.device
    ) -> None:
        """pages: usable ones. max_context: most tokens of a sequence, uncommitted ones included."""
        shape = (layers, pages + 1, kv_heads, PAGE, head_dim)
        self.keys = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.values = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        width = -(-max_context // PAGE)
        self.tables = torch.zeros(max_sequences, width, dtype=torch.int32, device=device)
        self._free = list(range(pages, 0, -1))
        self._slots = list(range(max_sequences - 1, -1, -1))
        self._users = [0] * (pages + 1)
        self._max_context = max_context
        self.moved_rows = 0
        """Rows that `accept` had to move so far: stays 0 on chains."""
        self._moves: list[tuple[int, int, int, int]] = []
        """Page and offset, from and to, of rows that are yet to be moved: before anybody reads or writes, and those of a batch
        together, since asking the device takes the host longer than moving takes the device."""

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def open(self) -> PagedSequence:
        """A new, empty sequence. Raises ResourceError when there are too many."""
        if not self._slots:
            raise ResourceError(f"sequences: {self.tables.shape[0]} are open and no more fit; close some")
        return PagedSequence(self._slots.pop())

    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """A sequence with the same committed tokens: whole pages are shared, a last partial one is copied when written to."""
        self.check(sequence)
        self._move()
        twin = self.open()
        twin.committed = sequence.committed
        twin.pages = sequence.pages[: -(-sequence.committed // PAGE)]
        for page in twin.pages:
            self._users[page] += 1
        self._publish(twin, 0)
        return twin

    def stage(self, sequence: PagedSequence, count: int) -> None:
        """Make room for `count` uncommitted tokens, forgetting earlier ones. Raises ResourceError when memory is short."""
        self.check(sequence)
        self._move()
        end = sequence.committed + count
        if end > self._max_context:
            raise ResourceError(
                f"context = {sequence.committed} + {count} new tokens: the limit is {self._max_context}; "
                "shorten the prompt or raise max_context where the model allows it"
            )
        first_written = sequence.committed // PAGE
        changed = len(sequence.pages)
        if first_written < len(sequence.pages) and self._users[sequence.pages[first_written]] > 1:
            self._own(sequence, first_written)
            changed = first_written
        need = -(-end // PAGE) - len(sequence.pages)
        if need > len(self._free):
            raise ResourceError(
                f"memory for keys and values is used up: {need} pages of {PAGE} tokens needed, {len(self._free)} free; "
                "use fewer sequences or shorter ones"
            )
        for _ in range(need):
            sequence.pages.append(self._take())
        if changed < len(sequence.pages):
            self._publish(sequence, changed)
        sequence.staged = count

    def accept(self, sequence: PagedSequence, rows: Sequence[int]) -> None:
        """Commit these staged rows, a path from the root down; they will be moved together unless they lie together already."""
        self.check(sequence)
        path = list(rows)
        if path == list(range(len(path))) and len(path) <= sequence.staged:  # a chain, which every round of a batch asks about
            sequence.committed += len(path)
            sequence.staged = 0
            return
        ordered = all(0 <= a < b for a, b in zip([-1, *path][1:], [*path[1:], sequence.staged], strict=True))
        if not ordered:
            raise OptionError(f"rows = {path}: must be strictly increasing rows of the last segment ({sequence.staged} tokens)")
        pages, base = sequence.pages, sequence.committed
        for place, row in enumerate(path, base):
            if (row := base + row) != place:
                self._moves.append((pages[row // PAGE], row % PAGE, pages[place // PAGE], place % PAGE))
        sequence.committed += len(path)
        sequence.staged = 0

    def keep(self, sequence: PagedSequence, length: int) -> None:
        """Commit whatever lies in the cache up to `length`."""
        self.check(sequence)
        sequence.committed, sequence.staged = length, 0

    def truncate(self, sequence: PagedSequence, length: int) -> None:
        """Forget committed tokens from `length` on; pages behind it are given back, but for one of its own that the next tokens
        need: they may be there already (`following`)."""
        self.check(sequence)
        if not 0 <= length <= sequence.committed:
            raise OptionError(f"length = {length}: must be in 0 .. {sequence.committed}")
        self._move()
        sequence.committed, sequence.staged = length, 0
        keep, last = -(-length // PAGE), (length + AHEAD) // PAGE
        if keep <= last < len(sequence.pages) and self._users[sequence.pages[last]] == 1:
            keep = last + 1
        self._give_back(sequence.pages[keep:])
        del sequence.pages[keep:]

    def close(self, sequence: PagedSequence) -> None:
        """Give the sequence's pages back. Closing twice is harmless."""
        if not sequence.closed:
            self._move()
            self._give_back(sequence.pages)
            self._slots.append(sequence.slot)
            sequence.pages, sequence.closed = [], True

    def check(self, sequence: PagedSequence) -> None:
        """Raises OptionError for a closed sequence."""
        if sequence.closed:
            raise OptionError("sequence: is closed")

    def addresses(self, sequence: PagedSequence, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and offset of the token slots start .. end - 1, both int64 on the cache's device."""
        self._move()
        slots = torch.arange(start, end)
        pages = torch.tensor(sequence.pages, dtype=torch.int64)[slots // PAGE]
        return pages.to(self.keys.device), (slots % PAGE).to(self.keys.device)

    @torch.inference_mode()
    def _move(self) -> None:
        """Move what waits for it."""
        if not self._moves:
            return
        moves, self._moves = self._moves, []
        table = torch.tensor(moves, pin_memory=self.keys.is_cuda).to(self.keys.device, non_blocking=True)
        page, offset, to_page, to_offset = table.unbind(1)
        for cache in (self.keys, self.values):
            cache[:, to_page, :, to_offset] = cache[:, page, :, offset]  # read as a whole first: a place may be another's source
        self.moved_rows += len(moves)

    def _own(self, sequence: PagedSequence, index: int) -> None:
        """Replace a shared page by a copy."""
        if not self._free:
            raise ResourceError(f"memory for keys and values is used up: no page of {PAGE} tokens is free; use fewer sequences")
        shared, own = sequence.pages[index], self._take()
        for cache in (self.keys, self.values):
            cache[:, own] = cache[:, shared]
        self._give_back([shared])
        sequence.pages[index] = own

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _give_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)

    def _publish(self, sequence: PagedSequence, start: int) -> None:
        """Copy page numbers from index `start` on to the device; from pinned memory, so that the host need not wait for it."""
        if start < len(sequence.pages):
            new = torch.tensor(sequence.pages[start:], dtype=torch.int32, pin_memory=self.tables.is_cuda)
            self.tables[sequence.slot, start : len(sequence.pages)].copy_(new, non_blocking=True)

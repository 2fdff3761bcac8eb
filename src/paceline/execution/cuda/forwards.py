"""Forwards over up to 64 rows as replays of captured graphs, and what follows them: the best tokens, draws, and steps ahead (ours).

Needs a GPU (and Triton to import). Call everything under `torch.inference_mode` and on the model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from paceline.errors import ResourceError
from paceline.execution.base import Decoding, Segment
from paceline.execution.cuda.attention import block_tokens
from paceline.execution.cuda.capture import (
    GENERAL_ROWS,
    ROW_BUCKETS,
    Graphs,
    Layout,
    Rows,
    Shape,
    bucket,
    for_steps,
    general,
    grid_chunks,
    num_blocks,
    power_of_two,
)
from paceline.execution.cuda.decoder import Decoder
from paceline.execution.cuda.drawing import Drawer
from paceline.execution.cuda.following import Fed, Following, Verification, fits, matched
from paceline.execution.cuda.fused import BestToken, accept
from paceline.execution.cuda.linears import MAX_ROWS
from paceline.execution.cuda.paging import PagedCache, PagedSequence
from paceline.execution.cuda.stepping import Steps
from paceline.execution.draws import DrawLaw

_USUAL_ROWS = 20
"""Rows of one sequence for which graphs are captured at the start, beside those for any batch; others are when needed often."""


class Forwards:
    """The captured forwards of one model."""

    def __init__(self, decoder: Decoder, cache: PagedCache, layout: Layout, device: torch.device) -> None:
        self._decoder, self._cache, self._layout = decoder, cache, layout
        self._vocab, self._head_dim = decoder.spec.vocab, decoder.spec.head_dim
        self._group = decoder.spec.heads // decoder.spec.kv_heads
        self._best = BestToken(MAX_ROWS, self._vocab, device)
        self._drawer = Drawer(MAX_ROWS, self._vocab, device, self._best.picks[1])
        self._steps = Steps(layout, self._vocab)
        self.graphs = Graphs()
        self.following: Following | None = None
        """The last forward, where it was begun behind a verification."""
        self.followed = 0
        """Drafts whose first forward that was."""
        self._told = torch.zeros(MAX_ROWS, 2, dtype=torch.int32, pin_memory=True)

    def capture_usual(self) -> None:
        """Capture what one sequence needs at usual lengths and what serves any batch there, so that no round waits for it."""
        usual = [self._shape([Rows(0, 0, range(rows), None)]) for rows in ROW_BUCKETS if rows <= _USUAL_ROWS]
        for shape in usual + [general(replace(usual[0], rows=rows), self._long_block()) for rows in GENERAL_ROWS]:
            self._prepare(shape)
        self._prepare_steps(usual[0], drawn=False)
        self._layout.clear()
        accept(self._layout.tokens, self._layout.late, self._best.tokens, self._layout, self._told, 1, self._vocab)  # compiles it

    def run(
        self,
        batch: Sequence[Rows],
        *,
        longest: int = 0,
        sources: Sequence[int] = (),
        between: Callable[[], None] | None = None,
    ) -> None:
        """A forward, which fills the decoder's logits; rows lie one after another.

        longest: positions that it must serve at least; sources: as in `Layout.fill`; between: called when the inputs are sent,
        before they are read.
        """
        self.following = None
        counts = [len(rows.tokens) for rows in batch]
        shape = self.graphs.choose(self._shape(batch, longest), counts, self._long_block())
        self._prepare(shape)
        self._layout.fill(batch, shape, sources)
        if between is not None:
            between()
        self.graphs.again(shape)

    def verification(self, segments: Sequence[Segment]) -> Verification:
        """What was run last, over these segments."""
        best, drawn = self._best.picks
        chosen = drawn if any(segment.draws is not None for segment in segments) else best
        return Verification(segments, self._layout.tokens, self._layout.late, chosen)

    def follow(self, fed: Sequence[Fed], target: Verification) -> None:
        """Begin the forward of the next draft behind a verification of the last one, fed by what the device accepts. Does nothing
        where drafts are not told apart, memory is short, or the target is its own draft, whose results are still to be read."""
        places = matched(fed, target.segments)
        if places is None or not fits(fed) or target.tokens is self._layout.tokens:
            return
        try:
            for draft, (_, count) in zip(fed, places, strict=True):
                self._cache.stage(draft.sequence, max(1, draft.start + count + 1 - draft.sequence.committed))
        except ResourceError:
            return
        there: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

        def between() -> None:
            accept(target.tokens, target.late, target.chosen, self._layout, self._told, len(fed), self._vocab)
            there.record()

        self.run(
            [Rows(draft.sequence.slot, draft.start, (0, 0), None) for draft in fed],
            longest=max(draft.start + count + 1 for draft, (_, count) in zip(fed, places, strict=True)),
            sources=[number for place in places for number in place],
            between=between,
        )
        self.following = Following(fed, self._told[: len(fed)], there)

    def tokens(
        self, rows: int, laws: Sequence[DrawLaw | None], numbers: Sequence[int]
    ) -> Callable[[], tuple[list[int], list[int] | None]]:
        """Send for the best token of each row of the last forward, and for the drawn one where any row has a law (the best one of
        other rows); returns what waits for them.

        numbers: for each row, as in `Draws`.
        """
        draws = any(law is not None for law in laws)
        if draws:
            self._drawer.describe(laws, numbers)
            self._drawer.launch(self._decoder.logits, self._best.tokens, rows)
        # Memory of its own: tokens of several passes may be on their way.
        picks = torch.empty(self._best.picks.shape, dtype=torch.int32, pin_memory=True)
        picks.copy_(self._best.picks, non_blocking=True)
        there: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record()

        def read() -> tuple[list[int], list[int] | None]:
            there.synchronize()
            best, drawn = picks[:, :rows].tolist()
            return best, drawn if draws else None

        return read

    def capture(self, batch: Sequence[Rows]) -> Callable[[], None]:
        """Capture the graph of exactly this forward now; returns what replays it on the inputs that are in place (for timing)."""
        shape = self._shape(batch)
        self._prepare(shape)
        return partial(self.graphs.again, shape)

    def begin_steps(
        self, jobs: Sequence[Decoding], sequences: Sequence[PagedSequence], feeds: Sequence[Sequence[int]], most: int
    ) -> tuple[Callable[[], None], Steps]:
        """Issue the first of up to `most` steps; returns what issues another one, and where their tokens are read.

        Room for the tokens of all steps is staged.
        """
        steps, first, later = self._steps, list[Rows](), list[Rows]()
        steps.begin()
        followed = self.following.rows(sequences, feeds) if self.following is not None else None
        sources: list[int] = []
        for sequence, feed in zip(sequences, feeds, strict=True):
            first.append(Rows(sequence.slot, sequence.committed, feed, None))
            later.append(Rows(sequence.slot, sequence.committed + len(feed), feed[:1], None))
            sources.append((sources[-1] if sources else -1) + len(feed))
        drawn = any(job.law is not None for job in jobs)
        shape = for_steps(self._shape(later, longest=max(rows.length for rows in later) + most))
        key = self._prepare_steps(shape, drawn)
        if followed is not None:
            sources, self.following = followed, None
            self.followed += 1
        else:
            self.run(first)
        # The device works from here on: what follows describes what is behind the first forward.
        steps.describe(jobs)
        steps.layout.fill(later, shape, sources)
        steps.advance(self._decoder.logits, self._best, len(jobs), drawn=drawn, first=True)
        steps.issued(len(jobs))

        def issue() -> None:
            self.graphs.again(key)
            steps.issued(len(jobs))

        return issue, steps

    def _prepare(self, shape: Shape) -> None:
        run = partial(self._decoder.kernels, self._layout, self._cache, shape, self._best)
        self.graphs.prepare(shape, run, self._layout.clear)

    def _prepare_steps(self, shape: Shape, drawn: bool) -> object:
        """Capture a forward whose tokens are the next one's input, unless that was done; returns its key."""
        steps, key = self._steps, ("drawn steps" if drawn else "steps", shape)

        def run() -> None:
            self._decoder.kernels(steps.layout, self._cache, shape, self._best)
            steps.advance(self._decoder.logits, self._best, shape.rows, drawn=drawn)

        if drawn:
            steps.make_drawer()  # no memory may be asked for during a capture
        if self.graphs.prepare(key, run, steps.layout.clear):
            steps.restart()
        return key

    def _shape(self, batch: Sequence[Rows], longest: int = 0) -> Shape:
        """The smallest shape that holds a batch. longest: positions that it must serve at least."""
        counts = [len(rows.tokens) for rows in batch]
        tokens = block_tokens(self._group, max(counts))
        blocks = power_of_two(num_blocks(counts, tokens))
        end = max(longest, *(rows.length + len(rows.tokens) for rows in batch))
        return Shape(bucket(sum(counts)), min(blocks, MAX_ROWS), tokens, grid_chunks(end, self._head_dim))

    def _long_block(self) -> int:
        """Tokens of a block of query rows in long segments."""
        return block_tokens(self._group, MAX_ROWS)

"""Forwards over up to 64 rows as replays of captured graphs, and what follows them: the best tokens, draws, and steps ahead (ours).

Needs a GPU (and Triton to import). Call everything under `torch.inference_mode` and on the model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
from paceline.execution.cuda.following import FED, Fed, Following, Verification, fits, matched, numbers_ahead
from paceline.execution.cuda.fused import BestToken
from paceline.execution.cuda.linears import MAX_ROWS
from paceline.execution.cuda.memory import GIB
from paceline.execution.cuda.paging import PagedCache, PagedSequence
from paceline.execution.cuda.stepping import Steps
from paceline.execution.draws import AHEAD, DrawLaw

_USUAL_STEPS = (1, 4, 8, 16)
"""Sequences for whose steps graphs are captured at the start."""
_USUAL_ROWS = 20
"""Rows of one sequence for which graphs are captured at the start; more are served by those for any batch."""


class Begun(NamedTuple):
    """Steps of which the first ones were issued."""

    issue: Callable[[], None]
    """Begins another one."""
    steps: Steps
    """Where their tokens are read."""
    rows: Sequence[int]
    """Each job's row in them."""
    issued: int


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
        """What runs since the last verification, while nothing else was run."""
        self.followed = 0
        """Drafts whose first steps that was."""
        self._told = torch.zeros(MAX_ROWS, 2, dtype=torch.int32, pin_memory=True)

    def capture_usual(self) -> None:
        """Capture what one sequence needs at usual lengths and what serves any batch there, so that no round waits for it."""
        usual = [self._shape([Rows(0, 0, range(rows), None)]) for rows in ROW_BUCKETS if rows <= _USUAL_ROWS]
        any_batch = {general(rows, blocks, self._long_block(), usual[0].chunks) for rows in GENERAL_ROWS for blocks in (1, rows)}
        for shape in [*usual, *sorted(any_batch, key=lambda shape: (shape.rows, shape.blocks))]:
            self._prepare(shape)
        for sequences in _USUAL_STEPS if self._decoder.weight_bytes < GIB else (1,):  # of larger models hardly one drafts
            self._prepare_steps(self._step_shape(sequences, 0), drawn=False)
        self._layout.clear()
        self._steps.accept(self.verification(()), self._layout, self._told, [[]], 0)  # compiles it

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
        """Begin the steps of the next draft behind a verification of the last one, fed by what the device accepts. Does nothing
        where drafts are not told apart, memory is short, or the target is its own draft, whose results are still to be read."""
        places = matched(fed, target.segments)
        if places is None or not fits(fed) or target.tokens is self._layout.tokens:
            return
        count = min(AHEAD, max(draft.steps for draft in fed))
        ends = [draft.start + rows + count for draft, (_, rows) in zip(fed, places, strict=True)]
        if any(draft.sequence.closed for draft in fed):
            return
        try:
            for draft, end in zip(fed, ends, strict=True):
                self._cache.stage(draft.sequence, max(1, end - draft.sequence.committed))
        except ResourceError:
            return
        steps, numbers = self._steps, numbers_ahead(fed, target.segments)
        later = [Rows(draft.sequence.slot, draft.start + FED, (0,), None) for draft in fed]
        shape = self._step_shape(len(fed), max(ends))
        drawn = any(draft.law is not None for draft in fed)
        key = self._prepare_steps(shape, drawn)
        there: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

        def accept() -> None:
            steps.begin_behind()
            if drawn:  # rows are in another order where a sequence left its place
                steps.describe_laws([draft.law for draft in fed])
            steps.layout.fill(later, shape, range(FED - 1, FED * len(fed), FED))
            steps.accept(target, self._layout, self._told, numbers, count)
            there.record()

        self.run(
            [Rows(draft.sequence.slot, draft.start, (0,) * FED, None) for draft in fed],
            longest=max(ends),
            sources=[number for place in places for number in place],
            between=accept,
        )
        steps.advance(self._decoder.logits, self._best, len(fed), drawn=drawn, first=True)
        steps.issued(len(fed))
        for _ in range(count - 1):
            self._issue(key, len(fed))
        self.following = Following(fed, count, numbers, self._told[: len(fed)], there)

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
    ) -> Begun:
        """Issue the first of up to `most` steps, unless the device has begun with them by itself.

        Room for the tokens of all steps is staged.
        """
        steps, drawn = self._steps, any(job.law is not None for job in jobs)
        starts = [sequence.committed + len(feed) for sequence, feed in zip(sequences, feeds, strict=True)]
        longest, following = max(starts) + most, self.following
        rows = following.rows(jobs, sequences, feeds) if following is not None else None
        if following is not None and rows is not None:
            count = len(following.sequences)
            key = self._prepare_steps(self._step_shape(count, longest), drawn)
            if self.following is not None:  # else a capture has overwritten what it left
                self._take(following, jobs, rows)
                return Begun(partial(self._issue, key, count), steps, rows, following.steps)
        shape = self._step_shape(len(jobs), longest)
        key = self._prepare_steps(shape, drawn)
        steps.begin()
        self.run([Rows(s.slot, s.committed, feed, None) for s, feed in zip(sequences, feeds, strict=True)])
        # The device works from here on: what follows describes what is behind the first forward.
        steps.describe(jobs)
        later = [Rows(sequence.slot, start, (0,), None) for sequence, start in zip(sequences, starts, strict=True)]
        steps.layout.fill(later, shape, [sum(map(len, feeds[: i + 1])) - 1 for i in range(len(feeds))])
        steps.advance(self._decoder.logits, self._best, len(jobs), drawn=drawn, first=True)
        steps.issued(len(jobs))
        return Begun(partial(self._issue, key, len(jobs)), steps, list(range(len(jobs))), 1)

    def _take(self, following: Following, jobs: Sequence[Decoding], rows: Sequence[int]) -> None:
        """Go on with steps that were begun behind a verification. Rows whose sequence drafts nothing now run along."""
        self.following = None
        self.followed += 1
        numbers: list[Sequence[int]] = [()] * len(following.sequences)
        for job, row in zip(jobs, rows, strict=True):
            numbers[row] = job.numbers[following.steps :] if job.law is not None else ()
        self._steps.send(numbers)
        if len(rows) < len(following.sequences):
            kept = set(rows)
            self._steps.silence([s.slot if row in kept else -1 for row, s in enumerate(following.sequences)])

    def _issue(self, key: object, rows: int) -> None:
        self.graphs.again(key)
        self._steps.issued(rows)

    def _step_shape(self, sequences: int, longest: int) -> Shape:
        """The shape of steps over so many sequences at positions below `longest`."""
        return for_steps(self._shape([Rows(0, 0, (0,), None)] * sequences, longest))

    def _prepare(self, shape: Shape) -> None:
        run = partial(self._decoder.kernels, self._layout, self._cache, shape, self._best)
        if self.graphs.prepare(shape, run, self._layout.clear):
            self.following = None

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
            self.following = None
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

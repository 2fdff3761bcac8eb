"""A forward over segments as passes of up to 64 rows, all begun before one is waited for (ours)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from paceline.execution.base import ForwardOutput, Segment
from paceline.execution.cuda.capture import Rows
from paceline.execution.cuda.decoder import Decoder
from paceline.execution.cuda.linears import MAX_ROWS
from paceline.execution.cuda.memory import GIB
from paceline.execution.cuda.paging import PagedCache, owned
from paceline.execution.cuda.stepping import Line
from paceline.execution.draws import DrawLaw, draw_rows

if TYPE_CHECKING:
    from paceline.execution.cuda.following import Verification
    from paceline.execution.cuda.forwards import Forwards

_PIECEWISE, _SMALL = 512, GIB
"""Chains up to so many tokens go through the kernels, 64 at a time, in models of fewer bytes."""

Picked = tuple[list[int] | None, list[int] | None]
"""`ForwardOutput.best` and `drawn`."""


class _Begun(NamedTuple):
    """A pass that the device works on."""

    logits: torch.Tensor
    hidden: torch.Tensor | None
    read: Callable[[], Picked]
    """Waits for its tokens."""


class Passes:
    """Shares segments out. Call everything under `torch.inference_mode` and on the model's device."""

    def __init__(self, decoder: Decoder, cache: PagedCache, forwards: Forwards | None, device: torch.device) -> None:
        """forwards: the kernels; None on a CPU."""
        self._decoder, self._cache, self._forwards, self._device = decoder, cache, forwards, device
        self._piecewise = _PIECEWISE if decoder.weight_bytes < _SMALL else 0
        """Longest chain that goes through the kernels in pieces."""

    @property
    def reads_pieces(self) -> bool:
        """Whether the kernels, 64 rows at a time, read prompts faster than the library."""
        return self._forwards is not None and self._piecewise > 0

    def begin(
        self,
        segments: Sequence[Segment],
        want_hidden: bool,
        line: Line | None,
        follow: Callable[[Verification], None] | None = None,
    ) -> Callable[[], ForwardOutput]:
        """Begin a forward over segments that are staged in the cache; returns what waits for its result.

        line: of a draft's step that may still be before it; follow: see `Line.follow`.
        """
        passes = self._shared_out(segments)
        parts = [self._begin(part, want_hidden, keep=len(passes) > 1) for part in passes]
        whole = len(parts) == 1 and sum(len(segment.tokens) for segment in segments) <= MAX_ROWS
        if follow is not None and whole and self._forwards is not None:
            follow(self._forwards.verification(segments))
        logits, states = parts[0].logits, parts[0].hidden
        if len(parts) > 1:
            logits = torch.cat([part.logits for part in parts])
            states = torch.cat([part.hidden for part in parts if part.hidden is not None]) if want_hidden else None

        def result() -> ForwardOutput:
            if line is not None:
                line.tokens()  # before those of the forward: so the draft's time is told from the forward's
            picked = [part.read() for part in parts]
            draws = any(drawn is not None for _, drawn in picked)
            drawn = _joined([best if drawn is None else drawn for best, drawn in picked]) if draws else None
            return ForwardOutput(logits, states, _joined([best for best, _ in picked]), drawn)

        return result

    def rows(self, segment: Segment, offset: int = 0) -> Rows:
        """The rows of a segment, from token `offset` on."""
        sequence = owned(segment.sequence)
        return Rows(sequence.slot, sequence.committed + offset, segment.tokens[offset:], segment.parents)

    def _shared_out(self, segments: Sequence[Segment]) -> list[list[Segment]]:
        """Segments that share a pass: 64 rows at most, or one long segment alone (so that nothing depends on its company)."""
        passes: list[list[Segment]] = []
        room = 0
        for segment in segments:
            count = len(segment.tokens)
            if count > room:
                passes.append([])
                room = MAX_ROWS if self._forwards is not None else 0
            passes[-1].append(segment)
            room -= count
        return passes

    def _begin(self, segments: Sequence[Segment], want_hidden: bool, keep: bool) -> _Begun:
        """keep: the result must outlive the next pass."""
        first, offset = segments[0], 0
        forwards = self._forwards
        if len(first.tokens) > MAX_ROWS or forwards is None:
            if forwards is None or not self._takes_pieces(first):
                return self._dense(first, want_hidden)
            offset = self._feed_pieces(forwards, first)
        batch = [self.rows(segment, offset) for segment in segments]
        forwards.run(batch)
        rows: list[int] = []
        start = 0
        for segment, part in zip(segments, batch, strict=True):
            end = start + len(part.tokens)
            rows.extend(range(end - _wanted(segment), end))
            start = end
        logits = self._decoder.logits[:start, : self._decoder.spec.vocab]
        states = self._decoder.hidden(start) if want_hidden else None
        tokens = forwards.tokens(start, *_draws(segments, start)) if rows else _nothing
        if len(rows) == start:
            return _Begun(logits.clone() if keep else logits, states, tokens)
        index = torch.tensor(rows, dtype=torch.int64, device=self._device)

        def read() -> Picked:
            best, drawn = tokens()
            return [best[row] for row in rows] if best is not None else None, [drawn[row] for row in rows] if drawn else None

        return _Begun(logits[index], states[index] if states is not None else None, read)

    def _dense(self, segment: Segment, want_hidden: bool) -> _Begun:
        """A pass through torch operators."""
        wanted = _wanted(segment)
        logits, hidden = self._decoder.dense(segment.tokens, owned(segment.sequence), self._cache, segment.parents, wanted)
        drawn = draw_rows(logits, segment.draws, wanted) if segment.draws is not None else None
        return _Begun(logits, hidden if want_hidden else None, lambda: (None, drawn))

    def _takes_pieces(self, segment: Segment) -> bool:
        """Whether the kernels, 64 rows at a time, are faster for a chain than the library, which needs all weights unpacked."""
        return segment.parents is None and len(segment.tokens) <= self._piecewise and _wanted(segment) <= MAX_ROWS

    def _feed_pieces(self, forwards: Forwards, segment: Segment) -> int:
        """Feed a long chain but for its last 64 tokens, and return how many; they stay uncommitted like the rest."""
        own, fed = owned(segment.sequence), len(segment.tokens) - MAX_ROWS
        for start in range(0, fed, MAX_ROWS):
            piece = Rows(own.slot, own.committed + start, segment.tokens[start : min(start + MAX_ROWS, fed)], None)
            forwards.run([piece])
        return fed


def _nothing() -> Picked:
    return [], None


def _wanted(segment: Segment) -> int:
    return len(segment.tokens) if segment.num_logits is None else segment.num_logits


def _draws(segments: Sequence[Segment], rows: int) -> tuple[list[DrawLaw | None], list[int]]:
    """Law and number of each of the last `rows` rows of the segments."""
    laws: list[DrawLaw | None] = []
    numbers: list[int] = []
    for segment in segments:
        count, draws = len(segment.tokens), segment.draws
        laws += [draws.law if draws is not None else None] * count
        numbers += draws.numbers if draws is not None else [0] * count
    return laws[-rows:], numbers[-rows:]


def _joined(parts: Sequence[list[int] | None]) -> list[int] | None:
    """Lists one after another; None where one is missing."""
    known = [part for part in parts if part is not None]
    return [token for part in known for token in part] if len(known) == len(parts) else None

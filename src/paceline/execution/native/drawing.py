"""Draws from rows of logits by the compiled kernels (draw.h; the readable form is execution/draws.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import overload

import numpy as np

from paceline.execution.base import Segment
from paceline.execution.draws import DrawLaw
from paceline.execution.native.binding import Drawn, Law


class Drawer:
    """Draws from one row at a time, with work space of its own. Not thread-safe."""

    def __init__(self, library: ctypes.CDLL, vocab: int) -> None:
        """library: with types as `binding.declare` sets them. vocab: places of a row."""
        self._library, self.vocab = library, vocab
        self._room = np.empty(library.paceline_draw_bytes(vocab), np.uint8)
        self._room_at = self._room.ctypes.data
        self.forwards = 0
        """Counts the forwards that wrote into the rows, so that nobody draws from what is no longer there."""

    def rows(
        self, logits_at: int, best: Sequence[int], segments: Sequence[Segment], counts: Sequence[int]
    ) -> tuple[DrawnTokens | None, Callable[[int, Collection[int]], float | None] | None]:
        """`drawn` and `mass` of a forward's output. Arguments as those of `DrawnRows`."""
        if not any(segment.draws for segment in segments):
            return None, None
        rows = DrawnRows(self, logits_at, best, segments, counts)
        return DrawnTokens(rows, range(len(best))), rows.mass

    def draw(self, row_at: int, law: DrawLaw, number: int) -> tuple[int, Drawn]:
        """A token, -1 where the largest logit is not finite; and what `mass` wants to know. row_at: address of [V] float32."""
        drawn = Drawn()
        law_at = ctypes.addressof(_entry(law, self.vocab))
        return self._library.paceline_draw(row_at, law_at, number, self._room_at, ctypes.addressof(drawn)), drawn

    def mass(self, row_at: int, law: DrawLaw, drawn: Drawn, tokens: Collection[int]) -> float:
        """The probability of these tokens together, all different, under the law that the row was drawn from."""
        table = (ctypes.c_int32 * len(tokens))(*tokens)
        law_at, at = ctypes.addressof(_entry(law, self.vocab)), ctypes.addressof(drawn)
        found: float = self._library.paceline_mass(row_at, law_at, at, ctypes.addressof(table), len(tokens))
        return found


@lru_cache
def _entry(law: DrawLaw, vocab: int) -> Law:
    """A law as the kernels read it."""
    return Law(law.temperature, law.min_p, law.top_p, law.top_k, min(law.vocab_size, vocab))


class DrawnRows:
    """The rows of one forward, drawn when they are looked at: rules stop at the first token that is refused, and a draw costs
    about as much as a hundredth of a plain step.

    They are drawn from the runner's buffer of logits, so a row must be looked at before the runner's next forward: RuntimeError
    later. The engine verifies and commits a round before anything is drafted for the next one. The token of a row that was looked
    at is kept.
    """

    def __init__(
        self,
        drawer: Drawer,
        logits_at: int,
        best: Sequence[int],
        segments: Sequence[Segment],
        counts: Sequence[int],
    ) -> None:
        """logits_at: address of [R, V] float32, kept by the runner. best: [R], for rows whose segments do not ask for draws.

        counts: rows of each segment among R.
        """
        self._drawer, self._forward, self._best = drawer, drawer.forwards, best
        self._at, self._step = logits_at, 4 * drawer.vocab
        self._asked: list[tuple[DrawLaw, int] | None] = []
        for segment, count in zip(segments, counts, strict=True):
            if segment.draws is None:
                self._asked += [None] * count
            else:
                law, numbers = segment.draws.law, segment.draws.numbers
                self._asked += [(law, number) for number in numbers[len(numbers) - count :]]
        self._drawn: dict[int, tuple[int, Drawn]] = {}

    def __len__(self) -> int:
        return len(self._asked)

    def token(self, row: int) -> int:
        """As `ForwardOutput.drawn`."""
        asked = self._asked[row]
        return self._best[row] if asked is None else self._draw(row, asked)[0]

    def mass(self, row: int, tokens: Collection[int]) -> float | None:
        """As `ForwardOutput.mass`."""
        asked = self._asked[row]
        if asked is None:
            return None
        token, drawn = self._draw(row, asked)
        if token < 0:
            return None
        self._check()
        return self._drawer.mass(self._at + row * self._step, asked[0], drawn, tokens)

    def _draw(self, row: int, asked: tuple[DrawLaw, int]) -> tuple[int, Drawn]:
        if row not in self._drawn:
            self._check()
            self._drawn[row] = self._drawer.draw(self._at + row * self._step, *asked)
        return self._drawn[row]

    def _check(self) -> None:
        if self._forward != self._drawer.forwards:
            raise RuntimeError("a row was looked at after the next forward, which has overwritten its logits")


class DrawnTokens(Sequence[int]):
    """Some rows of a forward as a sequence of their tokens. Slices share what was drawn."""

    __slots__ = ("_rows", "_span")

    def __init__(self, rows: DrawnRows, span: range) -> None:
        self._rows, self._span = rows, span

    def __len__(self) -> int:
        return len(self._span)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> DrawnTokens: ...

    def __getitem__(self, index: int | slice) -> int | DrawnTokens:
        if isinstance(index, slice):
            return DrawnTokens(self._rows, self._span[index])
        return self._rows.token(self._span[index])

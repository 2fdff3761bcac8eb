"""Draws from rows of logits on the device (draw.cu; the readable form is execution/draws.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import groupby, zip_longest

import numpy as np
import torch

from paceline.execution.cuda.driver import Kernel
from paceline.execution.draws import AHEAD, NUMBER_BITS, DrawLaw

LAW = np.dtype([("temperature", "<f4"), ("min_p", "<f4"), ("top_p", "<f8"), ("top_k", "<i4"), ("vocab", "<i4"), ("number", "<u8")])
"""`Law` of draw.cu."""
_THREADS = 1024
_SHIFT = 64 - NUMBER_BITS


@cache
def _kernel() -> Kernel:
    return Kernel(["draw.cu"], "draw", {})


@lru_cache
def _entry(law: DrawLaw, vocab: int) -> np.ndarray:
    """A law as the device reads it, with the number 0."""
    return np.array((law.temperature, law.min_p, law.top_p, law.top_k, min(law.vocab_size, vocab), 0), dtype=LAW)


class Drawer:
    """Laws and random numbers on the device, and what was drawn by them."""

    def __init__(self, rows: int, vocab: int, device: torch.device, tokens: torch.Tensor, lines: int = 0) -> None:
        """rows: most draws at once. tokens: [rows] int32, where drawn tokens go.

        lines: of random numbers that may be sent ahead; 0: each law brings the number of its draw.
        """
        self._vocab, self._rows = vocab, rows
        self.tokens = tokens
        self.chances = torch.zeros(rows, device=device)
        """Probability of each drawn token under its law; -1 of one that was not drawn but is the most probable one."""
        self._laws = torch.zeros(rows * LAW.itemsize, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(rows, vocab, dtype=torch.int32, device=device)
        self.numbers = torch.zeros(lines, rows, dtype=torch.int64, device=device)
        """Those that were sent ahead, shifted to the top of their 64 bits."""
        self._ahead = torch.zeros(rows, rows + AHEAD, dtype=torch.int64, device=device)
        self._sent = torch.zeros(lines, rows, dtype=torch.int64, pin_memory=True)

    def describe(self, laws: Sequence[DrawLaw | None], numbers: Sequence[int] = ()) -> None:
        """Say how each row of the next draws is drawn from (None: greedily). numbers: of each row, unless they are sent ahead."""
        staged = torch.zeros(self._laws.shape, dtype=torch.uint8, pin_memory=True)  # its own: earlier ones may be on their way
        table = staged.numpy().view(LAW)
        start = 0
        for _, group in groupby(laws, key=id):
            end = start + len(list(group))
            if (law_of := laws[start]) is not None:
                table[start:end] = _entry(law_of, self._vocab)
            start = end
        if numbers:
            table["number"][:start] = np.array(numbers, dtype=np.uint64) << np.uint64(_SHIFT)
        self._laws.copy_(staged, non_blocking=True)

    def send(self, numbers: Sequence[Sequence[int]], line: int) -> None:
        """Send the random numbers of draws ahead: of each row those for `line` and the following ones, round and round."""
        lines, count = len(self._sent), max(map(len, numbers))
        table = self._sent.numpy()
        ahead = np.array(list(zip_longest(*numbers, fillvalue=0)), dtype=np.uint64) << np.uint64(_SHIFT)
        table[(line + np.arange(count)) % lines, : len(numbers)] = ahead
        for start, end in ((line, min(line + count, lines)), (0, line + count - lines)):
            if start < end:
                self.numbers[start:end].copy_(self._sent[start:end], non_blocking=True)

    def beside(self, numbers: Sequence[Sequence[int]]) -> torch.Tensor:
        """Numbers as `self.numbers` holds them, [>= rows, width] int64 on the device, for whoever copies some of them there."""
        staged = torch.zeros(self._ahead.shape, dtype=torch.int64, pin_memory=True)  # its own: earlier ones may be on their way
        table = staged.numpy()
        for row, ahead in enumerate(numbers):
            if ahead:
                table[row, : len(ahead)] = np.array(ahead, dtype=np.uint64) << np.uint64(_SHIFT)
        self._ahead.copy_(staged, non_blocking=True)
        return self._ahead

    def launch(
        self,
        logits: torch.Tensor,
        best: torch.Tensor,
        rows: int,
        line: torch.Tensor | None = None,
        sources: torch.Tensor | None = None,
    ) -> None:
        """Draw. logits: [>= rows, >= V] float32; best: [>= rows] int32, the most probable token of each row, -1: not finite.

        line: [1] int32, which of the numbers that were sent ahead; None: those of the laws. sources: [rows] int32, the row of
        logits and best for each draw; None: its own.
        """
        pointer = ctypes.c_void_p
        arguments = [
            pointer(logits.data_ptr()),
            ctypes.c_longlong(logits.stride(0)),
            pointer(best.data_ptr()),
            pointer(self._laws.data_ptr()),
            pointer(self.numbers.data_ptr() if line is not None else 0),
            pointer(line.data_ptr() if line is not None else 0),
            ctypes.c_int(self._rows),
            pointer(sources.data_ptr() if sources is not None else 0),
            pointer(self._scratch.data_ptr()),
            ctypes.c_longlong(self._scratch.stride(0)),
            pointer(self.tokens.data_ptr()),
            pointer(self.chances.data_ptr()),
        ]
        _kernel().launch((rows, 1), _THREADS, arguments)

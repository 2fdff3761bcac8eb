"""Greedy decoding whose tokens stay on the device from one step to the next, while the host reads along (ours).

A captured step ends with its best token as the input of the next one, and with a line of token and evidence in memory of the host
that the device writes to. The host waits for a line, not for the device: the next step runs on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.execution.base import DecodedToken, Runner, Segment, SequenceHandle
from paceline.execution.cuda.capture import Layout
from paceline.execution.cuda.linears import MAX_ROWS

Stepping = tuple[Callable[[], None], Callable[[], DecodedToken]]
"""What issues another step, and what waits for the token of the next one in turn."""
RING = 256
"""Lines that the device writes round and round; far more than steps under way."""


class Steps:
    """Inputs of captured steps of up to 64 sequences, and what they decoded."""

    def __init__(self, layout: Layout) -> None:
        """layout: of ordinary forwards, which shares its scratch memory with the steps."""
        device = layout.tables.device
        self.layout = layout.twin()
        self._line = torch.zeros(1, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(RING, MAX_ROWS, dtype=torch.int32, pin_memory=True)
        self._evidence = torch.zeros(RING, MAX_ROWS, 3, pin_memory=True)
        self._written: list[Any] = [torch.cuda.Event() for _ in range(RING)]  # type: ignore[no-untyped-call]
        self._issued = 0

    def advance(self, best: Any, rows: int, *, source: int = 0, grow: bool = True) -> None:
        """Launch what ends a step: best tokens of the rows from `source` on become the next inputs, and a line is written.

        grow: the inputs of this step are now in the cache as well.
        """
        from paceline.execution.cuda.fused import advance

        advance(best, self.layout, self._line, self._tokens, self._evidence, rows, source, grow)

    def issued(self) -> int:
        """Call behind each step on the stream; returns the line that it will write."""
        line = self._issued % RING
        self._written[line].record()
        self._issued += 1
        return line

    def restart(self) -> None:
        """Forget steps that ran for nothing but a capture: the device counts lines, too."""
        self._line.fill_(self._issued % RING)

    def read(self, line: int, row: int = 0) -> DecodedToken:
        """What a step decoded; waits for it."""
        self._written[line].synchronize()
        largest, entropy, margin = self._evidence[line, row].tolist()
        return DecodedToken(int(self._tokens[line, row]), largest, entropy, margin)


def reference_steps(runner: Runner, sequence: SequenceHandle, feed: Sequence[int]) -> Stepping:
    """What captured steps must equal: the same through single forwards, each when it is read. Commits what it feeds."""
    pending = list(feed)

    def read() -> DecodedToken:
        nonlocal pending
        logits = runner.forward([Segment(sequence, pending, num_logits=1)]).logits[0]
        runner.accept(sequence, range(len(pending)))
        probs = torch.softmax(logits, -1)
        largest, second = probs.topk(2).values.tolist()
        pending = [int(probs.argmax())]
        return DecodedToken(pending[0], largest, float(torch.special.entr(probs).sum()), largest - second)

    return lambda: None, read

"""Draws from rows of logits whose every sum is one of whole numbers, so that any order of summing gives the same token (ours).

A token's weight is floor(2^40 e^-d), where d is its distance from the largest logit in units of the temperature; with at most
2^18 tokens the sum of all stays below 2^58. Tokens more than 27.7 units away have weight 0. Filters are those of
`sampling.to_probs`, in that order, and keep ties as it does. The token is the first one whose running sum, in order of ids, exceeds
floor(u * total): inversion at u, as `sampling.draw` does it in floating point.

These functions are the readable form of cuda/draw.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

UNIT = 40
"""Weights are multiples of 2^-UNIT of the largest one."""
NUMBER_BITS = 53
AHEAD = 3
"""Positions behind those of a segment whose numbers come along, for a draft that begins behind it."""


@dataclass(frozen=True, slots=True)
class DrawLaw:
    """How a token is drawn from logits. Fields as in `SamplingParams`."""

    temperature: float
    """Above 0."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    vocab_size: int = 1 << 30
    """Tokens from here on (padding of a model's head) are never drawn."""


@dataclass(frozen=True, slots=True)
class Draws:
    """A draw from each row of a segment."""

    law: DrawLaw
    numbers: Sequence[int]
    """For each row of the segment a whole number n in [0, 2^53); u = n / 2^53."""
    ahead: Sequence[int] = ()
    """Of a chain: those of the AHEAD positions behind its last row's."""


def row_weights(logits: torch.Tensor, law: DrawLaw) -> np.ndarray:
    """[V] int64: what tokens weigh in a draw. logits: [V] float32, at least one finite and none infinite or NaN above."""
    scores = logits[: law.vocab_size]
    distance = (scores.max() - scores) / law.temperature
    exact = torch.exp(-distance)
    far = distance.cpu().numpy()
    weights: np.ndarray = (exact.cpu().numpy().astype(np.float64) * 2.0**UNIT).astype(np.int64)
    if 0 < law.top_k < len(weights):
        weights[far > np.partition(far, law.top_k - 1)[law.top_k - 1]] = 0
    if law.top_p < 1.0:
        order = np.argsort(far, kind="stable")
        mass = weights[order].cumsum()
        enough = int(np.searchsorted(mass.astype(np.float64), law.top_p * float(mass[-1])))
        weights[far > far[order[min(enough, len(order) - 1)]]] = 0
    if law.min_p > 0.0:
        weights[exact.cpu().numpy() < np.float32(law.min_p)] = 0
    return weights


def draw_from(weights: np.ndarray, number: int) -> int:
    """The token at u = number / 2^53."""
    sums = weights.cumsum()
    place = number * int(sums[-1]) >> NUMBER_BITS
    return int(np.searchsorted(sums, place, side="right"))


def draw_rows(logits: torch.Tensor, draws: Draws, count: int) -> list[int]:
    """A token for each of a segment's last `count` rows, -1 for a row with a logit that is infinite or not a number.

    logits: [count, V] float32.
    """
    found = []
    for row, number in zip(logits, draws.numbers[len(draws.numbers) - count :], strict=True):
        finite = bool(torch.isfinite(row.max()))
        found.append(draw_from(row_weights(row, draws.law), number) if finite else -1)
    return found

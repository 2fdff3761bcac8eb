"""What model-free drafters read from the target's rows: its most probable tokens, quickly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.records import Verdict


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The most probable tokens of one row, best first."""

    ids: tuple[int, ...]
    logits: tuple[float, ...]


def top_tokens(logits: torch.Tensor, count: int, chosen: Sequence[int] | None = None) -> list[TopTokens]:
    """The `count` largest entries of each row of [rows, V] float32, or of the `chosen` rows in that order."""
    count = min(count, logits.shape[1])
    chosen = range(len(logits)) if chosen is None else chosen
    if logits.device.type != "cpu":
        best = torch.topk(logits[list(chosen)], count)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [TopTokens(tuple(ids), tuple(values)) for ids, values in rows]
    found = []
    values_of = logits.detach().numpy()
    for row in chosen:
        # A few vectorised argmax passes take a tenth of the time of a partial sort of a whole vocabulary. Not by torch, whose
        # threads would have to push aside those of the forward pass.
        left = values_of[row].copy()
        ids, values = [], []
        for _ in range(count):
            token = int(left.argmax())
            ids.append(token)
            values.append(float(left[token]))
            left[token] = -np.inf
        found.append(TopTokens(tuple(ids), tuple(values)))
    return found


def log_total(logits: torch.Tensor, largest: float) -> float:
    """Logarithm of the sum of exp(logits) of a row [V] whose largest entry is known."""
    if logits.device.type != "cpu":
        return float(torch.logsumexp(logits, dim=-1))
    return largest + math.log(float(np.exp(logits.detach().numpy() - largest).sum(dtype=np.float64)))


def row_tokens(
    tokens: Sequence[int], old_length: int, drafted: Sequence[int], verdict: Verdict | None, num_rows: int
) -> list[tuple[int, int]]:
    """Which token each row of a finished round follows, as (row, token); rows on the committed path come last.

    tokens: committed, the round included; the round began at `old_length`. verdict: of the own draft `drafted`, whose rows are all
    known; without one the rows of the committed path are given in order, and only those are used.
    """
    if verdict is None:
        emitted = min(num_rows, len(tokens) - old_length)
        return [(row, tokens[old_length - 1 + row]) for row in range(emitted)]
    nodes = [*(i for i in range(len(drafted)) if i not in verdict.path), -1, *verdict.path]
    return [(i + 1, drafted[i] if i >= 0 else tokens[old_length - 1]) for i in nodes if i + 1 < num_rows]

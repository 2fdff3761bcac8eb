"""Which rows of a long cache a draft keeps: pure functions of attention mass and keys.

`ends`: the first rows (attention sinks) and the last ones (StreamingLLM, 2309.17453).
`attended`: the last rows, and for each head the earlier ones that the last queries looked at most, neighbours included (SnapKV,
2404.14469, which keeps the queries' own rows as the last ones; ours may keep more).
`spread`: for each head a few rows of every block, more of those whose keys differ among themselves. After TCA-Attention
(2512.09238) as far as it is known to us: that blocks keep 1, 2, 4, ... rows by a bell-shaped share, is theirs; how blocks are
ranked and rows are picked, and one budget for all heads, is ours.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

import torch
import torch.nn.functional as F

_SINKS = 4
_POOL = 5
"""Slots over which attention is averaged before the best are taken: single slots are noisy, and text is read in pieces."""


def ends(length: int, budget: int) -> torch.Tensor:
    """[min(budget, length)] int64: the first 4 rows and the last ones."""
    if budget >= length:
        return torch.arange(length)
    sinks = min(_SINKS, budget // 2)
    return torch.cat([torch.arange(sinks), torch.arange(length - budget + sinks, length)])


def pooled(mass: torch.Tensor, kernel: int = _POOL) -> torch.Tensor:
    """Mean of the `kernel` slots around each, on the last dimension; slots beyond the ends count as 0. kernel: odd."""
    return F.avg_pool1d(mass.flatten(0, -2)[:, None], kernel, stride=1, padding=kernel // 2).reshape(mass.shape)


def attended(mass: torch.Tensor, budget: int, recent: int, kernel: int = _POOL) -> torch.Tensor:
    """[layers, heads, min(budget, length)] int64, increasing: the last `recent` rows and the best of those before them.

    mass: [layers, heads, length] float32, of at most the last `recent` rows (`Runner.attention_mass`); budget > recent.
    """
    length = mass.shape[-1]
    if budget >= length:
        return torch.arange(length).expand(mass.shape)
    past = length - recent
    best = pooled(mass[..., :past], kernel).topk(budget - recent, dim=-1).indices
    own = torch.arange(past, length).expand(*mass.shape[:-1], recent)
    return torch.cat([best, own], dim=-1).sort(dim=-1).values


def block_shares(block: int, centre: float, width: float = 1.0) -> dict[int, float]:
    """Share of blocks that keep k rows, for k = 1, 2, 4, ..., block: proportional to exp(-(log2 k - centre)^2 / (2 width^2))."""
    counts = [2**i for i in range(block.bit_length())]
    weights = [math.exp(-((math.log2(k) - centre) ** 2) / (2 * width**2)) for k in counts]
    return {k: weight / sum(weights) for k, weight in zip(counts, weights, strict=True)}


def block_counts(blocks: int, block: int, budget: int) -> list[int]:
    """Rows that each of so many blocks keeps, largest first: the most generous bell whose sum stays within the budget.

    At least one row a block, whatever the budget.
    """
    best = [1] * blocks
    for step in range(8 * (block.bit_length() - 1) + 1):
        shares = block_shares(block, step / 8)
        edges = list(accumulate(share * blocks for share in reversed(shares.values())))
        sizes = list(reversed(shares))
        counts = [sizes[min(bisect_right(edges, i + 0.5), len(sizes) - 1)] for i in range(blocks)]
        if sum(counts) > budget:
            break
        best = counts
    return best


def redundancy(keys: torch.Tensor, block: int) -> torch.Tensor:
    """[heads, blocks] float32: mean cosine of a block's keys to their mean, 1 where all are alike.

    keys: [heads, blocks * block, D].
    """
    grouped = keys.unflatten(1, (-1, block))  # type: ignore[no-untyped-call]
    return F.cosine_similarity(grouped, grouped.mean(dim=2, keepdim=True), dim=-1).mean(dim=-1)


def spread(mass: torch.Tensor, keys: torch.Tensor, budget: int, block: int = 64) -> torch.Tensor:
    """[heads, K] int64, increasing, of one layer; K is about the budget, and more where one row of each block exceeds it.

    mass: [heads, length] float32; keys: [heads, length, D]. The first block and the last rows (a block and what does not fill one)
    are kept whole. The blocks between them are ranked by redundancy; each keeps the rows that were looked at most.
    """
    length = mass.shape[-1]
    inner = length // block - 2
    if budget >= length or inner < 1:
        return torch.arange(max(0, length - budget), length).expand(len(mass), -1)
    first, last = block, block * (inner + 1)
    counts = block_counts(inner, block, budget - (length - last) - first)
    scores = pooled(mass)[:, first:last].unflatten(1, (inner, block))  # type: ignore[no-untyped-call]
    order = redundancy(keys[:, first:last], block).argsort(dim=1, stable=True)  # least redundant first
    rank = order.argsort(dim=1)  # [heads, inner]
    keep = torch.tensor(counts)[rank]
    place = scores.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    chosen = place < keep[..., None]  # [heads, inner, block]
    rows = torch.stack([head.flatten().nonzero()[:, 0] for head in chosen]) + first
    outer = torch.cat([torch.arange(first), torch.arange(last, length)]).expand(len(rows), -1)
    return torch.cat([rows, outer], dim=1).sort(dim=1).values

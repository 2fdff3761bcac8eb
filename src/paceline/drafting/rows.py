"""What model-free drafters read from the target's rows: its most probable tokens, quickly."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from paceline import compiled
from paceline.records import Verdict

_SOURCES = compiled.Sources(
    name="rows",
    folder=Path(compiled.__file__).parent,
    files=("drafting/top_rows.c", "execution/native/vec.h"),
    flags=("-O3", "-march=native", "-ffp-contract=off", "-Wno-psabi"),
    libraries=("-lm",),
    abi=("paceline_rows_abi", 1),
)


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The most probable tokens of one row, best first."""

    ids: tuple[int, ...]
    logits: tuple[float, ...]
    log_total: float = 0.0
    """Logarithm of the sum of exp(logits) of the whole row, if that was asked for."""


@cache
def load_library() -> ctypes.CDLL | str:
    """The compiled search, or the reason why there is none. Compiles on first use (about a second)."""
    library = compiled.load(_SOURCES)
    if not isinstance(library, str):
        address, number = ctypes.c_void_p, ctypes.c_int
        search = (address, ctypes.c_ssize_t, address, number, number, number, address, address, address)
        library.paceline_top_rows.argtypes = search
        library.paceline_top_rows.restype = number
    return library


def top_tokens(logits: torch.Tensor, count: int, chosen: Sequence[int] | None = None, *, totals: bool = False) -> list[TopTokens]:
    """The `count` largest entries of each row of [rows, V] float32, or of the `chosen` rows in that order.

    totals: with `log_total`. Takes some ten microseconds a row where it is compiled.
    """
    count = min(count, logits.shape[1])
    chosen = range(len(logits)) if chosen is None else chosen
    if logits.device.type != "cpu":
        return _on_device(logits, count, chosen, totals)
    found = _compiled(logits, count, chosen, totals) if len(chosen) else []
    return plain_top_tokens(logits, count, chosen, totals=totals) if found is None else found


def _on_device(logits: torch.Tensor, count: int, chosen: Sequence[int], totals: bool) -> list[TopTokens]:
    wanted = logits[list(chosen)]
    best = torch.topk(wanted, count)
    sums = torch.logsumexp(wanted, dim=-1).tolist() if totals else [0.0] * len(wanted)
    rows = zip(best.indices.tolist(), best.values.tolist(), sums, strict=True)
    return [TopTokens(tuple(ids), tuple(values), total) for ids, values, total in rows]


def _compiled(logits: torch.Tensor, count: int, chosen: Sequence[int], totals: bool) -> list[TopTokens] | None:
    """None where nothing is compiled, for rows that do not lie in one piece, and for rows with hardly any possible token."""
    library = load_library()
    if isinstance(library, str) or logits.dtype != torch.float32 or logits.stride(1) != 1:
        return None
    rows = np.array(chosen, np.int32)
    ids, values = np.empty((len(rows), count), np.int32), np.empty((len(rows), count), np.float32)
    sums = np.zeros(len(rows), np.float32)
    done = library.paceline_top_rows(
        logits.data_ptr(),
        logits.stride(0),
        rows.ctypes.data,
        len(rows),
        logits.shape[1],
        count,
        ids.ctypes.data,
        values.ctypes.data,
        sums.ctypes.data if totals else None,
    )
    if not done:
        return None
    lists = zip(ids.tolist(), values.tolist(), sums.tolist(), strict=True)
    return [TopTokens(tuple(row_ids), tuple(row_values), total) for row_ids, row_values, total in lists]


def plain_top_tokens(logits: torch.Tensor, count: int, chosen: Sequence[int], *, totals: bool = False) -> list[TopTokens]:
    """`top_tokens` in numpy: the readable form of top_rows.c, and what serves without a compiler."""
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
        total = values[0] + math.log(float(np.exp(values_of[row] - values[0]).sum(dtype=np.float64))) if totals else 0.0
        found.append(TopTokens(tuple(ids), tuple(values), total))
    return found


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

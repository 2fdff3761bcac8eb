"""A sequence's keys and values in the layout of attention.h, and what is copied between such sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(slots=True, eq=False)
class NativeSequence:
    """Keys [regions, capacity / 16, D / P, 16, P] and values [regions, capacity / P, D, P] of one sequence.

    A region is a layer's kv head; P = 1 with float32, 2 with bfloat16 (as uint16)."""

    keys: npt.NDArray[np.generic]
    values: npt.NDArray[np.generic]
    capacity: int
    length: int = 0
    shift: int = 0
    """Position less slot: above 0 in a copy that holds only some rows."""
    keys_at: int = 0
    values_at: int = 0
    """Addresses of the arrays; asking numpy for them costs microseconds, and every round needs them."""

    def __post_init__(self) -> None:
        self.keys_at, self.values_at = self.keys.ctypes.data, self.values.ctypes.data


def copy_rows(source: NativeSequence, rows: npt.NDArray[np.int64], copy: NativeSequence) -> None:
    """Append rows of `source`, [regions, K], to `copy`, which has room for them."""
    region = np.arange(len(rows))[:, None]
    slots = np.arange(copy.length, copy.length + rows.shape[1])
    pair = source.values.shape[-1]
    copy.keys[region, slots >> 4, :, slots & 15] = source.keys[region, rows >> 4, :, rows & 15]
    copy.values[region, slots // pair, :, slots % pair] = source.values[region, rows // pair, :, rows % pair]
    copy.length += rows.shape[1]


def keys_of(sequence: NativeSequence, heads: int, layer: int) -> torch.Tensor:
    """[heads, length, D] float32: a layer's committed keys."""
    blocks = sequence.keys[layer * heads : (layer + 1) * heads].transpose(0, 1, 3, 2, 4)
    keys = blocks.reshape(heads, sequence.capacity, -1)[:, : sequence.length]
    if keys.dtype == np.float32:
        return torch.from_numpy(keys.astype(np.float32))
    return torch.from_numpy(keys.astype(np.int16)).view(torch.bfloat16).float()

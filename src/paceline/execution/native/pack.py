"""Weights into the tile layout of linear.h: 16 output features side by side, inputs in groups of 32.

`unpack` is the readable inverse; tests hold the kernels against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from paceline.execution.native.binding import BF16, FP32, Q4, Q8
from paceline.models.base import QuantBlocks

Element = TypeVar("Element", bound=np.generic)
Bytes = npt.NDArray[np.uint8]
LANES, GROUP = 16, 32
_SAMPLE = 16
"""Tiles that stand for a matrix in `column_spread`."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix, ready for the kernels."""

    data: Bytes
    """[tiles, bytes a tile]"""
    rows: int
    columns: int
    kind: int


def quantise(weight: torch.Tensor, bits: int) -> QuantBlocks:
    """Round a [out, in] matrix to groups of 32 inputs: 8 bits symmetric, 4 bits between minimum and maximum (ours).

    Scales and offsets are rounded to float16 before the quants are chosen, so that the stored triple is consistent.
    """
    groups = weight.detach().float().reshape(weight.shape[0], -1, GROUP)
    if bits == 8:
        scales = (groups.abs().amax(-1) / 127).half().float()
        offsets = -128 * scales
        top = 255
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        offsets = low.half().float()
        scales = ((high - offsets) / 15).half().float()
        top = 15
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    quants = ((groups - offsets[..., None]) / safe[..., None]).round().clamp(0, top).to(torch.uint8)
    return QuantBlocks(quants.reshape(weight.shape).numpy(), scales.numpy(), offsets.numpy(), bits)


def _tiles(matrix: npt.NDArray[Element]) -> npt.NDArray[Element]:
    """[out, m] to [tiles, 16, m], padded with zeros."""
    rows = -matrix.shape[0] % LANES
    if rows:
        matrix = np.concatenate([matrix, np.zeros((rows, matrix.shape[1]), matrix.dtype)])
    return matrix.reshape(-1, LANES, matrix.shape[1])


def _group_values(values: npt.NDArray[np.float32]) -> Bytes:
    """[out, groups] to f16 bytes [tiles, groups * 16 * 2]."""
    tiles = _tiles(values.astype(np.float16)).transpose(0, 2, 1)
    return np.ascontiguousarray(tiles).view(np.uint8).reshape(tiles.shape[0], -1)


def pack_blocks(blocks: QuantBlocks, order: npt.NDArray[np.intp] | None = None) -> Packed:
    """Pack quantised blocks; `order` permutes output features first. 8-bit blocks must be symmetric (offset = -128 scale)."""
    quants, scales, offsets = blocks.quants, blocks.scales, blocks.offsets
    if order is not None:
        quants, scales, offsets = quants[order], scales[order], offsets[order]
    rows, columns = quants.shape
    tiles = _tiles(quants)
    count, groups = tiles.shape[0], columns // GROUP
    if blocks.bits == 4:
        split = tiles.reshape(count, LANES, groups, 4, 2, 4)  # low nibbles: inputs 8i + j, high: 8i + 4 + j
        both = split[..., 0, :] | (split[..., 1, :] << 4)
        body = np.ascontiguousarray(both.transpose(0, 2, 3, 1, 4)).reshape(count, -1)
        return Packed(np.concatenate([body, _group_values(scales), _group_values(offsets)], axis=1), rows, columns, Q4)
    split = tiles.reshape(count, LANES, groups, 8, 4)
    body = np.ascontiguousarray(split.transpose(0, 2, 3, 1, 4)).reshape(count, -1)
    return Packed(np.concatenate([body, _group_values(scales)], axis=1), rows, columns, Q8)


def pack_float(weight: torch.Tensor, kind: int, order: npt.NDArray[np.intp] | None = None) -> Packed:
    """Pack a [out, in] matrix as float32 or bfloat16."""
    if order is not None:
        weight = weight[torch.from_numpy(order)]
    rows, columns = weight.shape
    if kind == FP32:
        tiles = _tiles(weight.detach().float().numpy()).transpose(0, 2, 1)
    else:
        raw = _tiles(weight.detach().to(torch.bfloat16).view(torch.int16).numpy())
        tiles = raw.reshape(raw.shape[0], LANES, columns // 2, 2).transpose(0, 2, 1, 3)
    data = np.ascontiguousarray(tiles)
    return Packed(data.view(np.uint8).reshape(data.shape[0], -1), rows, columns, kind)


def unpack(packed: Packed) -> torch.Tensor:
    """[rows, columns] float32: what the kernels multiply with."""
    count, groups = packed.data.shape[0], packed.columns // GROUP
    if packed.kind == FP32:
        dense = packed.data.view(np.float32).reshape(count, packed.columns, LANES).transpose(0, 2, 1)
        return torch.from_numpy(dense.reshape(-1, packed.columns)[: packed.rows].copy())
    if packed.kind == BF16:
        raw = packed.data.view(np.int16).reshape(count, packed.columns // 2, LANES, 2).transpose(0, 2, 1, 3)
        flat = torch.from_numpy(raw.reshape(-1, packed.columns)[: packed.rows].copy())
        return flat.view(torch.bfloat16).float()
    size = groups * (256 if packed.kind == Q4 else 512)
    halves = packed.data[:, size:].copy().view(np.float16).astype(np.float32).reshape(count, -1, groups, LANES)
    if packed.kind == Q4:
        both = packed.data[:, :size].reshape(count, groups, 4, LANES, 4).transpose(0, 3, 1, 2, 4)
        quants = np.stack([both & 15, both >> 4], axis=4).reshape(count, LANES, groups, GROUP)
        scale, offset = halves[:, 0].transpose(0, 2, 1), halves[:, 1].transpose(0, 2, 1)
    else:
        quants = packed.data[:, :size].reshape(count, groups, 8, LANES, 4).transpose(0, 3, 1, 2, 4)
        quants = quants.reshape(count, LANES, groups, GROUP)
        scale = halves[:, 0].transpose(0, 2, 1)
        offset = -128 * scale
    dense = scale[..., None] * quants + offset[..., None]
    return torch.from_numpy(dense.reshape(-1, packed.columns)[: packed.rows].astype(np.float32))


def column_spread(narrow: Packed, wide: Packed) -> npt.NDArray[np.float32]:
    """[columns / 32]: mean squared length of a column of wide - narrow in each group, from some of the tiles (grades.h)."""
    step = max(1, len(narrow.data) // _SAMPLE)
    rows = narrow.rows if step == 1 else LANES * len(narrow.data[::step])
    parts = [unpack(Packed(packed.data[::step], rows, packed.columns, packed.kind)) for packed in (narrow, wide)]
    mean = (parts[1] - parts[0]).square().reshape(rows, -1, GROUP).mean(dim=(0, 2))
    return (mean * narrow.rows).numpy()


def gate_up_order(intermediate: int) -> npt.NDArray[np.intp]:
    """Row order that puts 32 gate rows beside their 32 up rows, so that one worker finishes a group of 32 features."""
    gate = np.arange(intermediate).reshape(-1, GROUP)
    return np.concatenate([gate, gate + intermediate], axis=1).reshape(-1)

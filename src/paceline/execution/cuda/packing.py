"""Weights in the order in which the lanes of `skinny.cu` read them, and the quantised formats (ours).

A tile is 16 weight rows, a group the tiles of a block's warps, a step 64 inputs; what a block reads in a step is consecutive.
Within a step lane (g, t) of a warp, g = 0..7 and t = 0..3, holds inputs 8t..8t+7
of both halves of the step for rows g and g + 8 of the tile. Which rows of the matrix make a tile is the caller's choice
(`row_order`): what must meet in one lane (a gate and its up value, the two halves of a rotary pair) goes to rows g and g + 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from paceline.errors import ModelError
from paceline.models.base import QuantBlocks

FORMATS = {"bf16": 0, "int8": 1, "fp8": 2, "int4": 3}
TILE, STEP, GROUP = 16, 64, 32
GROUP_TILES = 8
"""Tiles of a group where nobody asks for another number."""
_BYTE_ORDER = (0, 2, 1, 3)
"""int8 and fp8: inputs in the bytes of a word; the even and the odd bytes are unpacked together."""
_FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed matrix [rows, inputs]."""

    format: str
    rows: int
    inputs: int
    group_tiles: int
    words: torch.Tensor
    """uint8, as `skinny.cu` reads it; int4: a step's words, then bfloat16 [tiles, 8, half, row of the pair, (scale, offset)]."""
    row_scales: torch.Tensor | None = None
    """int8 and fp8: float32 [padded rows]."""

    @property
    def padded_rows(self) -> int:
        """Rows with those that fill up the last group."""
        return padded_rows(self.rows, self.group_tiles)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.words, self.row_scales) if t is not None)


def padded_rows(rows: int, group_tiles: int) -> int:
    """Rows of whole groups."""
    group = group_tiles * TILE
    return -(-rows // group) * group


def row_order(kind: str, rows: int, head_dim: int = 0) -> torch.Tensor:
    """Index of the matrix row at each packed row.

    kind: `natural`; `gated` (rows are all gates, then all ups: 8 gates meet their ups in a tile); `heads` (heads of `head_dim`
    rows: element d meets d + head_dim / 2).
    """
    index = torch.arange(rows)
    if kind == "natural":
        return index
    if kind == "gated":
        return index.view(2, -1, 8).transpose(0, 1).reshape(-1)
    return index.view(-1, 2, head_dim // 16, 8).transpose(1, 2).reshape(-1)


def natural_rows(kind: str, packed: torch.Tensor, head_dim: int = 0) -> torch.Tensor:
    """Undo `row_order` on the last dimension."""
    shape = packed.shape
    if kind == "natural":
        return packed
    if kind == "gated":
        return packed.view(*shape[:-1], -1, 2, 8).transpose(-3, -2).reshape(shape)
    return packed.view(*shape[:-1], -1, head_dim // 16, 2, 8).transpose(-3, -2).reshape(shape)


def column_tiles(x: torch.Tensor) -> torch.Tensor:
    """Activations [64, inputs] in the order in which `skinny.cu` reads and writes them (a copy of the same shape)."""
    return x.view(8, 8, -1, 2, 4, 8).permute(2, 0, 3, 1, 4, 5).reshape(x.shape)


def from_column_tiles(x: torch.Tensor) -> torch.Tensor:
    """Undo `column_tiles`."""
    return x.view(-1, 8, 2, 8, 4, 8).permute(1, 3, 0, 2, 4, 5).reshape(x.shape)


def pack(weight: torch.Tensor, format: str, blocks: QuantBlocks | None = None, group_tiles: int = GROUP_TILES) -> Packed:
    """Pack a matrix [rows, inputs] whose rows are already in packed order; rows are filled up to whole groups with zeros.

    blocks: the file's own 4-bit blocks of the same rows, used for int4 instead of rounding anew (scales become bfloat16).
    Raises ModelError when inputs is no multiple of 64.
    """
    rows, inputs = weight.shape
    if inputs % STEP:
        raise ModelError(f"inputs = {inputs}: the packed formats need a multiple of {STEP}")
    missing = padded_rows(rows, group_tiles) - rows
    if format == "int4":
        return _pack_int4(weight, missing, group_tiles, blocks)
    weight = F.pad(weight, (0, 0, 0, missing))
    if format == "bf16":
        lanes = _lanes(weight.to(torch.bfloat16), group_tiles).permute(0, 4, 1, 5, 2, 3, 6, 7)  # [.., half, pair, g, t, 8]
        return Packed(format, rows, inputs, group_tiles, lanes.contiguous().view(torch.uint8))
    quants, scales = _rounded_int8(weight) if format == "int8" else _rounded_fp8(weight)
    lanes = _lanes(quants, group_tiles).permute(0, 4, 1, 5, 3, 6, 2, 7)  # [group, step, tile, half, g, t, pair, 8]
    lanes = lanes.view(*lanes.shape[:-1], 2, 4)[..., list(_BYTE_ORDER)]
    return Packed(format, rows, inputs, group_tiles, lanes.contiguous().view(torch.uint8), row_scales=scales)


def unpack(packed: Packed) -> torch.Tensor:
    """The matrix that the packed words stand for, float32 [rows, inputs]: the reference of the `unpack` kernel."""
    tiles, steps = packed.group_tiles, packed.inputs // STEP
    groups = packed.padded_rows // (tiles * TILE)
    if packed.format == "bf16":
        lanes = packed.words.view(torch.bfloat16).view(groups, steps, tiles, 2, 2, 8, 4, 8).permute(0, 2, 4, 5, 1, 3, 6, 7).float()
    elif packed.format == "int4":
        lanes = _unpack_int4(packed, groups, steps)
    else:
        kind = torch.int8 if packed.format == "int8" else torch.float8_e4m3fn
        values = packed.words.view(kind).view(groups, steps, tiles, 2, 8, 4, 2, 2, 4).float()
        lanes = values[..., list(_BYTE_ORDER)].flatten(-2).permute(0, 2, 6, 4, 1, 3, 5, 7)
        assert packed.row_scales is not None
        lanes = lanes * packed.row_scales.view(groups, tiles, 2, 8, 1, 1, 1, 1)
    return lanes.reshape(packed.padded_rows, packed.inputs)[: packed.rows]


def _lanes(matrix: torch.Tensor, group_tiles: int) -> torch.Tensor:
    """[rows, inputs] as [group, tile, pair, g, step, half, t, 8]."""
    return matrix.view(-1, group_tiles, 2, 8, matrix.shape[1] // STEP, 2, 4, 8)


def _rounded_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric, one scale a row: int8 [rows, inputs] and float32 [rows]."""
    scales = (weight.abs().amax(1).float() / 127).clamp_min(1e-30)
    return torch.round(weight.float() / scales[:, None]).to(torch.int8), scales


def _rounded_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3, one scale a row: uint8 [rows, inputs] and float32 [rows]."""
    scales = (weight.abs().amax(1).float() / _FP8_MAX).clamp_min(1e-30)
    return (weight.float() / scales[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), scales


def _pack_int4(weight: torch.Tensor, missing: int, group_tiles: int, blocks: QuantBlocks | None) -> Packed:
    """Groups of 32 inputs, w = scale * (16 + q) + offset with q in 0..15 and both in bfloat16."""
    rows, inputs = weight.shape
    if blocks is not None and blocks.bits == 4:
        quants = torch.from_numpy(blocks.quants).to(weight.device)
        file_scales, file_offsets = (torch.from_numpy(t).to(weight.device) for t in (blocks.scales, blocks.offsets))
        scales, offsets = file_scales.to(torch.bfloat16), (file_offsets - 16 * file_scales).to(torch.bfloat16)
    else:
        groups = weight.float().view(rows, -1, GROUP)
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low) / 15).clamp_min(1e-30).to(torch.bfloat16)
        offsets = (low - 16 * scales.float()).to(torch.bfloat16)
        steps = (groups - offsets.float()[..., None]) / scales.float()[..., None] - 16
        quants = steps.round().clamp(0, 15).to(torch.uint8).view(rows, inputs)
    quants, scales, offsets = (F.pad(t, (0, 0, 0, missing)) for t in (quants, scales, offsets))
    lanes = _lanes(quants, group_tiles).permute(0, 4, 1, 3, 6, 5, 2, 7)  # [group, step, tile, g, t, half, pair, 8]
    word = torch.zeros(lanes.shape[:-1], dtype=torch.int64, device=weight.device)
    for i in range(8):  # inputs 2i and 2i + 1 at bits 4i + 3 and 4i + 19, beyond bit 31 from the start again
        word |= lanes[..., i].long() << _nibble_shift(i)
    word = (word | word >> 32) & 0xFFFFFFFF
    words = torch.stack([word >> 8 * i & 255 for i in range(4)], -1).to(torch.uint8)
    pairs = torch.stack([scales, offsets], -1).view(-1, group_tiles, 2, 8, inputs // STEP, 2, 2)
    scale_bytes = pairs.permute(0, 4, 1, 3, 5, 2, 6).contiguous().view(torch.uint8)
    return Packed("int4", rows, inputs, group_tiles, torch.cat([words.flatten(2), scale_bytes.flatten(2)], dim=-1))


def _nibble_shift(index: int) -> int:
    return 4 * (index // 2) + 3 + 16 * (index % 2)


def _unpack_int4(packed: Packed, groups: int, steps: int) -> torch.Tensor:
    tiles = packed.group_tiles
    parts = torch.tensor_split(packed.words.view(groups, steps, -1), [tiles * 512], dim=-1)
    values = parts[0].contiguous().view(torch.int32).view(groups, steps, tiles, 8, 4, 2, 2).long() & 0xFFFFFFFF
    values = values | values << 32
    quants = torch.stack([values >> _nibble_shift(i) & 15 for i in range(8)], -1)
    quants = quants.permute(0, 2, 6, 3, 1, 5, 4, 7)  # [group, tile, pair, g, step, half, t, 8]
    pairs = parts[1].contiguous().view(torch.bfloat16).view(groups, steps, tiles, 8, 2, 2, 2)
    pairs = pairs.permute(0, 2, 5, 3, 1, 4, 6)[..., None, None, :]
    weights: torch.Tensor = ((16 + quants) * pairs[..., 0].float() + pairs[..., 1].float()).to(torch.bfloat16).float()
    return weights

"""Linear layers over packed weights: `skinny.cu` for up to 64 rows, the library's product over unpacked weights for more (ours)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from paceline.execution.cuda.driver import Kernel
from paceline.execution.cuda.packing import FORMATS, STEP, TILE, Packed, natural_rows, pack, row_order, unpack
from paceline.models.base import QuantBlocks

MAX_ROWS = 64
EPILOGUES = {"logits": 0, "residual": 1, "gated": 2, "qkv": 3}
_WARPS = 8
_COLUMN_TILES = (1, 2, 4, 8)
_BLOCKS_AT_ONCE = 256
"""Blocks that surely run at the same time: two a multiprocessor, whole clusters."""

_POINTERS = (
    *("weights", "group_scales", "row_scales", "bias", "x", "squares", "out", "out_squares"),
    *("k_cache", "v_cache", "rotary", "positions", "slots"),
)
_NUMBERS = (
    *("k_steps", "tiles", "rows", "num_squares", "out_stride"),
    *("heads", "kv_heads", "head_dim", "gelu", "prefetch"),
)


class _Arguments(ctypes.Structure):
    """`Args` of skinny.cu."""

    _fields_ = [  # noqa: RUF012
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("inv_width", ctypes.c_float),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in _NUMBERS),
    ]


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was chosen by measurement (benchmarks/gpu_decode.py); none of it changes a bit of the results."""

    depth: tuple[int, int, int, int] = (2, 4, 4, 6)
    """By format: steps of 64 inputs that a warp has in flight (even)."""
    prefetch: int = 2
    """4 KiB pieces that a warp asks the second-level cache for before the activations are there."""
    overlap: bool = True
    """Kernels may start while the one before them ends."""


def cluster_size(rows: int, inputs: int) -> int:
    """Blocks that share a product's inputs: as many as run at once, but no fewer than 4 steps each.

    Depends on the weight's shape alone, and so does the order of every sum.
    """
    blocks = -(-rows // (TILE * _WARPS))
    return max(1, min(8, _BLOCKS_AT_ONCE // blocks, inputs // STEP // 4))


@cache
def _skinny(format: str, epilogue: str, columns: int, depth: int) -> Kernel:
    words = 4 if format == "bf16" else 2
    blocks = 3 if columns == 1 and depth * words <= 8 else 2
    defines = {"NT": columns, "FORMAT": FORMATS[format], "EPILOGUE": EPILOGUES[epilogue], "DEPTH": depth, "BLOCKS": blocks}
    return Kernel("skinny.cu", "skinny", defines)


@cache
def _unpacker(format: str) -> Kernel:
    defines = {"NT": 1, "FORMAT": FORMATS[format], "EPILOGUE": 0, "DEPTH": 2, "BLOCKS": 1}
    return Kernel("skinny.cu", "unpack", defines)


class PackedLinear:
    """A matrix [rows, inputs] with an optional bias, packed in a row order (`packing.row_order`)."""

    def __init__(
        self,
        weight: torch.Tensor,
        format: str,
        *,
        kind: str = "natural",
        head_dim: int = 0,
        bias: torch.Tensor | None = None,
        blocks: QuantBlocks | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """weight: on the device where it shall stay. Raises ModelError when the shape does not fit."""
        self._kind, self._head_dim, self._tuning = kind, head_dim, tuning or Tuning()
        order = row_order(kind, weight.shape[0], head_dim)
        if blocks is not None:
            index = order.numpy()
            blocks = QuantBlocks(blocks.quants[index], blocks.scales[index], blocks.offsets[index], blocks.bits)
        on_device = order.to(weight.device)
        self.packed: Packed = pack(weight[on_device] if kind != "natural" else weight, format, blocks)
        self.tiles = -(-self.packed.rows // TILE)
        self.bias = None if bias is None else F.pad(bias.float()[on_device], (0, self.tiles * TILE - len(bias)))
        self._cluster = cluster_size(self.packed.rows, self.packed.inputs)

    def launch(self, epilogue: str, rows: int, x: torch.Tensor, out: torch.Tensor, *, overlap: bool = True, **more: Any) -> None:
        """out[n] = finish(weight @ x[n]) for n < rows <= 64.

        x: [>= rows, inputs] bfloat16. overlap: the kernel before this one may still run (not one that made what the kernels
        after it read without waiting). more: the other members of `Args` by name; tensors are given as such.
        """
        packed = self.packed
        values: dict[str, Any] = dict(
            weights=packed.words,
            group_scales=packed.group_scales,
            row_scales=packed.row_scales,
            bias=self.bias,
            x=x,
            out=out,
            k_steps=packed.inputs // STEP,
            tiles=self.tiles,
            rows=rows,
            prefetch=self._tuning.prefetch,
            **more,
        )
        pointers = {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in values.items() if v is not None}
        columns = next(c for c in _COLUMN_TILES if 8 * c >= rows)
        kernel = _skinny(packed.format, epilogue, columns, self._tuning.depth[FORMATS[packed.format]])
        blocks = -(-self.tiles // _WARPS)
        grid = (blocks * self._cluster, 1)
        overlap = overlap and self._tuning.overlap
        kernel.launch(grid, 32 * _WARPS, [_Arguments(**pointers)], cluster=self._cluster, overlap=overlap)

    def dense(self, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        """weight @ x[n] * norm[n] + bias, float32 [T, rows] in the matrix's own row order, through the library's product.

        x: [T, inputs] bfloat16; norm: [T, 1] float32.
        """
        y = F.linear(x, self._unpacked(x.dtype)).float()
        y = y if norm is None else y * norm
        y = y if self.bias is None else y + self.bias[: self.packed.rows]
        return natural_rows(self._kind, y, self._head_dim)

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, inputs] in packed row order."""
        packed = self.packed
        if not packed.words.is_cuda:
            return unpack(packed).to(dtype)
        out = torch.empty(self.tiles * TILE, packed.inputs, dtype=torch.bfloat16, device=packed.words.device)
        steps = packed.inputs // STEP
        tensors = (packed.words, packed.group_scales, packed.row_scales, out)
        arguments: list[Any] = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
        _unpacker(packed.format).launch((-(-steps // _WARPS), self.tiles), 32 * _WARPS, [*arguments, ctypes.c_int(steps)])
        return out[: packed.rows]

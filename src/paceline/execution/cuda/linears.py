"""Linear layers over packed weights: `skinny.cu` for up to 64 rows, the library's product over unpacked weights for more (ours)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from paceline.execution.cuda.driver import Kernel
from paceline.execution.cuda.packing import FORMATS, GROUP_TILES, STEP, TILE, Packed, natural_rows, pack, row_order, unpack
from paceline.models.base import QuantBlocks

MAX_ROWS = 64
EPILOGUES = {"logits": 0, "residual": 1, "gated": 2, "qkv": 3}
_PARTS = ("formats.cu", "finish.cu", "skinny.cu")
_LEAST_STEPS = 3
"""A block gets at least so many steps of a small matrix: more blocks would only wait for each other."""
_SHARED_BYTES = 216_000
"""Shared memory of a block: so much that a multiprocessor holds one block, which spreads them evenly whatever runs before, and
leaves room for attention's small blocks, which run before the weights behind them are needed."""
_SPARE_BYTES = 44_000
"""What the product before attention leaves free, so that attention can fetch its keys early."""
_FINE_UNITS = 12
"""A block with fewer stages of two steps gets stages of one: the work is dealt out more evenly."""
_MAX_STAGES = 16
_PART_WORDS = 16 * 8 * 32 * 4

_POINTERS = (
    *("weights", "row_scales", "bias", "x", "squares", "out", "out_squares"),
    *("k_cache", "v_cache", "rotary", "positions", "slots", "parts"),
)
_NUMBERS = (
    *("k_steps", "tiles", "rows", "num_squares", "out_stride"),
    *("heads", "kv_heads", "head_dim", "gelu", "stages", "exponent"),
)


class _Arguments(ctypes.Structure):
    """`Args` of skinny.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("inv_width", ctypes.c_float),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in _NUMBERS),
    ]


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was chosen by measurement (benchmarks/gpu_decode.py); none of it changes a bit of the results."""

    stages: tuple[int, int, int, int] = (3, 6, 6, 4)
    """By format: stages of the ring of a large product at most; more would only queue at the memory."""
    overlap: bool = True
    """Kernels may start while the one before them ends."""


class Workspace:
    """What the products of one device share, one after another: sums on their way between blocks."""

    def __init__(self, device: torch.device) -> None:
        self.blocks = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self.parts = torch.full((self.blocks * _PART_WORDS,), -1, dtype=torch.int32, device=device)
        """All bits set: no part has come yet."""


@cache
def _skinny(format: str, epilogue: str, columns: int, steps: int) -> Kernel:
    defines = {"NT": columns, "FORMAT": FORMATS[format], "EPILOGUE": EPILOGUES[epilogue], "STEPS": steps}
    return Kernel(_PARTS, "skinny", defines, _SHARED_BYTES)


@cache
def _unpacker(format: str) -> Kernel:
    return Kernel(_PARTS, "unpack", {"NT": 1, "FORMAT": FORMATS[format], "EPILOGUE": 0, "STEPS": 1})


def ring(format: str, columns: int, steps: int, limit: int = _SHARED_BYTES) -> tuple[int, int]:
    """Stages of the ring in shared memory, and its bytes."""
    warps = GROUP_TILES[format]
    weights = {"bf16": 2048, "int8": 1024, "fp8": 1024, "int4": 512 + 128}[format]
    stage = steps * (warps * weights + columns * 1024)
    stages = min(_MAX_STAGES, (limit - columns * 1024) // stage)  # the norms' partial sums lie beside it
    return stages, stages * stage


class PackedLinear:
    """A matrix [rows, inputs] with an optional bias, packed in a row order (`packing.row_order`)."""

    def __init__(
        self,
        weight: torch.Tensor,
        format: str,
        workspace: Workspace,
        *,
        kind: str = "natural",
        head_dim: int = 0,
        bias: torch.Tensor | None = None,
        blocks: QuantBlocks | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """weight: on the device where it shall stay. Raises ModelError when the shape does not fit."""
        self._kind, self._head_dim, self._tuning, self._workspace = kind, head_dim, tuning or Tuning(), workspace
        order = row_order(kind, weight.shape[0], head_dim)
        if blocks is not None:
            index = order.numpy()
            blocks = QuantBlocks(blocks.quants[index], blocks.scales[index], blocks.offsets[index], blocks.bits)
        on_device = order.to(weight.device)
        self.packed: Packed = pack(weight[on_device] if kind != "natural" else weight, format, blocks)
        self.tiles = -(-self.packed.rows // TILE)
        self.bias = None if bias is None else F.pad(bias.float()[on_device], (0, self.packed.padded_rows - len(bias)))
        steps = -(-self.tiles // GROUP_TILES[format]) * (self.packed.inputs // STEP)
        self._blocks = max(1, min(workspace.blocks, steps // _LEAST_STEPS))
        coarse = self.packed.inputs // STEP % 2 == 0 and steps >= 2 * _FINE_UNITS * self._blocks
        self._steps = 2 if coarse else 1
        self._reference: torch.Tensor | None = None
        """The unpacked matrix, where there are no kernels."""

    def move(self, device: torch.device) -> None:
        """Take the weights to another device, for instance to the host's memory and back."""
        packed = self.packed
        scales = None if packed.row_scales is None else packed.row_scales.to(device)
        self.packed = replace(packed, words=packed.words.to(device), row_scales=scales)
        self.bias = None if self.bias is None else self.bias.to(device)

    def launch(
        self,
        epilogue: str,
        rows: int,
        x: torch.Tensor,
        out: torch.Tensor,
        *,
        overlap: bool = True,
        **more: Any,
    ) -> None:
        """out[n] = finish(weight @ x[n]) for n < rows <= 64.

        x: column tiles (`packing.column_tiles`). overlap: the kernel before this one may still run (not one that made what the
        kernels after it read without waiting). more: the other members of `Args` by name; tensors are given as such.
        """
        packed, columns = self.packed, -(-rows // 8)
        limit = _SHARED_BYTES - (_SPARE_BYTES if epilogue == "qkv" else 0)
        stages, shared_bytes = ring(packed.format, columns, self._steps, limit)
        if self._steps == 2:
            stages = min(stages, self._tuning.stages[FORMATS[packed.format]])
        values: dict[str, Any] = {
            "weights": packed.words,
            "row_scales": packed.row_scales,
            "bias": self.bias,
            "x": x,
            "out": out,
            "k_steps": packed.inputs // STEP,
            "tiles": self.tiles,
            "rows": rows,
            "parts": self._workspace.parts,
            "stages": stages,
            "exponent": 0x41804180 if packed.format == "int4" else 0x43004300,
            **more,
        }
        pointers = {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in values.items() if v is not None}
        kernel = _skinny(packed.format, epilogue, columns, self._steps)
        overlap = overlap and self._tuning.overlap
        threads = 32 * (GROUP_TILES[packed.format] + 2 + (4 if packed.format == "bf16" else 2))
        kernel.launch((self._blocks, 1), threads, [_Arguments(**pointers)], shared_bytes=shared_bytes, overlap=overlap)

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
            if self._reference is None:
                self._reference = unpack(packed).to(dtype)
            return self._reference
        out = torch.empty(packed.padded_rows, packed.inputs, dtype=torch.bfloat16, device=packed.words.device)
        steps = packed.inputs // STEP
        tensors = (packed.words, packed.row_scales, out)
        arguments: list[Any] = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
        grid = (-(-steps // 8), packed.padded_rows // TILE)
        _unpacker(packed.format).launch(grid, 256, [*arguments, ctypes.c_int(steps)])
        return out[: packed.rows]

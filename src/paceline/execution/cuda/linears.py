"""Linear layers over packed weights: `skinny.cu` for up to 64 rows, the library's product over unpacked weights for more (ours)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from paceline.execution.cuda.driver import Kernel
from paceline.execution.cuda.packing import FORMATS, STEP, TILE, Packed, natural_rows, pack, row_order, unpack
from paceline.models.base import QuantBlocks

MAX_ROWS = 64
EPILOGUES = {"logits": 0, "residual": 1, "gated": 2, "qkv": 3}
_PARTS = ("formats.cu", "finish.cu", "skinny.cu")
_SHARED_BYTES = 216_000
"""Shared memory of a block: so much that a multiprocessor holds one block, which spreads them evenly whatever runs before, and
leaves room for attention's small blocks, which run before the weights behind them are needed."""
_SPARE_BYTES = 44_000
"""What the product before attention leaves free, so that attention can fetch its keys early."""
_MOST_TILES = 16
"""Tiles of a group at most: a warp each."""
_WARPS = {"bf16": 10, "int8": 28, "fp8": 28, "int4": 28}
"""Multiplying warps of a block; unpacking asks for more of them."""
_TILE_BYTES = {"bf16": 2048, "int8": 1024, "fp8": 1024, "int4": 512 + 128}
"""Of a step."""
_MOST_PARTS = 8
"""Of a tile's sums."""
_DEEP_STEPS, _DEEP_STAGES = 24, 4
"""A warp with as many steps takes two at once where as many such stages fit into the ring."""
_MAX_STAGES = 16
_MEETING_BYTES = 20_000
"""What a block could read while those that share a group meet."""
_PROCESSORS = 132
"""Of a device that has no kernels."""

_POINTERS = (
    *("weights", "row_scales", "bias", "x", "squares", "out", "out_squares"),
    *("k_cache", "v_cache", "rotary", "positions", "slots"),
)
_NUMBERS = (
    *("k_steps", "tiles", "groups", "rounds", "rows", "num_squares", "out_stride"),
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
    """What was chosen by measurement (benchmarks/gpu_kernels.py); none of it changes a bit of the results."""

    overlap: bool = True
    """Kernels may start while the one before them ends."""


@dataclass(frozen=True, slots=True)
class Split:
    """How a matrix is dealt out to blocks and warps (see skinny.cu)."""

    group: int
    """Tiles of a group."""
    sharers: int
    """Blocks that share a group's inputs."""
    slices: int
    """Warps of a block that share a tile's inputs."""
    rounds: int
    """Groups of a block, one after another."""
    own_steps: int
    """Steps of a block at most."""


def split(tiles: int, steps: int, format: str, processors: int) -> Split:
    """The split whose busiest block has the fewest bytes to read: weights, and 16 rows of activations.

    tiles: of 16 rows; steps: of 64 inputs. A function of these alone, so that the order of sums is.
    """
    splits = []
    for sharers in (1, 2):
        clusters = processors // sharers
        rounds = -(-tiles // (clusters * _MOST_TILES))
        group, own = -(-tiles // (clusters * rounds)), -(-steps // sharers)
        slices = 1 if rounds > 1 else max(1, min(_WARPS[format] // group, own, _MOST_PARTS // sharers))
        if sharers == 1 or (rounds == 1 and own >= 2):
            cost = rounds * own * (group * _TILE_BYTES[format] + 2048) + (sharers > 1) * _MEETING_BYTES
            splits.append((cost, Split(group, sharers, slices, rounds, own)))
    return min(splits, key=lambda s: s[0])[1]


@cache
def _skinny(format: str, epilogue: str, columns: int, split: Split, depth: int) -> Kernel:
    defines = {"NT": columns, "FORMAT": FORMATS[format], "EPILOGUE": EPILOGUES[epilogue], "DEPTH": depth}
    return Kernel(_PARTS, "skinny", {**defines, **_defines(split)}, _SHARED_BYTES)


def _defines(split: Split) -> dict[str, int]:
    return {"GROUP": split.group, "SHARERS": split.sharers, "SLICES": split.slices}


@cache
def _unpacker(format: str, split: Split) -> Kernel:
    defines = {"NT": 1, "FORMAT": FORMATS[format], "EPILOGUE": 0, "DEPTH": 1}
    return Kernel(_PARTS, "unpack", {**defines, **_defines(split)})


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _PROCESSORS


def threads(split: Split, epilogue: str, columns: int) -> int:
    """Of a block: multiplying, copying, and preparing the norms (see formats.cu)."""
    inputs = 2 if columns <= 2 else 1
    return 32 * (split.group * split.slices + 1 + (inputs if epilogue == "residual" else 3))


def ring(format: str, columns: int, split: Split, limit: int = _SHARED_BYTES) -> tuple[int, int]:
    """Steps that a warp takes at once, and stages of the ring in shared memory."""
    shared = split.slices * split.sharers
    step = split.slices * (split.group * _TILE_BYTES[format] + columns * 1024)
    parts = -(-split.group // split.sharers) * columns * shared * 512 if shared > 1 else 0
    limit -= parts + columns * 1056 + 400  # the norms' partial sums lie beside it
    depth = 2 if split.own_steps >= _DEEP_STEPS * split.slices and limit // (2 * step) >= _DEEP_STAGES else 1
    return depth, min(_MAX_STAGES, limit // (depth * step))


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
        self.tiles = -(-weight.shape[0] // TILE)
        self.split = split(self.tiles, -(-weight.shape[1] // STEP), format, _processors(weight.device))
        self.packed: Packed = pack(weight[on_device] if kind != "natural" else weight, format, blocks, self.split.group)
        self.bias = None if bias is None else F.pad(bias.float()[on_device], (0, self.packed.padded_rows - len(bias)))
        self._reference: torch.Tensor | None = None
        """The unpacked matrix, where there are no kernels."""

    def settle(self) -> None:
        """Move the packed words on a GPU into memory of their own.

        They were made inside a block of what packing needed for a moment; such blocks, cut up and kept, took 13 of 80 GB.
        """
        words = self.packed.words
        if words.is_cuda:
            torch.cuda.empty_cache()
            self.packed = replace(self.packed, words=words.clone())

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
        packed, split, columns = self.packed, self.split, -(-rows // 8)
        count = threads(split, epilogue, columns)
        limit = _SHARED_BYTES - (_SPARE_BYTES if epilogue == "qkv" else 0)
        depth, stages = ring(packed.format, columns, split, limit)
        groups = packed.padded_rows // (split.group * TILE)
        values: dict[str, Any] = {
            "weights": packed.words,
            "row_scales": packed.row_scales,
            "bias": self.bias,
            "x": x,
            "out": out,
            "k_steps": packed.inputs // STEP,
            "tiles": self.tiles,
            "groups": groups,
            "rounds": split.rounds,
            "rows": rows,
            "stages": stages,
            "exponent": 0x41804180 if packed.format == "int4" else 0x43004300,
            **more,
        }
        pointers = {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in values.items() if v is not None}
        kernel = _skinny(packed.format, epilogue, columns, split, depth)
        grid = (-(-groups // split.rounds) * split.sharers, 1)
        overlap = overlap and self._tuning.overlap
        arguments = [_Arguments(**pointers)]
        kernel.launch(grid, count, arguments, shared_bytes=limit, overlap=overlap, cluster=split.sharers)

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
        _unpacker(packed.format, self.split).launch(grid, 256, [*arguments, ctypes.c_int(steps)])
        return out[: packed.rows]

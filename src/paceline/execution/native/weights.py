"""All weights of a model in the layout of the kernels, and the C structs that point to them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from paceline.execution.base import MATRICES
from paceline.execution.native import binding
from paceline.execution.native.arena import Arena
from paceline.execution.native.pack import Packed, column_spread, gate_up_order, pack_blocks, pack_float, quantise
from paceline.execution.structure import LeanSpec, Matrix, ModelWeights

_TILE_BYTES = {binding.Q8: 544, binding.Q4: 320}
"""Of 16 outputs and 32 inputs."""
KINDS = {"fp32": binding.FP32, "bf16": binding.BF16, "int8": binding.Q8, "int4": binding.Q4}


class NativeWeights:
    """Holds the memory behind `model`, which is handed to the kernels."""

    def __init__(self, spec: LeanSpec, weights: ModelWeights, precision: str, max_rows: int) -> None:
        """precision: one of KINDS, or two joined by `+`: every layer in both, all computing in the first. Raises ResourceError."""
        narrow, _, wide = precision.partition("+")
        self._spec = spec
        self._keep: list[object] = []  # what the C structs point to
        self._arena = Arena(sum(_bound(spec, part) for part in (narrow, wide) if part))
        self.bytes = 0
        """Of the packed matrices."""
        embed = self._matrix(weights.embedding, narrow, wide=True)
        head = embed if spec.tied else self._matrix(weights.head, narrow, wide=True)
        self._layers = self._build_layers(weights, narrow)
        """What the kernels read; `_narrow` and `_wide` are what it is filled from."""
        self._narrow = (binding.Layer * spec.layers)(*self._layers)
        self._wide = self._build_layers(weights, wide) if wide else None
        self._grades = (binding.Grades * spec.layers)()
        self._spread: list[npt.NDArray[np.float32]] = []
        """What `_grades` points to, once thresholds were asked for."""
        self.model = self._describe(weights, narrow, embed, head, max_rows)

    @property
    def grades(self) -> bool:
        """Whether layers have two precisions."""
        return self._wide is not None

    @property
    def chooses_by_row(self) -> bool:
        """Whether thresholds are set."""
        return bool(self._layers[0].grades)

    def set_grades(self, wide: Sequence[Sequence[bool]]) -> None:
        """Let these matrices compute in the second precision, the others in the first; [layers][4]."""
        assert self._wide is not None
        for i, of_layer in enumerate(wide):
            self._layers[i] = self._narrow[i]
            for name, chosen in zip(MATRICES, of_layer, strict=True):
                setattr(self._layers[i], name, getattr((self._wide if chosen else self._narrow)[i], name))

    def set_thresholds(self, thresholds: npt.NDArray[np.float32]) -> None:
        """Let every row choose for each matrix; [layers, 4]."""
        if not self._spread:
            self._describe_grades()
        for i, of_layer in enumerate(thresholds.tolist()):
            self._grades[i].threshold[:] = of_layer
            self._layers[i] = self._narrow[i]
            self._layers[i].grades = ctypes.pointer(self._grades[i])

    def _describe_grades(self) -> None:
        assert self._wide is not None
        for i, grades in enumerate(self._grades):
            for m, name in enumerate(MATRICES):
                grades.wide[m] = getattr(self._wide[i], name)
                spread = column_spread(_packed(getattr(self._narrow[i], name)), _packed(grades.wide[m]))
                self._spread.append(spread)
                grades.spread[m] = spread.ctypes.data

    def _build_layers(self, weights: ModelWeights, precision: str) -> ctypes.Array[binding.Layer]:
        spec = self._spec
        layers = (binding.Layer * spec.layers)()
        order = gate_up_order(spec.intermediate)
        for i, layer in enumerate(weights.layers):
            local = spec.windows[i] is not None and spec.local_rope is not None
            layers[i] = binding.Layer(
                qkv=self._matrix(layer.qkv, precision),
                o=self._matrix(layer.o, precision),
                gate_up=self._matrix(layer.gate_up, precision, order),
                down=self._matrix(layer.down, precision),
                norm_in=self._vector(layer.attention_norm),
                norm_attn_out=self._vector(layer.attention_out_norm),
                norm_mlp_in=self._vector(layer.mlp_norm),
                norm_mlp_out=self._vector(layer.mlp_out_norm),
                qkv_bias=self._vector(layer.qkv.bias()),
                q_norm=self._vector(layer.q_norm),
                k_norm=self._vector(layer.k_norm),
                window=spec.windows[i] or 0,
                rope=int(local),
            )
        return layers

    def _describe(
        self, weights: ModelWeights, precision: str, embed: binding.Matrix, head: binding.Matrix, max_rows: int
    ) -> binding.Model:
        spec = self._spec
        ropes = [spec.rope] + ([spec.local_rope] if spec.local_rope is not None else [])
        tables = [self._vector(torch.tensor(rope.inv_freq, dtype=torch.float32)) for rope in ropes]
        return binding.Model(
            layers=spec.layers,
            hidden=spec.hidden,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            dim=spec.head_dim,
            intermediate=spec.intermediate,
            vocab=spec.vocab,
            act_kind=KINDS[precision],
            gelu=int(spec.activation == "gelu_tanh"),
            kv_f32=int(precision == "fp32"),
            max_rows=max_rows,
            tables=len(ropes),
            graded=int(self._wide is not None),
            eps=spec.norm_eps,
            attention_scale=spec.attention_scale,
            embed_scale=spec.embed_scale,
            logit_cap=spec.logit_softcap or 0.0,
            embed=embed,
            head=head,
            layer=self._layers,
            final_norm=self._vector(weights.final_norm),
            inv_freq=(ctypes.c_void_p * 2)(*tables),
            rope_scale=(ctypes.c_float * 2)(*(rope.attention_factor for rope in ropes)),
        )

    def _vector(self, values: torch.Tensor | None) -> int | None:
        if values is None:
            return None
        array = np.ascontiguousarray(values.detach().float().numpy())
        self._keep.append(array)
        return int(array.ctypes.data)

    def _matrix(
        self, matrix: Matrix, precision: str, order: npt.NDArray[np.intp] | None = None, wide: bool = False
    ) -> binding.Matrix:
        packed = pack_matrix(matrix, precision, order, wide)
        data = self._arena.add(packed.data)
        self.bytes += packed.data.nbytes
        return binding.Matrix(data=data, n=packed.rows, k=packed.columns, kind=packed.kind, pad=0)


def _bound(spec: LeanSpec, precision: str) -> int:
    """Most bytes that the packed weights can take."""
    hidden, middle = spec.hidden, spec.intermediate
    heads = (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim
    values = spec.layers * (hidden * heads + 3 * hidden * middle) + 2 * (spec.vocab + 16) * hidden
    width = {"fp32": 4.0, "bf16": 2.0}.get(precision, 1.0625)
    return int(width * values) + spec.layers * 64 * 4 * max(hidden, middle)


def _packed(matrix: binding.Matrix) -> Packed:
    """What a C struct points to."""
    size = _TILE_BYTES[matrix.kind] * matrix.k // 32
    tiles = (matrix.n + 15) // 16
    data = np.ctypeslib.as_array((ctypes.c_uint8 * (size * tiles)).from_address(matrix.data))
    return Packed(data.reshape(tiles, size), matrix.n, matrix.k, matrix.kind)


def pack_matrix(matrix: Matrix, precision: str, order: npt.NDArray[np.intp] | None, wide: bool) -> Packed:
    """Pack one matrix for a precision. Embedding and head (`wide`) keep 8 bits at int4; the file's own blocks are kept
    wherever they are as narrow as asked."""
    kind = KINDS[precision]
    if kind in (binding.FP32, binding.BF16):
        return pack_float(matrix.weight(), kind, order)
    bits = 4 if precision == "int4" and not wide else 8
    blocks = matrix.blocks()
    if blocks is not None and blocks.bits == bits and (bits == 4 or np.array_equal(blocks.offsets, -128 * blocks.scales)):
        return pack_blocks(blocks, order)
    return pack_blocks(quantise(matrix.weight(), bits), order)

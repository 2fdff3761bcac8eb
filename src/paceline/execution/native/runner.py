"""The native runner: kernel.c behind the execution contract."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from paceline.errors import ModelError, OptionError, ResourceError
from paceline.execution.base import ForwardOutput, Runner, RunnerInfo, Segment, SequenceHandle
from paceline.execution.native import binding
from paceline.execution.native.arena import Arena
from paceline.execution.native.build import load_library
from paceline.execution.native.pack import Packed, gate_up_order, pack_blocks, pack_float, quantise
from paceline.execution.structure import LeanSpec, Matrix, ModelWeights, describe_structure, merged_weights
from paceline.models.base import ModelSource

MAX_ROWS = 512
"""Rows of one call of the kernels; longer prompts go in pieces."""
MAX_TREE = 64
_FIRST_CAPACITY = 512
_KINDS = {"fp32": binding.FP32, "bf16": binding.BF16, "int8": binding.Q8, "int4": binding.Q4}


@dataclass(slots=True, eq=False)
class NativeSequence:
    """Keys and values of one sequence, in the layout of attention.h."""

    keys: npt.NDArray[np.generic]
    values: npt.NDArray[np.generic]
    capacity: int
    length: int = 0
    keys_at: int = 0
    values_at: int = 0
    """Addresses of the arrays; asking numpy for them costs microseconds, and every round needs them."""

    def __post_init__(self) -> None:
        self.keys_at, self.values_at = self.keys.ctypes.data, self.values.ctypes.data


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NativeRunner(Runner):
    """Runs Llama-like models with the compiled kernels.

    A row's logits have the same bits alone, in a chain, in a tree and in any batch. Keys and values are kept in float16
    (float32 at precision fp32); activations of int8 and int4 models are rounded to 8 bits in groups of 32.
    """

    def __init__(
        self,
        source: ModelSource,
        precision: str,
        threads: int | None = None,
        max_context: int | None = None,
        weights: ModelWeights | None = None,
    ) -> None:
        reason = self.unsupported_reason(source, precision)
        library = load_library()
        if reason is not None or isinstance(library, str):
            raise ModelError(f"native kernels cannot run {source.name}: {reason}")
        spec = describe_structure(source.config)
        assert isinstance(spec, LeanSpec)
        self._library = library
        binding.declare(library)
        self.spec = spec
        self._threads = threads or default_threads()
        context = min(max_context or source.max_context, source.max_context)
        self._kv_dtype = np.float32 if precision == "fp32" else np.uint16
        self._keep: list[object] = []  # what the C structs point to
        self._bytes = 0
        self._arena = Arena(_weights_bound(spec, precision))
        model = self._build_model(weights or merged_weights(source, spec), precision, context)
        self._engine = library.paceline_open(ctypes.byref(model), self._threads, context)
        if not self._engine:
            raise ResourceError("memory: no room for the kernels' work space")
        self.info = RunnerInfo(
            backend="native",
            precision=precision,
            device="cpu",
            vocab_size=spec.vocab,
            max_context=context,
            num_layers=spec.layers,
            fast_paths=("compiled forward", "AVX-512 VNNI" if library.paceline_avx512() else "portable vectors"),
            lost_paths=() if library.paceline_avx512() else ("AVX-512 VNNI: this processor lacks it",),
            deterministic_rows=True,
            weight_bytes=self._bytes,
            extra={
                "threads": str(self._threads),
                "kv": "float32" if precision == "fp32" else "float16",
                "kernel": Path(library._name).stem,
            },
        )
        self._make_buffers()
        self._spare: list[NativeSequence] = []

    @staticmethod
    def unsupported_reason(source: ModelSource, precision: str) -> str | None:
        """Why the kernels cannot run this model in this precision here; None if they can."""
        if precision not in _KINDS:
            return f"precision {precision!r} is unknown"
        spec = describe_structure(source.config)
        if isinstance(spec, str):
            return spec
        for name, value in (
            ("hidden", spec.hidden),
            ("intermediate", spec.intermediate),
            ("heads x dim", spec.heads * spec.head_dim),
        ):
            if value % 32:
                return f"{name} = {value} is not a multiple of 32"
        if spec.head_dim % 16:
            return f"head_dim = {spec.head_dim} is not a multiple of 16"
        if spec.o_bias or spec.mlp_bias:
            return "biases outside q, k and v are not known to the kernels"
        if spec.attention_softcap is not None or spec.activation == "gelu":
            return "attention soft-capping or the exact gelu is not known to the kernels"
        library = load_library()
        return library if isinstance(library, str) else None

    # ---------- building ----------

    def _build_model(self, weights: ModelWeights, precision: str, context: int) -> binding.Model:
        spec = self.spec
        embed = self._matrix(weights.embedding, precision, wide=True)
        head = embed if spec.tied else self._matrix(weights.head, precision, wide=True)
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
        ropes = [spec.rope] + ([spec.local_rope] if spec.local_rope is not None else [])
        tables = [self._vector(torch.tensor(rope.inv_freq, dtype=torch.float32)) for rope in ropes]
        self._keep.append(layers)
        return binding.Model(
            layers=spec.layers,
            hidden=spec.hidden,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            dim=spec.head_dim,
            intermediate=spec.intermediate,
            vocab=spec.vocab,
            act_kind=_KINDS[precision],
            gelu=int(spec.activation == "gelu_tanh"),
            kv_f32=int(precision == "fp32"),
            max_rows=MAX_ROWS,
            tables=len(ropes),
            eps=spec.norm_eps,
            attention_scale=spec.attention_scale,
            embed_scale=spec.embed_scale,
            logit_cap=spec.logit_softcap or 0.0,
            embed=embed,
            head=head,
            layer=layers,
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
        self._bytes += packed.data.nbytes
        return binding.Matrix(data=data, n=packed.rows, k=packed.columns, kind=packed.kind, pad=0)

    def _make_buffers(self) -> None:
        self._tokens = np.zeros(MAX_ROWS, np.int32)
        self._positions = np.zeros(MAX_ROWS, np.int32)
        self._ancestors = np.zeros(MAX_ROWS, np.uint64)
        self._wanted = np.zeros(MAX_ROWS, np.int32)
        self._logits = torch.empty(0, self.spec.vocab)
        self._hidden = torch.empty(0, self.spec.hidden)
        self._best = np.zeros(0, np.int32)
        self._best_at = 0
        self._segments = (binding.Segment * MAX_ROWS)()
        self._batch = binding.Batch(
            tokens=self._tokens.ctypes.data,
            positions=self._positions.ctypes.data,
            ancestors=self._ancestors.ctypes.data,
            segment=self._segments,
            logit_row=self._wanted.ctypes.data,
        )

    # ---------- sequences ----------

    def open(self) -> NativeSequence:
        if self._spare:
            sequence = self._spare.pop()
            sequence.length = 0
            return sequence
        return self._allocate(min(_FIRST_CAPACITY, self._slots(self.info.max_context)))

    def _slots(self, length: int) -> int:
        """Capacity for `length` committed tokens and a tree beyond them, in whole blocks of 16."""
        return (length + MAX_TREE + 15) // 16 * 16

    def _allocate(self, capacity: int) -> NativeSequence:
        regions = self.spec.layers * self.spec.kv_heads
        try:
            keys = np.zeros((regions, capacity // 16, self.spec.head_dim, 16), self._kv_dtype)
            values = np.zeros((regions, capacity, self.spec.head_dim), self._kv_dtype)
        except MemoryError as error:
            raise ResourceError(f"memory: no room for a cache of {capacity} tokens; lower max_context") from error
        return NativeSequence(keys, values, capacity)

    def _grow(self, sequence: NativeSequence, slots: int) -> None:
        if slots <= sequence.capacity:
            return
        limit = self._slots(self.info.max_context)
        if slots > limit:
            raise ResourceError(f"context: {slots} tokens exceed max_context = {self.info.max_context}")
        larger = self._allocate(min(max(2 * sequence.capacity, math.ceil(slots / 16) * 16), limit))
        larger.keys[:, : sequence.keys.shape[1]] = sequence.keys
        larger.values[:, : sequence.capacity] = sequence.values
        sequence.keys, sequence.values, sequence.capacity = larger.keys, larger.values, larger.capacity
        sequence.keys_at, sequence.values_at = larger.keys_at, larger.values_at

    def fork(self, sequence: SequenceHandle) -> NativeSequence:
        held = cast(NativeSequence, sequence)
        return NativeSequence(held.keys.copy(), held.values.copy(), held.capacity, held.length)

    def accept(self, sequence: SequenceHandle, rows: Sequence[int]) -> None:
        held = cast(NativeSequence, sequence)
        base = held.length
        for to, row in enumerate(rows):
            if row != to:
                segment = self._describe(held, 0, 1, False)
                self._library.paceline_move_slot(self._engine, ctypes.byref(segment), base + row, base + to)
        held.length = base + len(rows)

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        held = cast(NativeSequence, sequence)
        if not 0 <= length <= held.length:
            raise OptionError(f"length = {length}: must be between 0 and the committed {held.length} tokens")
        held.length = length

    def close(self, sequence: SequenceHandle) -> None:
        held = cast(NativeSequence, sequence)
        if len(self._spare) < 2 and not any(held is other for other in self._spare):
            self._spare.append(held)  # its pages are already there for the next request

    def shutdown(self) -> None:
        """End the worker threads; the runner is unusable afterwards."""
        if self._engine:
            self._library.paceline_close(self._engine)
            self._engine = None

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self.shutdown()

    # ---------- the forward ----------

    runs_parts = True

    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        return self._forward(segments, want_hidden, self.spec.layers, None)

    def forward_part(self, segments: Sequence[Segment], *, layers: int | None = None, skip: bytes | None = None) -> ForwardOutput:
        return self._forward(segments, False, self.spec.layers if layers is None else layers, skip)

    def _forward(self, segments: Sequence[Segment], want_hidden: bool, layers: int, skip: bytes | None) -> ForwardOutput:
        wanted = [len(s.tokens) if s.num_logits is None else s.num_logits for s in segments]
        total = sum(wanted)
        self._reserve(total, want_hidden)
        self._batch.run_layers = layers
        self._batch.skip = ctypes.cast(ctypes.c_char_p(skip), ctypes.c_void_p) if skip is not None else None
        rows = done = count = asked = 0  # of the call being put together
        for segment, logit_rows in zip(segments, wanted, strict=True):
            size = len(segment.tokens)
            if segment.parents is not None and size > MAX_TREE:
                raise OptionError(f"tree of {size} tokens: at most {MAX_TREE} (the pending token included)")
            start = 0
            while start < size:  # a long chain goes in pieces
                piece = min(size - start, MAX_ROWS - rows)
                if rows and ((piece < size - start and segment.parents is not None) or piece == 0):
                    done += self._run(rows, count, asked, done, want_hidden)
                    rows = count = asked = 0
                    continue
                first_asked = max(size - logit_rows, start)
                asked = self._put(segment, start, piece, rows, count, first_asked, asked)
                rows, count, start = rows + piece, count + 1, start + piece
        if rows:
            self._run(rows, count, asked, done, want_hidden)
        hidden = self._hidden[:total] if want_hidden else None
        return ForwardOutput(self._logits[:total], hidden, self._best[:total].tolist())

    def _reserve(self, rows: int, want_hidden: bool) -> None:
        if rows > self._logits.shape[0]:
            self._logits = torch.empty(rows, self.spec.vocab)
            self._best = np.zeros(rows, np.int32)
            self._best_at = self._best.ctypes.data
        if want_hidden and rows > self._hidden.shape[0]:
            self._hidden = torch.empty(rows, self.spec.hidden)

    def _describe(self, held: NativeSequence, first_row: int, rows: int, is_tree: bool, offset: int = 0) -> binding.Segment:
        return binding.Segment(held.keys_at, held.values_at, held.capacity, held.length + offset, first_row, rows, int(is_tree), 0)

    def _put(self, segment: Segment, start: int, piece: int, row: int, index: int, first_asked: int, asked: int) -> int:
        """Write tokens start..start + piece of a segment into the call's buffers; returns the new count of asked rows."""
        held = cast(NativeSequence, segment.sequence)
        base = held.length + start
        if base + piece > self.info.max_context + MAX_TREE:
            raise ResourceError(f"context: {base + piece} tokens exceed max_context = {self.info.max_context}")
        self._grow(held, base + piece)
        self._tokens[row : row + piece] = segment.tokens[start : start + piece]
        if segment.parents is None:
            self._positions[row : row + piece] = range(base, base + piece)
        else:
            bits: list[int] = []
            depth: list[int] = []
            for i, parent in enumerate(segment.parents):
                bits.append(1 << i | (bits[parent] if parent >= 0 else 0))
                depth.append(depth[parent] + 1 if parent >= 0 else 0)
            self._ancestors[row : row + piece] = bits
            self._positions[row : row + piece] = [base + d for d in depth]
        self._segments[index] = self._describe(held, row, piece, segment.parents is not None, start)
        new = max(0, start + piece - first_asked)
        self._wanted[asked : asked + new] = range(row + piece - new, row + piece)
        return asked + new

    def _run(self, rows: int, count: int, asked: int, done: int, want_hidden: bool) -> int:
        batch = self._batch
        batch.rows, batch.segments, batch.logit_rows = rows, count, asked
        if asked:
            batch.logits = self._logits.data_ptr() + done * self.spec.vocab * 4
            batch.best = self._best_at + done * 4
            batch.hidden = self._hidden.data_ptr() + done * self.spec.hidden * 4 if want_hidden else None
        self._library.paceline_forward(self._engine, ctypes.byref(batch))
        return asked


def _weights_bound(spec: LeanSpec, precision: str) -> int:
    """Most bytes that the packed weights can take."""
    hidden, middle = spec.hidden, spec.intermediate
    heads = (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim
    values = spec.layers * (hidden * heads + 3 * hidden * middle) + 2 * (spec.vocab + 16) * hidden
    width = {"fp32": 4.0, "bf16": 2.0}.get(precision, 1.0625)
    return int(width * values) + spec.layers * 64 * 4 * max(hidden, middle)


def pack_matrix(matrix: Matrix, precision: str, order: npt.NDArray[np.intp] | None, wide: bool) -> Packed:
    """Pack one matrix for a precision. Embedding and head (`wide`) keep 8 bits at int4; the file's own blocks are kept
    wherever they are as narrow as asked."""
    kind = _KINDS[precision]
    if kind in (binding.FP32, binding.BF16):
        return pack_float(matrix.weight(), kind, order)
    bits = 4 if precision == "int4" and not wide else 8
    blocks = matrix.blocks()
    if blocks is not None and blocks.bits == bits and (bits == 4 or np.array_equal(blocks.offsets, -128 * blocks.scales)):
        return pack_blocks(blocks, order)
    return pack_blocks(quantise(matrix.weight(), bits), order)

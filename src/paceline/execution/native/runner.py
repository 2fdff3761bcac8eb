"""The native runner: kernel.c behind the execution contract."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from paceline.errors import ModelError, OptionError, ResourceError
from paceline.execution.base import (
    ForwardOutput,
    Runner,
    RunnerInfo,
    Segment,
    SequenceHandle,
    check_gather,
    check_grades,
    check_thresholds,
)
from paceline.execution.native import binding
from paceline.execution.native.arena import zeros
from paceline.execution.native.build import load_library, name_of
from paceline.execution.native.drawing import Drawer
from paceline.execution.native.sequence import NativeSequence, copy_rows, keys_of
from paceline.execution.native.weights import KINDS, NativeWeights
from paceline.execution.structure import LeanSpec, ModelWeights, describe_structure, merged_weights
from paceline.models.base import ModelSource

MAX_ROWS = 512
"""Rows of one call of the kernels; longer prompts go in pieces."""
MAX_TREE = 64
VECTORS = {16: "AVX-512 VNNI", 8: "AVX2", 4: "portable vectors"}
"""What the kernels were compiled for, by the lanes of a vector."""
_FIRST_CAPACITY = 512
_BLOCK = 32
"""Capacities are multiples of these slots: the matrix unit reads so many values at once, with weight zero behind the last."""


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NativeRunner(Runner):
    """Runs Llama-like models with the compiled kernels.

    precision: one of the four, or `int4+int8` (either order) for layers of two grades (`set_grades`).
    A row's logits have the same bits alone, in a chain, in a tree and in any batch. Keys and values are kept in bfloat16
    (float32 at precision fp32); activations of int8 and int4 models are rounded to 8 bits in groups of 32.
    """

    host_threads = 1
    cold_rounds = 4

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
        self._weights = NativeWeights(spec, weights or merged_weights(source, spec), precision, MAX_ROWS)
        self.grades, self.matrix_weights = self._weights.grades, spec.matrix_weights
        self._engine = self._open_engine(context)
        lanes = library.paceline_lanes()
        tiles = ("attention by the matrix unit (AMX)",) if library.paceline_tiled(self._engine) else ()
        self.info = RunnerInfo(
            backend="native",
            precision=precision,
            device="cpu",
            vocab_size=spec.vocab,
            max_context=context,
            num_layers=spec.layers,
            fast_paths=("compiled forward", VECTORS[lanes], *tiles),
            lost_paths=() if lanes == 16 else (f"{VECTORS[16]}: this processor lacks it",),
            deterministic_rows=True,
            weight_bytes=self._weights.bytes,
            extra={
                "threads": str(self._threads),
                "kv": "float32" if precision == "fp32" else "bfloat16",
                "kernel": name_of(library),
            },
        )
        if set(precision.split("+")) <= {"int4", "int8"}:
            self.prompt_end = (48, 8)
        self._make_buffers()
        self._spare: list[NativeSequence] = []

    def _open_engine(self, context: int) -> int:
        engine = self._library.paceline_open(ctypes.byref(self._weights.model), self._threads, context)
        if not engine:
            raise ResourceError("memory: no room for the kernels' work space")
        return int(engine)

    def adopt_cache(self, other: Runner) -> bool:
        if not isinstance(other, NativeRunner):
            return False
        shapes = [(spec.layers, spec.kv_heads, spec.head_dim, spec.windows) for spec in (self.spec, other.spec)]
        if shapes[0] != shapes[1] or self.info.max_context != other.info.max_context:
            return False
        if self._kv_dtype != other._kv_dtype:
            self._kv_dtype = other._kv_dtype
            self._weights.model.kv_f32 = other._weights.model.kv_f32
            self.shutdown()
            self._engine = self._open_engine(self.info.max_context)
            self.info.extra["kv"] = other.info.extra["kv"]
        self._spare.clear()
        return True

    @staticmethod
    def unsupported_reason(source: ModelSource, precision: str) -> str | None:
        """Why the kernels cannot run this model in this precision here; None if they can."""
        parts = precision.split("+")
        if any(part not in KINDS for part in parts):
            return f"precision {precision!r} is unknown"
        if len(parts) > 1 and set(parts) != {"int4", "int8"}:
            return f"precision {precision!r}: only int4 and int8 layers can be mixed, whose inputs are rounded alike"
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

    def set_grades(self, wide: Sequence[Sequence[bool]]) -> None:
        check_grades(wide, self)
        self._weights.set_grades(wide)

    def set_thresholds(self, thresholds: torch.Tensor) -> None:
        self._weights.set_thresholds(check_thresholds(thresholds, self).numpy())

    def rounding_errors(self, tokens: Sequence[int]) -> torch.Tensor:
        if len(tokens) > MAX_ROWS or not self._weights.chooses_by_row:
            raise OptionError(f"tokens: {len(tokens)} given, at most {MAX_ROWS}; and thresholds must be set first")
        errors = torch.zeros(len(tokens), self.spec.layers, 4)
        sequence = self.open()
        self._batch.errors = errors.data_ptr()
        try:
            self.forward([Segment(sequence, tokens, num_logits=0)])
        finally:
            self._batch.errors = None
            self.close(sequence)
        return errors

    def _make_buffers(self) -> None:
        # Plain arrays of ctypes: after a forward caches are cold, and numpy and torch take long for a few numbers.
        self._tokens, self._parents, self._wanted = ((ctypes.c_int32 * MAX_ROWS)() for _ in range(3))
        self._logits = torch.empty(0, self.spec.vocab)
        self._hidden = torch.empty(0, self.spec.hidden)
        self._room = 0
        self._reserve(1, False)
        self._segments = (binding.Segment * MAX_ROWS)()
        self._drawer = Drawer(self._library, self.spec.vocab)
        self._batch = binding.Batch(
            tokens=ctypes.addressof(self._tokens),
            parents=ctypes.addressof(self._parents),
            segment=self._segments,
        )
        self._batch_at = ctypes.byref(self._batch)

    # ---------- sequences ----------

    def open(self) -> NativeSequence:
        if self._spare:
            sequence = self._spare.pop()
            sequence.length = sequence.shift = 0
            return sequence
        return self._allocate(min(_FIRST_CAPACITY, self._slots(self.info.max_context)))

    def _slots(self, length: int) -> int:
        """Capacity for `length` committed tokens and a tree beyond them, in whole blocks."""
        return math.ceil((length + MAX_TREE) / _BLOCK) * _BLOCK

    def _allocate(self, capacity: int) -> NativeSequence:
        regions = self.spec.layers * self.spec.kv_heads
        pair = 1 if self._kv_dtype == np.float32 else 2
        try:
            keys = zeros((regions, capacity // 16, self.spec.head_dim // pair, 16, pair), self._kv_dtype)
            values = zeros((regions, capacity // pair, self.spec.head_dim, pair), self._kv_dtype)
        except (MemoryError, ResourceError) as error:
            raise ResourceError(f"memory: no room for a cache of {capacity} tokens; lower max_context") from error
        return NativeSequence(keys, values, capacity)

    def _grow(self, sequence: NativeSequence, slots: int) -> None:
        if slots <= sequence.capacity:
            return
        limit = self._slots(self.info.max_context)
        if slots > limit:
            raise ResourceError(f"context: {slots} tokens exceed max_context = {self.info.max_context}")
        larger = self._allocate(min(max(2 * sequence.capacity, math.ceil(slots / _BLOCK) * _BLOCK), limit))
        larger.keys[:, : sequence.keys.shape[1]] = sequence.keys
        larger.values[:, : sequence.values.shape[1]] = sequence.values
        sequence.keys, sequence.values, sequence.capacity = larger.keys, larger.values, larger.capacity
        sequence.keys_at, sequence.values_at = larger.keys_at, larger.values_at

    def fork(self, sequence: SequenceHandle) -> NativeSequence:
        held = cast(NativeSequence, sequence)
        return NativeSequence(held.keys.copy(), held.values.copy(), held.capacity, held.length, held.shift)

    gathers = True

    def gather(self, sequence: SequenceHandle, rows: torch.Tensor) -> NativeSequence:
        held, spec = cast(NativeSequence, sequence), self.spec
        chosen = check_gather(rows, held.length, (spec.layers, spec.kv_heads)).numpy()
        count = chosen.shape[-1]
        if any(spec.windows):
            chosen = chosen.copy()
            chosen[[window is not None for window in spec.windows]] = np.arange(held.length - count, held.length)
        copy = self._allocate(self._slots(count))
        copy.shift = held.shift + held.length - count
        copy_rows(held, chosen.reshape(-1, count), copy)
        return copy

    def follow(self, copy: SequenceHandle, sequence: SequenceHandle) -> None:
        part, held = cast(NativeSequence, copy), cast(NativeSequence, sequence)
        first = part.length + part.shift - held.shift
        if first > held.length:
            raise OptionError(f"sequence: has {held.length} tokens, its copy has seen {first}; truncate the copy first")
        self._grow(part, part.length + held.length - first)
        copy_rows(held, np.broadcast_to(np.arange(first, held.length), (len(held.keys), held.length - first)), part)

    def attention_mass(self, sequence: SequenceHandle, tokens: Sequence[int]) -> torch.Tensor:
        held, end = cast(NativeSequence, sequence), sequence.length
        mass = np.zeros((self.spec.layers, self.spec.kv_heads, end), np.float32)
        self._batch.mass, self._batch.mass_stride = mass.ctypes.data, end
        held.length -= len(tokens)
        try:
            self.forward([Segment(held, tokens, num_logits=0)])  # writes what is there already, bit for bit
        finally:
            held.length, self._batch.mass = end, None
        return torch.from_numpy(mass)

    def read_keys(self, sequence: SequenceHandle, layer: int) -> torch.Tensor:
        return keys_of(cast(NativeSequence, sequence), self.spec.kv_heads, layer)

    def accept(self, sequence: SequenceHandle, rows: Sequence[int]) -> None:
        held = cast(NativeSequence, sequence)
        base = held.length
        for to, row in enumerate(rows):
            if row != to:
                self._describe(0, held, base, 0, 1, False)
                self._library.paceline_move_slot(self._engine, self._segments, base + row, base + to)
        held.length = base + len(rows)

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        held = cast(NativeSequence, sequence)
        if not 0 <= length <= held.length:
            raise OptionError(f"length = {length}: must be between 0 and the committed {held.length} tokens")
        held.length = length

    def close(self, sequence: SequenceHandle) -> None:
        held = cast(NativeSequence, sequence)
        if len(self._spare) < 2 and not held.shift and not any(held is other for other in self._spare):
            self._spare.append(held)  # its pages are already there for the next request

    def shutdown(self) -> None:
        """End the worker threads; the runner is unusable afterwards."""
        if self._engine:
            self._library.paceline_close(self._engine)
            self._engine = 0

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self.shutdown()

    # ---------- the forward ----------

    runs_parts = draws_rows = True

    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        return self._forward(segments, want_hidden, self.spec.layers, None)

    def forward_part(self, segments: Sequence[Segment], *, layers: int | None = None, skip: bytes | None = None) -> ForwardOutput:
        return self._forward(segments, False, self.spec.layers if layers is None else layers, skip)

    has_taps = True

    def forward_tapped(self, segments: Sequence[Segment], layers: Sequence[int]) -> ForwardOutput:
        taps = torch.empty(sum(len(s.tokens) for s in segments), len(layers), self.spec.hidden)
        tap_layer = np.array(layers, np.int32)
        batch = self._batch
        batch.tap_layer, batch.taps, batch.num_taps = tap_layer.ctypes.data, taps.data_ptr(), len(layers)
        try:
            return replace(self._forward(segments, False, self.spec.layers, None), taps=taps)
        finally:
            batch.num_taps = 0

    def _forward(self, segments: Sequence[Segment], want_hidden: bool, layers: int, skip: bytes | None) -> ForwardOutput:
        wanted = [len(s.tokens) if s.num_logits is None else s.num_logits for s in segments]
        total = sum(wanted)
        self._drawer.forwards += 1
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
        logits, best = self._rows[total], self._best[:total]
        drawn, mass = self._drawer.rows(self._logits_at, best, segments, wanted)
        return ForwardOutput(logits, hidden, best, drawn, mass)

    def _reserve(self, rows: int, want_hidden: bool) -> None:
        if rows > self._room:
            self._room = rows
            self._logits = torch.empty(rows, self.spec.vocab)
            self._rows = [self._logits[:count] for count in range(rows + 1)]
            self._logits_at = self._logits.data_ptr()
            self._best = (ctypes.c_int32 * rows)()
            self._best_at = ctypes.addressof(self._best)
        if want_hidden and rows > self._hidden.shape[0]:
            self._hidden = torch.empty(rows, self.spec.hidden)

    def _describe(self, index: int, held: NativeSequence, base: int, first_row: int, rows: int, is_tree: bool) -> None:
        """Write a `binding.Segment` of the call."""
        place = index * binding.SEGMENT.size
        at = held.keys_at, held.values_at
        binding.SEGMENT.pack_into(self._segments, place, *at, held.capacity, base, first_row, rows, is_tree, held.shift)

    def _put(self, segment: Segment, start: int, piece: int, row: int, index: int, first_asked: int, asked: int) -> int:
        """Write tokens start..start + piece of a segment into the call's buffers; returns the new count of asked rows."""
        held = cast(NativeSequence, segment.sequence)
        base = held.length + start
        if base + piece > self.info.max_context + MAX_TREE:
            raise ResourceError(f"context: {base + piece} tokens exceed max_context = {self.info.max_context}")
        self._grow(held, base + piece)
        self._tokens[row : row + piece] = list(segment.tokens[start : start + piece])
        if segment.parents is not None:
            self._parents[row : row + piece] = list(segment.parents)
        self._describe(index, held, base, row, piece, segment.parents is not None)
        new = max(0, start + piece - first_asked)
        if new != piece or asked != row:  # else simply the first rows, as far as it goes
            if asked == row:
                self._wanted[:asked] = list(range(asked))
            self._wanted[asked : asked + new] = list(range(row + piece - new, row + piece))
        return asked + new

    def _run(self, rows: int, count: int, asked: int, done: int, want_hidden: bool) -> int:
        batch = self._batch
        batch.rows, batch.segments, batch.logit_rows = rows, count, asked
        batch.logit_row = None if asked == rows else ctypes.addressof(self._wanted)
        if asked:
            batch.logits = self._logits_at + done * self.spec.vocab * 4
            batch.best = self._best_at + done * 4
            batch.hidden = self._hidden.data_ptr() + done * self.spec.hidden * 4 if want_hidden else None
        self._library.paceline_forward(self._engine, self._batch_at)
        if batch.num_taps:
            batch.taps += rows * batch.num_taps * self.spec.hidden * 4
        return asked

"""The GPU runner: one captured graph a forward for up to 64 rows, torch operators for prompts (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from paceline.errors import ModelError, OptionError, ResourceError
from paceline.execution.base import ForwardOutput, Runner, RunnerInfo, Segment, SequenceHandle
from paceline.execution.cuda.capture import Graphs, Layout, Rows, Shape, bucket, chunk_size, power_of_two
from paceline.execution.cuda.decoder import Decoder, misfit
from paceline.execution.cuda.driver import missing_reason
from paceline.execution.cuda.linears import MAX_ROWS, Tuning
from paceline.execution.cuda.memory import Budget, plan
from paceline.execution.cuda.packing import FORMATS
from paceline.execution.cuda.paging import PAGE, PagedCache, PagedSequence
from paceline.execution.structure import describe_structure, merged_weights
from paceline.models.base import ModelSource

_MAX_SEQUENCES = 64
_FULL_SEQUENCES = 32
"""Sequences of full length that the cache has room for, if memory allows."""
_CACHE_SHARE = 0.5
"""Of the memory that weights leave, for the cache: a draft, another model or a trainer may come."""
MAX_STEPS = 64


@dataclass(frozen=True, slots=True)
class GreedySteps:
    """What `CudaRunner.greedy_steps` decoded."""

    tokens: list[list[int]]
    """[sequences][steps]."""
    evidence: list[list[tuple[float, float, float]]]
    """[sequences][steps]: largest probability (the token's own), entropy in nats and margin, at temperature 1."""


class CudaRunner(Runner):
    """Runs Llama-like models in `bf16`, `int8`, `fp8` or `int4`. A row's logits have the same bits in any batch, chain or tree."""

    @staticmethod
    def unsupported_reason(source: ModelSource, precision: str) -> str | None:
        """Why this model cannot run here, or None."""
        if precision not in FORMATS:
            return f"precision = {precision!r} is not one of {', '.join(FORMATS)}"
        spec = describe_structure(source.config)
        if isinstance(spec, str):
            return spec
        return misfit(spec) or _missing_part()

    def __init__(
        self,
        source: ModelSource,
        precision: str = "bf16",
        device: str = "cuda",
        max_context: int | None = None,
        *,
        memory_bytes: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Load, fold and pack the weights, and give the cache its memory.

        memory_bytes: what this model may use in all; None: what is free, half of what the weights leave for the cache.
        On device `cpu` everything goes through torch operators: slow, for tests. Raises ModelError, ResourceError.
        """
        spec = describe_structure(source.config)
        reason = spec if isinstance(spec, str) else misfit(spec)
        if reason is not None or isinstance(spec, str):
            raise ModelError(f"{source.name}: {reason}; use backend = 'hf'")
        self._device = torch.device(device)
        self._spec = spec
        self.budget: Budget
        """What the device's memory was given to."""
        limit = min(source.max_context, max_context or source.max_context)
        free = memory_bytes if memory_bytes is not None else _free_bytes(self._device)
        with torch.inference_mode(), self._here():
            try:
                self._decoder = Decoder(merged_weights(source, spec), spec, precision, limit, self._device, tuning or Tuning())
            except torch.OutOfMemoryError as error:
                raise ResourceError(
                    f"{source.name}: weights do not fit on {self._device}; choose precision int8 or int4, or leave the draft out"
                ) from error
            self.budget = self._make_cache(free, limit)
        self._graphs = Graphs()
        self._steps: _Steps | None = None
        self.info = RunnerInfo(
            backend="cuda",
            precision=precision,
            device=str(self._device),
            vocab_size=spec.vocab,
            max_context=limit,
            num_layers=spec.layers,
            fast_paths=("packed linears", "split attention", "captured graphs") if self._captures else (),
            lost_paths=() if self._captures else ("all kernels: the device is no GPU",),
            deterministic_rows=self._captures,
            weight_bytes=self._decoder.weight_bytes,
        )

    @property
    def _captures(self) -> bool:
        return self._device.type == "cuda"

    def _make_cache(self, free: int, limit: int) -> Budget:
        spec, decoder = self._spec, self._decoder
        page_bytes = 2 * spec.layers * spec.kv_heads * PAGE * spec.head_dim * 2
        chunks = self._chunks_of(limit)
        buffers = 4 * MAX_ROWS * (spec.heads * chunks * (spec.head_dim + 2) + decoder.logits.shape[1])
        weights = decoder.weight_bytes + decoder.embedding.numel() * 2 + decoder.rotary.numel() * 4
        full = -(-limit // PAGE)
        shared = int((free - weights - buffers) * _CACHE_SHARE) // page_bytes
        budget = plan(free, weights, buffers, page_bytes, max(full, min(_FULL_SEQUENCES * full, shared)), full)
        pages = budget.cache // page_bytes
        self._cache = PagedCache(spec.layers, spec.kv_heads, spec.head_dim, pages, limit, _MAX_SEQUENCES, self._device)
        self._layout = Layout(self._cache.tables, spec.heads, spec.head_dim, chunks if self._captures else 1)
        self._best: Any = None
        if self._captures:
            from paceline.execution.cuda.fused import BestToken

            self._best = BestToken(MAX_ROWS, spec.vocab, self._device)
        return budget

    # ---------- the contract ----------

    def open(self) -> PagedSequence:
        return self._cache.open()

    def fork(self, sequence: SequenceHandle) -> PagedSequence:
        with torch.inference_mode(), self._here():
            return self._cache.fork(self._own(sequence))

    def accept(self, sequence: SequenceHandle, rows: Sequence[int]) -> None:
        with torch.inference_mode(), self._here():
            self._cache.accept(self._own(sequence), rows)

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        self._cache.truncate(self._own(sequence), length)

    def close(self, sequence: SequenceHandle) -> None:
        if isinstance(sequence, PagedSequence):
            self._cache.close(sequence)

    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        self._check(segments)
        with torch.inference_mode(), self._here():
            try:
                for segment in segments:
                    self._cache.stage(self._own(segment.sequence), len(segment.tokens))
                passes = self._passes(segments)
                parts = [self._pass(part, want_hidden, keep=len(passes) > 1) for part in passes]
            except torch.OutOfMemoryError as error:
                raise ResourceError(
                    f"{self._device}: out of memory in a forward ({self.budget}); use fewer sequences or shorter prompts"
                ) from error
        if len(parts) == 1:
            return parts[0]
        hidden = torch.cat([p.hidden for p in parts if p.hidden is not None]) if want_hidden else None
        known = [p.best for p in parts if p.best is not None]
        best = [token for tokens in known for token in tokens] if len(known) == len(parts) else None
        return ForwardOutput(torch.cat([p.logits for p in parts]), hidden, best)

    def greedy_steps(self, sequences: Sequence[SequenceHandle], tokens: Sequence[int], steps: int) -> GreedySteps:
        """Decode greedily on the device: feed each sequence its token, then `steps` - 1 times its most probable next one.

        Commits the fed tokens (`steps` a sequence); the last decoded one is not fed. One wait for the device in all.
        Raises OptionError, ResourceError.
        """
        if not 1 <= steps <= MAX_STEPS or not 1 <= len(sequences) <= MAX_ROWS or not self._captures:
            raise OptionError(
                f"steps = {steps}, sequences = {len(sequences)}: 1 to {MAX_STEPS} steps of 1 to {MAX_ROWS} sequences, on a GPU"
            )
        own = [self._own(sequence) for sequence in sequences]
        self._check([Segment(sequence, [token]) for sequence, token in zip(own, tokens, strict=True)])
        with torch.inference_mode(), self._here():
            if self._steps is None:
                self._steps = _Steps(self._device)
            for sequence in own:
                self._cache.stage(sequence, steps)
            batch = [Rows(s.slot, s.committed, [token], None) for s, token in zip(own, tokens, strict=True)]
            shape = self._shape(batch, longest=max(s.committed for s in own) + steps)
            self._graphs.replay(("steps", shape), partial(self._step, shape), self._clear, partial(self._fill_steps, batch, shape))
            for _ in range(steps - 1):
                self._graphs.again(("steps", shape))
            result = self._steps.read(steps, len(own))
            for sequence in own:
                self._cache.accept(sequence, range(steps))
        return result

    def shutdown(self) -> None:
        """Give the device's memory back; the runner is of no use afterwards."""
        del self._graphs, self._decoder, self._cache, self._layout, self._best

    # ---------- passes ----------

    def _passes(self, segments: Sequence[Segment]) -> list[list[Segment]]:
        """Segments that share a pass: 64 rows at most, or one long segment alone (so that nothing depends on its company)."""
        passes: list[list[Segment]] = []
        room = 0
        for segment in segments:
            count = len(segment.tokens)
            if count > room:
                passes.append([])
                room = MAX_ROWS if self._captures else 0
            passes[-1].append(segment)
            room -= count
        return passes

    def _pass(self, segments: list[Segment], want_hidden: bool, keep: bool) -> ForwardOutput:
        """keep: the result must outlive the next pass."""
        first = segments[0]
        if len(first.tokens) > MAX_ROWS or not self._captures:
            sequence = self._own(first.sequence)
            logits, hidden = self._decoder.dense(first.tokens, sequence, self._cache, first.parents, _wanted(first))
            return ForwardOutput(logits, hidden if want_hidden else None)
        batch = [self._rows(segment) for segment in segments]
        shape = self._shape(batch)
        run = partial(self._decoder.kernels, self._layout, self._cache, shape, self._best)
        self._graphs.replay(shape, run, self._clear, partial(self._layout.fill, batch, shape))
        rows: list[int] = []
        start = 0
        for segment in segments:
            end = start + len(segment.tokens)
            rows.extend(range(end - _wanted(segment), end))
            start = end
        logits = self._decoder.logits[:start, : self._spec.vocab]
        states = self._decoder.hidden(start) if want_hidden else None
        best = self._best.tokens[:start].tolist() if rows else []  # waits for the device
        if len(rows) < start:
            index = torch.tensor(rows, dtype=torch.int64, device=self._device)
            logits, best = logits[index], [best[row] for row in rows]
            states = states[index] if states is not None else None
        return ForwardOutput(logits.clone() if keep else logits, states, best)

    def _rows(self, segment: Segment) -> Rows:
        sequence = self._own(segment.sequence)
        return Rows(sequence.slot, sequence.committed, segment.tokens, segment.parents)

    def _shape(self, batch: Sequence[Rows], longest: int = 0) -> Shape:
        from paceline.execution.cuda.attention import block_tokens

        counts = [len(rows.tokens) for rows in batch]
        tokens = block_tokens(self._spec.heads // self._spec.kv_heads, max(counts))
        blocks = power_of_two(sum(-(-count // tokens) for count in counts))
        end = max(longest, *(rows.length + len(rows.tokens) for rows in batch))
        return Shape(bucket(sum(counts)), min(blocks, MAX_ROWS), tokens, power_of_two(self._chunks_of(end)))

    def _chunks_of(self, length: int) -> int:
        """Chunks of keys in attention's grid that serve rows at positions below `length`."""
        return max(1, -(-(length // PAGE * PAGE) // chunk_size(self._spec.head_dim)))

    def _step(self, shape: Shape) -> None:
        """A forward whose best tokens are the next step's input (to be captured)."""
        assert self._steps is not None
        self._decoder.kernels(self._layout, self._cache, shape, self._best)
        self._steps.advance(self._best, self._layout, shape.rows)

    def _fill_steps(self, batch: Sequence[Rows], shape: Shape) -> None:
        assert self._steps is not None
        self._steps.reset()
        self._layout.fill(batch, shape)

    def _clear(self) -> None:
        self._layout.clear()

    # ---------- checks ----------

    def _own(self, sequence: SequenceHandle) -> PagedSequence:
        if not isinstance(sequence, PagedSequence):
            raise OptionError(f"sequence = {sequence!r}: opened by another runner")
        return sequence

    def _check(self, segments: Sequence[Segment]) -> None:
        if len({id(segment.sequence) for segment in segments}) < len(segments):
            raise OptionError("segments: a sequence may appear only once in a forward")
        for segment in segments:
            count = len(segment.tokens)
            if count == 0:
                raise OptionError("tokens: a segment needs at least one token")
            if segment.parents is not None and (len(segment.parents) != count or count > MAX_ROWS):
                raise OptionError(f"parents: {len(segment.parents)} given for {count} tokens; a tree holds {MAX_ROWS} at most")
            if segment.num_logits is not None and not 0 <= segment.num_logits <= count:
                raise OptionError(f"num_logits = {segment.num_logits}: must be in 0 .. {count}")
            low, high = min(segment.tokens), max(segment.tokens)
            if low < 0 or high >= self._spec.vocab:
                raise OptionError(f"tokens: id {low if low < 0 else high} is outside the vocabulary of {self._spec.vocab}")

    def _here(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._captures else nullcontext()


class _Steps:
    """Where a decoding loop on the device keeps its counters and results."""

    def __init__(self, device: torch.device) -> None:
        self._step = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(MAX_STEPS + 1, MAX_ROWS, dtype=torch.int32, device=device)
        self._evidence = torch.zeros(MAX_STEPS + 1, MAX_ROWS, 3, device=device)

    def reset(self) -> None:
        self._step.zero_()

    def advance(self, best: Any, layout: Layout, rows: int) -> None:
        from paceline.execution.cuda.fused import advance

        advance(best, layout, self._step, self._tokens, self._evidence, rows)

    def read(self, steps: int, rows: int) -> GreedySteps:
        """What the last `steps` steps decoded; waits for the device."""
        tokens = self._tokens[:steps, :rows].T.tolist()
        evidence = self._evidence[:steps, :rows].transpose(0, 1).tolist()
        return GreedySteps(tokens, [[(e[0], e[1], e[2]) for e in row] for row in evidence])


def _wanted(segment: Segment) -> int:
    return len(segment.tokens) if segment.num_logits is None else segment.num_logits


def _missing_part() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (it comes with CUDA builds of torch)"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "the CUDA kernels need compute capability 9.0 (Hopper) or later"
    return missing_reason()


def _free_bytes(device: torch.device) -> int:
    """Free bytes of a GPU, the caching allocator's own reserve included; plenty on a CPU."""
    if device.type != "cuda":
        return 1 << 50
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]

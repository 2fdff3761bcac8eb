"""The GPU runner: one captured graph a forward for up to 64 rows, torch operators for prompts (ours)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import ModelError, ResourceError
from paceline.execution.base import Decoded, Decoding, ForwardOutput, Runner, RunnerInfo, Segment, SequenceHandle, known
from paceline.execution.cuda.capture import Layout, check, grid_chunks
from paceline.execution.cuda.decoder import Decoder, misfit
from paceline.execution.cuda.driver import missing_reason
from paceline.execution.cuda.following import Fed, Verification
from paceline.execution.cuda.linears import MAX_ROWS, Tuning
from paceline.execution.cuda.memory import GIB, Budget, make_room, plan, register, unregister
from paceline.execution.cuda.packing import FORMATS
from paceline.execution.cuda.paging import PAGE, PagedCache, PagedSequence, owned
from paceline.execution.cuda.passes import Passes
from paceline.execution.cuda.stepping import InLine, Line, Stepping, decode, placed, prepared, reference_steps
from paceline.execution.structure import describe_structure, merged_weights
from paceline.models.base import ModelSource
from paceline.records import DecodedToken

if TYPE_CHECKING:
    from paceline.execution.cuda.forwards import Forwards

_MAX_SEQUENCES = 64
_FULL_SEQUENCES = 32
"""Sequences of full length that the cache has room for, if memory allows."""
_CACHE_SHARE = 0.5
"""Of the memory that weights leave, for the cache: a draft, another model or a trainer may come."""


class CudaRunner(Runner):
    """Runs Llama-like models in `bf16`, `int8`, `fp8` or `int4`. A row's logits have the same bits in any batch, chain or tree."""

    decodes_ahead = draws_rows = logits_are_far = takes_late = works_apart = True
    rows_at_once = MAX_ROWS
    follows = True
    """Whether a draft's next steps begin behind the verification of the last one, before the host knows what was accepted."""

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
        self._device = torch.device("cpu" if device == "cpu" else f"cuda:{torch.device(device).index or 0}")
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
        self._forwards: Forwards | None = None
        """The kernels; None on a CPU."""
        self.is_offloaded = False
        """Whether the weights are in the host's memory."""
        register(self)
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
        if self._captures:
            from paceline.execution.cuda.forwards import Forwards

            with torch.inference_mode(), self._here():
                self._forwards = Forwards(self._decoder, self._cache, self._layout, self._device)
                self._forwards.capture_usual()
        self._passes = Passes(self._decoder, self._cache, self._forwards, self._device)

    @property
    def device(self) -> str:
        """As torch spells it."""
        return str(self._device)

    @property
    def warmup_seconds(self) -> float:
        return self._forwards.graphs.seconds if self._forwards is not None else 0.0

    @property
    def followed(self) -> int:
        return self._forwards.followed if self._forwards is not None else 0

    @property
    def captures(self) -> int:
        """Graphs captured so far."""
        return self._forwards.graphs.captures if self._forwards is not None else 0

    @property
    def _captures(self) -> bool:
        return self._device.type == "cuda"

    def _make_cache(self, free: int, limit: int) -> Budget:
        spec, decoder = self._spec, self._decoder
        page_bytes = 2 * spec.layers * spec.kv_heads * PAGE * spec.head_dim * 2
        chunks = grid_chunks(limit, spec.head_dim)
        buffers = 4 * MAX_ROWS * (spec.heads * chunks * (spec.head_dim + 2) + decoder.logits.shape[1] + 2 * spec.vocab)
        weights = decoder.weight_bytes + decoder.embedding.numel() * 2 + decoder.rotary.numel() * 4
        full = -(-limit // PAGE)
        shared = int((free - weights - buffers) * _CACHE_SHARE) // page_bytes
        budget = plan(free, weights, buffers, page_bytes, max(full, min(_FULL_SEQUENCES * full, shared)), full)
        pages = budget.cache // page_bytes
        self._cache = PagedCache(spec.layers, spec.kv_heads, spec.head_dim, pages, limit, _MAX_SEQUENCES, self._device)
        self._layout = Layout(self._cache.tables, spec.heads, spec.head_dim, chunks if self._captures else 1)
        return budget

    # ---------- the contract ----------

    def open(self) -> PagedSequence:
        return self._cache.open()

    def fork(self, sequence: SequenceHandle) -> PagedSequence:
        with torch.inference_mode(), self._here():
            return self._cache.fork(owned(sequence))

    def accept(self, sequence: SequenceHandle, rows: Sequence[int]) -> None:
        self._cache.accept(owned(sequence), rows)

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        self._cache.truncate(owned(sequence), length)

    def close(self, sequence: SequenceHandle) -> None:
        if isinstance(sequence, PagedSequence):
            self._cache.close(sequence)

    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        return self._begin(segments, want_hidden)()

    def begin_forward(self, segments: Sequence[Segment]) -> Callable[[], ForwardOutput]:
        return self._begin(segments)

    def _begin(self, segments: Sequence[Segment], want_hidden: bool = False) -> Callable[[], ForwardOutput]:
        check(segments, self._spec.vocab)
        self._bring_back()
        while True:
            try:
                with torch.inference_mode(), self._here():
                    for segment in segments:
                        self._cache.stage(owned(segment.sequence), len(segment.tokens))
                    known_segments, line = self._placed(segments)
                    late = next((s.late for s in segments if isinstance(s.late, InLine)), None)
                    follow = late.line.follow if late is not None and late.line.inputs.device == self._device else None
                    return self._passes.begin(known_segments, want_hidden, line, follow)
            except torch.OutOfMemoryError as error:
                if not make_room(self):
                    raise ResourceError(
                        f"{self._device}: out of memory in a forward ({self.budget}); use fewer sequences or shorter prompts"
                    ) from error

    def _placed(self, segments: Sequence[Segment]) -> tuple[list[Segment], Line | None]:
        """Segments without late tokens: they are fetched, from the line that is returned, or waited for."""
        if self._forwards is None:
            return [known(segment) for segment in segments], None
        found, line = placed(segments, self._device)
        if line is not None:
            self._layout.late.copy_(line.inputs)
        return found, line

    def decode_ahead(self, jobs: Sequence[Decoding]) -> list[Decoded]:
        """See `Runner.decode_ahead`. The device decodes tokens while the host reads those before."""
        own = [owned(job.sequence) for job in jobs]
        feeds, most = prepared(self, jobs, self.info.max_context, packed=self._passes.reads_pieces)
        self._bring_back()
        ends = [sequence.committed + len(feed) for sequence, feed in zip(own, feeds, strict=True)]
        if self._forwards is None:
            stepping = reference_steps(self, jobs, feeds)
        else:
            stepping = self._begin_steps(self._forwards, jobs, own, feeds, most)
        decoded = decode(jobs, most, stepping)
        for sequence, end, found in zip(own, ends, decoded, strict=True):
            self._cache.keep(sequence, end + max(0, len(found.tokens) - (found.late is None)))
        fed = [
            Fed(
                sequence,
                end - 1,
                (feed[-1], *(token.token for token in found.tokens)),
                len(found.tokens) + (found.late is not None),
                job.law,
                job.numbers,
            )
            for job, sequence, end, feed, found in zip(jobs, own, ends, feeds, decoded, strict=True)
        ]
        self._offer_to_follow(fed, decoded)
        return decoded

    def _offer_to_follow(self, fed: Sequence[Fed], decoded: Sequence[Decoded]) -> None:
        """Let whoever takes the late tokens of drafts begin the steps that come after their verification."""
        line = next((found.late.line for found in decoded if isinstance(found.late, InLine)), None)
        forwards = self._forwards
        if line is None or forwards is None or not self.follows:
            return

        def follow(verification: Verification) -> None:
            if not self.is_offloaded:
                forwards.follow(fed, verification)

        line.follow = follow

    def _begin_steps(
        self,
        forwards: Forwards,
        jobs: Sequence[Decoding],
        own: Sequence[PagedSequence],
        feeds: Sequence[Sequence[int]],
        most: int,
    ) -> Stepping:
        """Issue the first step."""
        with torch.inference_mode(), self._here():
            for sequence, feed in zip(own, feeds, strict=True):
                self._cache.stage(sequence, len(feed) + most - 1)
            issue, steps, rows, issued = forwards.begin_steps(jobs, own, feeds, most)

        def issue_here() -> None:
            with self._here():
                issue()

        def read() -> list[DecodedToken]:
            tokens = steps.read()
            return [tokens[row] for row in rows]

        def leave() -> list[InLine]:
            line = steps.leave()
            return [InLine(line, row) for row in rows]

        return Stepping(issue_here, read, leave, issued)

    def offload(self) -> int:
        """Move the weights to the host's memory and return their bytes; keys and values stay. The next forward brings them back.

        Graphs are captured anew afterwards. Called for the smallest other model when a forward runs out of memory.
        """
        if self.is_offloaded:
            return 0
        with torch.inference_mode(), self._here():
            if self._forwards is not None:
                torch.cuda.synchronize()  # a step may be under way
                self._forwards.graphs.forget()
                self._forwards.following = None
            self._decoder.move(torch.device("cpu"))
            self.is_offloaded = True
            if self._captures:
                torch.cuda.empty_cache()
        return self.budget.weights

    def _bring_back(self) -> None:
        """Undo `offload`. Raises ResourceError when there is still no room."""
        if not self.is_offloaded:
            return
        need, free = self.budget.weights + GIB, _free_bytes(self._device)
        if free < need:
            raise ResourceError(
                f"{self._device}: the model was moved to the host's memory and does not fit back: {need / GIB:.2f} GiB needed, "
                f"{free / GIB:.2f} GiB free; use fewer sequences, shorter prompts, or no draft model"
            )
        with torch.inference_mode(), self._here():
            self._decoder.move(self._device)
        self.is_offloaded = False

    def shutdown(self) -> None:
        """Give the device's memory back; the runner is of no use afterwards."""
        unregister(self)
        del self._forwards, self._decoder, self._cache, self._layout, self._passes

    def capture(self, segments: Sequence[Segment]) -> Callable[[], None]:
        """Capture the graph of exactly this forward now; returns what replays it on the inputs that are in place (for timing).

        Raises NotImplementedError on a CPU.
        """
        if self._forwards is None:
            raise NotImplementedError("nothing is captured on a CPU")
        with torch.inference_mode(), self._here():
            return self._forwards.capture([self._passes.rows(segment) for segment in segments])

    def _here(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device.index) if self._captures else nullcontext()


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

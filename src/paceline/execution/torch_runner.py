"""What the torch runners share: sequences with our cache, packing of segments into one row, choice of rows for logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.errors import ModelError, OptionError, ResourceError
from paceline.execution.attention import PackedSegment
from paceline.execution.base import ForwardOutput, Runner, Segment, SequenceHandle, check_gather
from paceline.execution.kvcache import KVCache
from paceline.execution.threads import torch_threads

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_of(precision: str, backend: str) -> torch.dtype:
    """The torch dtype of a precision. Raises ModelError when the backend has no such precision."""
    if precision not in DTYPES:
        raise ModelError(f"precision = {precision!r}: backend {backend} has {', '.join(DTYPES)}; choose one of them")
    return DTYPES[precision]


@dataclass(frozen=True, slots=True)
class Pack:
    """All new tokens of one forward, in one row."""

    segments: list[PackedSegment]
    tokens: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64: committed length + depth."""
    wanted: torch.Tensor
    """[R] int64: indices of the rows whose logits were asked for."""


class TorchRunner(Runner):
    """Base of runners whose cache is `KVCache` and whose forward is a function of a `Pack`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = torch.get_num_threads()
        """A draft keeps its threads while the target's rounds run with fewer (`Runner.host_threads`)."""

    @abstractmethod
    def _run(self, pack: Pack, want_hidden: bool, taps: Sequence[int] = ()) -> ForwardOutput:
        """Compute the wanted rows, writing keys and values through `packed_attention`. taps: layers of `forward_tapped`."""

    def open(self) -> KVCache:
        return KVCache(self.info.num_layers, self.info.max_context)

    def fork(self, sequence: SequenceHandle) -> KVCache:
        return self._cache(sequence).fork()

    gathers = True

    def gather(self, sequence: SequenceHandle, rows: torch.Tensor) -> KVCache:
        cache = self._cache(sequence)
        stored = cache.committed(0)
        heads = (self.info.num_layers, stored[0].shape[0] if stored is not None else 0)
        checked = check_gather(rows, cache.length, heads)
        with torch.inference_mode():
            return cache.gather(rows if rows.dim() == 1 else checked)

    def follow(self, copy: SequenceHandle, sequence: SequenceHandle) -> None:
        with torch.inference_mode():
            self._cache(copy).follow(self._cache(sequence))

    def attention_mass(self, sequence: SequenceHandle, tokens: Sequence[int]) -> torch.Tensor:
        # On a copy: feeding committed tokens again in another grouping could change bits of the target's own cache.
        copy = self.fork(sequence)
        copy.truncate(copy.length - len(tokens))
        pack = self._pack([Segment(copy, tokens, num_logits=0)])
        mass: list[torch.Tensor] = []
        pack.segments[0].mass = mass
        with torch.inference_mode():
            self._run(pack, False)
        return torch.stack(mass)

    def read_keys(self, sequence: SequenceHandle, layer: int) -> torch.Tensor:
        stored = self._cache(sequence).committed(layer)
        if stored is None:
            raise OptionError("sequence: is empty; feed its prompt first")
        return stored[0].float()

    def accept(self, sequence: SequenceHandle, rows: Sequence[int]) -> None:
        self._cache(sequence).accept(rows)

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        self._cache(sequence).truncate(length)

    def close(self, sequence: SequenceHandle) -> None:
        if isinstance(sequence, KVCache):
            sequence.close()

    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        return self._forward(segments, want_hidden, ())

    has_taps = True

    def forward_tapped(self, segments: Sequence[Segment], layers: Sequence[int]) -> ForwardOutput:
        return self._forward(segments, False, layers)

    def _forward(self, segments: Sequence[Segment], want_hidden: bool, taps: Sequence[int]) -> ForwardOutput:
        with torch.inference_mode(), torch_threads(self._threads):
            try:
                return self._run(self._pack(segments), want_hidden, taps)
            except torch.OutOfMemoryError as error:
                raise ResourceError(
                    f"{self.info.device}: out of memory in a forward; use fewer sequences or a shorter context"
                ) from error

    def _cache(self, sequence: SequenceHandle) -> KVCache:
        if not isinstance(sequence, KVCache) or sequence.closed:
            raise OptionError(f"sequence = {sequence!r}: closed, or opened by another runner")
        return sequence

    def _pack(self, segments: Sequence[Segment]) -> Pack:
        packed: list[PackedSegment] = []
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for segment in segments:
            cache = self._cache(segment.sequence)
            count = len(segment.tokens)
            self._check(segment, cache, any(p.cache is cache for p in packed))
            is_chain = segment.parents is None
            parents = range(-1, count - 1) if segment.parents is None else segment.parents
            rows = PackedSegment(cache, parents, is_chain, len(tokens))
            cache.stage(parents)
            packed.append(rows)
            tokens.extend(segment.tokens)
            positions.extend(rows.positions)
            first = 0 if segment.num_logits is None else count - segment.num_logits
            wanted.extend(range(rows.start + first, rows.start + count))
        return Pack(packed, self._tensor(tokens), self._tensor(positions), self._tensor(wanted))

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _check(self, segment: Segment, cache: KVCache, repeated: bool) -> None:
        count = len(segment.tokens)
        if repeated:
            raise OptionError("segments: a sequence may appear only once in a forward")
        if count == 0:
            raise OptionError("tokens: a segment needs at least one token")
        if segment.parents is not None and len(segment.parents) != count:
            raise OptionError(f"parents: {len(segment.parents)} given for {count} tokens")
        if segment.num_logits is not None and not 0 <= segment.num_logits <= count:
            raise OptionError(f"num_logits = {segment.num_logits}: must be in 0 .. {count}")
        low, high = min(segment.tokens), max(segment.tokens)
        if low < 0 or high >= self.info.vocab_size:
            raise OptionError(f"tokens: id {low if low < 0 else high} is outside the vocabulary of {self.info.vocab_size}")
        if cache.length + count > self.info.max_context:
            raise ResourceError(
                f"context = {cache.length} + {count} new tokens: the limit is {self.info.max_context}; "
                "shorten the prompt or raise max_context where the model allows it"
            )

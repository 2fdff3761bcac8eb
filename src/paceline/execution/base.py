"""The execution contract: one forward over a ragged batch of chains and trees, and a cache that can take tokens back.

A `Segment` is a run of new tokens of one sequence. The forward writes their keys and values behind the sequence's committed
length and returns logits for the rows asked for. Nothing is committed until `accept` names the rows that stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


class SequenceHandle(Protocol):
    """A sequence's place in the cache; made by `Runner.open`."""

    @property
    def length(self) -> int:
        """Committed tokens in the cache."""
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """New tokens of one sequence.

    Position ids are committed length + depth; a token attends to the committed prefix, its ancestors and itself.
    """

    sequence: SequenceHandle
    tokens: Sequence[int]
    parents: Sequence[int] | None = None
    """Index of each token's parent within `tokens` (parents[i] < i), -1 for none. None means a chain."""
    num_logits: int | None = None
    """Logits of this many last rows; None for all, 0 for none (prompt chunks)."""


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """Rows of all segments, one after another, in the order asked for.

    The tensors may be views of buffers that the next forward overwrites: clone what must outlive the round.
    """

    logits: torch.Tensor
    """[R, V] float32."""
    hidden: torch.Tensor | None = None
    """[R, H] last hidden states (after the final norm), if asked for."""
    best: list[int] | None = None
    """Per row the token of the largest logit, the lowest of equals, -1 where a logit is not finite; None where the backend leaves
    that to the caller."""


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What a runner is, for reports."""

    backend: str
    precision: str
    device: str
    vocab_size: int
    max_context: int
    num_layers: int
    fast_paths: tuple[str, ...] = ()
    lost_paths: tuple[str, ...] = ()
    """Fast paths that are off here, each with its reason."""
    deterministic_rows: bool = False
    """True when a row's logits have the same bits in any batch, chain or tree."""
    weight_bytes: int = 0
    extra: dict[str, str] = field(default_factory=dict)


class Runner(ABC):
    """Executes one model. Not thread-safe: one caller at a time."""

    info: RunnerInfo

    @abstractmethod
    def open(self) -> SequenceHandle:
        """A new, empty sequence. The cache grows as needed up to `info.max_context`."""

    @abstractmethod
    def fork(self, sequence: SequenceHandle) -> SequenceHandle:
        """A copy of a sequence's committed cache (for several samples of one prompt)."""

    @abstractmethod
    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        """Run all segments in one pass.

        Raises ResourceError when a sequence would exceed `info.max_context`.
        """

    runs_parts: bool = False
    """Whether `forward_part` is there."""

    def forward_part(self, segments: Sequence[Segment], *, layers: int | None = None, skip: bytes | None = None) -> ForwardOutput:
        """As `forward`, but only the first `layers` layers (then the final norm and the head), and in them without the attention
        (bit 0 of skip[layer]) or the MLP (bit 1). Keys and values of the layers that run are those of a whole forward as long as
        nothing below them was skipped. For self-speculative drafts; raises NotImplementedError unless `runs_parts`.
        """
        raise NotImplementedError(f"the {self.info.backend} backend runs whole models only")

    @abstractmethod
    def accept(self, sequence: SequenceHandle, rows: Sequence[int]) -> None:
        """Commit these rows (strictly increasing, a root-to-leaf path) of the sequence's last segment and forget its others.

        For rows 0, 1, ..., m-1 nothing is copied.
        """

    @abstractmethod
    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        """Forget committed tokens from `length` on. Copies nothing."""

    @abstractmethod
    def close(self, sequence: SequenceHandle) -> None:
        """Give the sequence's memory back."""


def prefill(runner: Runner, sequence: SequenceHandle, tokens: Sequence[int], chunk: int = 512) -> None:
    """Feed and commit tokens without logits, `chunk` at a time, so that activations stay small."""
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        runner.forward([Segment(sequence, part, num_logits=0)])
        runner.accept(sequence, range(len(part)))

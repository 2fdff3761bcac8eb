"""The execution contract: one forward over a ragged batch of chains and trees, and a cache that can take tokens back.

A `Segment` is a run of new tokens of one sequence. The forward writes their keys and values behind the sequence's committed
length and returns logits for the rows asked for. Nothing is committed until `accept` names the rows that stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch

from paceline.errors import OptionError
from paceline.execution.draws import DrawLaw, Draws
from paceline.records import DecodedToken, LateToken, light

MATRICES = ("qkv", "o", "gate_up", "down")
"""The matrices of a layer, where one speaks of them by number."""


class SequenceHandle(Protocol):
    """A sequence's place in the cache; made by `Runner.open`."""

    @property
    def length(self) -> int:
        """Committed tokens in the cache."""
        ...


@light
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
    draws: Draws | None = None
    """A token to draw from each row, for runners with `draws_rows`; others leave it to the caller."""
    late: LateToken | None = None
    """The last token, where it is not known yet and UNKNOWN stands in `tokens`; for runners with `takes_late`. Where it comes to
    nothing, its row means nothing."""


@light
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
    drawn: Sequence[int] | None = None
    """Per row the token that was drawn as its segment asked (`best` where it did not ask), -1 where the largest logit is not
    finite (or as in `best`). None where nothing was drawn. It may be drawn when it is looked at: do so before the next forward."""
    mass: Callable[[int, Collection[int]], float | None] | None = None
    """mass(row, tokens): the probability of these tokens together, all different, under the law that a row was drawn from; None
    where the row did not ask. To be called before the next forward. None where the backend leaves that to the caller."""
    taps: torch.Tensor | None = None
    """[T, layers, H] float32 of *all* new tokens, in the order of the segments: what `forward_tapped` was asked for."""


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


@dataclass(frozen=True, slots=True)
class Decoding:
    """What `Runner.decode_ahead` is to do for one sequence."""

    sequence: SequenceHandle
    feed: Sequence[int]
    """Tokens to feed first."""
    most: int
    """Tokens to decode at most."""
    keep_on: Callable[[DecodedToken], bool]
    """Asked after each token that another one may follow: shall one?"""
    law: DrawLaw | None = None
    """None: greedy."""
    numbers: Sequence[int] = ()
    """With a law: a random number for each token, as in `Draws`."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What `Runner.decode_ahead` decoded for one sequence."""

    tokens: list[DecodedToken]
    late: LateToken | None = None
    """One more, which is under way."""

    def settled(self) -> list[DecodedToken]:
        """All tokens; waits for the late one, which is left out where it came to nothing."""
        last = [self.late.wait()] if self.late is not None else []
        return self.tokens + [token for token in last if token.token >= 0]


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

    prompt_end: tuple[int, int] = (0, 1)
    """How many rows at the end of a prompt go in small passes, and the rows of each. While a long pass computes, weights are lost
    to others from a cache that is shared with them, and the first steps after it are slow. For runners where rows save no time
    together."""
    cold_rounds: int = 1
    """Rounds after a prompt that may be slower than later ones, whatever is drafted."""

    works_apart: bool = False
    """Whether the host is free between `begin_forward` and its result."""

    def begin_forward(self, segments: Sequence[Segment]) -> Callable[[], ForwardOutput]:
        """As `forward`, in two parts: what is returned waits for the result, and is called before anything else of this runner.

        Where the device works by itself, the first part only describes the pass to it. Raises as `forward` does.
        """
        output = self.forward(segments)
        return lambda: output

    @property
    def warmup_seconds(self) -> float:
        """Seconds spent so far on what is done once and used again, such as captures of graphs. A round in which they grew says
        nothing about the price of the next one."""
        return 0.0

    host_threads: int | None = None
    """Torch threads for what runs between this runner's forwards; None: as they are. Kernels with threads of their own ask for one:
    theirs wait for the next forward on the same cores, and sampling from a row took five times as long with torch's beside them."""

    runs_parts: bool = False
    """Whether `forward_part` is there."""

    def forward_part(self, segments: Sequence[Segment], *, layers: int | None = None, skip: bytes | None = None) -> ForwardOutput:
        """As `forward`, but only the first `layers` layers (then the final norm and the head), and in them without the attention
        (bit 0 of skip[layer]) or the MLP (bit 1). Keys and values of the layers that run are those of a whole forward as long as
        nothing below them was skipped. For self-speculative drafts; raises NotImplementedError unless `runs_parts`.
        """
        raise NotImplementedError(f"the {self.info.backend} backend runs whole models only")

    decodes_ahead: bool = False
    """Whether `decode_ahead` is there."""

    def decode_ahead(self, jobs: Sequence[Decoding]) -> list[Decoded]:
        """Feed tokens to each sequence, then decode until its `keep_on` says no or there are `most`; never waits for the answer.

        All sequences share their steps. A token that was under way when the answer was no comes along, since its time is spent:
        whether it does depends on nothing that is known of it. Nor does the host wait for it: it may be late. The next call waits
        for tokens that are late still. Commits what was fed: `feed` and the decoded tokens but the last one. Raises OptionError,
        ResourceError; NotImplementedError unless `decodes_ahead`.
        """
        raise NotImplementedError(f"the {self.info.backend} backend decodes token by token")

    @property
    def followed(self) -> int:
        """Calls of `decode_ahead` so far whose first steps ran before the call: behind the verification of the last tokens, which
        the device accepted by itself. They take time from when that verification ended."""
        return 0

    rows_at_once: int | None = None
    """Rows beyond which a forward over several sequences is done in several passes, each at the price of a forward; None: never."""

    draws_rows: bool = False
    """Whether `forward` draws tokens (`Segment.draws`)."""

    logits_are_far: bool = False
    """Whether a rule on the host would wait long for the distributions of this runner's rows. Where it draws as well, `auto` then
    matches draws even for drafts that come with their distributions, though a ratio test would accept more of them."""

    takes_late: bool = False
    """Whether `forward` takes late tokens (`Segment.late`), of whatever runner: it waits for those that it cannot fetch."""

    has_taps: bool = False
    """Whether `forward_tapped` is there."""

    def forward_tapped(self, segments: Sequence[Segment], layers: Sequence[int]) -> ForwardOutput:
        """As `forward`, and hands out the residual stream in `ForwardOutput.taps`, for drafts that are heads of the target.

        layers: numbers as in transformers' `hidden_states`: l stands for what enters layer l (0: the embeddings), the number of
        layers for the last state after the final norm. Raises NotImplementedError unless `has_taps`.
        """
        raise NotImplementedError(f"the {self.info.backend} backend does not hand out hidden states")

    grades: bool = False
    """Whether every layer has its matrices in two precisions, and `set_grades` or `set_thresholds` choose between them."""
    matrix_weights: tuple[int, ...] = ()
    """Weights of a layer's matrices in the order of MATRICES, where there are grades."""

    def set_grades(self, wide: Sequence[Sequence[bool]]) -> None:
        """Which matrices compute in their second precision from now on; all others do in their first, as all do at the beginning.

        wide: [layers][4], in the order of MATRICES. Raises OptionError for another shape, NotImplementedError unless `grades`.
        """
        raise NotImplementedError(f"the {self.info.backend} backend has one precision for all layers")

    def set_thresholds(self, thresholds: torch.Tensor) -> None:
        """Let every row choose, matrix by matrix: the second precision where the estimated error of the first one on the row's own
        input (`execution/graded.py`) is above the threshold. Undone by `set_grades`.

        thresholds: [layers, 4] float32, in the order of MATRICES. Raises OptionError for another shape, NotImplementedError
        unless `grades`.
        """
        raise NotImplementedError(f"the {self.info.backend} backend has one precision for all layers")

    def rounding_errors(self, tokens: Sequence[int]) -> torch.Tensor:
        """[tokens, layers, 4] float32: those estimates for a text by itself, with the thresholds that are set.

        Raises OptionError unless some are, or for more than 512 tokens; NotImplementedError unless `grades`.
        """
        raise NotImplementedError(f"the {self.info.backend} backend has one precision for all layers")

    gathers: bool = False
    """Whether `gather`, `follow`, `attention_mass` and `read_keys` are there."""

    def adopt_cache(self, other: Runner) -> bool:
        """Work in the sequences of another runner of the same model from now on, in its format of keys and values.

        For copies in another precision that read what their target has computed. Returns whether the two can; if not, nothing
        changes. Sequences that this runner opened before are closed first.
        """
        return False

    def gather(self, sequence: SequenceHandle, rows: torch.Tensor) -> SequenceHandle:
        """A working copy that holds some of the committed rows only, for drafts over a part of the cache.

        rows: [K] int64, or [layers, kv heads, K] to choose for each head, increasing along the last dimension. Layers with a
        sliding window keep their last K rows, whatever was chosen: others are soon out of sight there. New tokens of the copy get
        the positions that they have in `sequence`. Raises OptionError for other rows, NotImplementedError unless `gathers`.
        """
        raise NotImplementedError(f"the {self.info.backend} backend keeps whole caches only")

    def follow(self, copy: SequenceHandle, sequence: SequenceHandle) -> None:
        """Append to a gathered copy what `sequence` has committed behind it, as the whole model computed it.

        Raises OptionError when the copy is ahead, NotImplementedError unless `gathers`.
        """
        raise NotImplementedError(f"the {self.info.backend} backend keeps whole caches only")

    def attention_mass(self, sequence: SequenceHandle, tokens: Sequence[int]) -> torch.Tensor:
        """[layers, kv heads, length] float32: attention that each committed row gets from the last len(tokens) committed tokens,
        summed over these and over the heads of a group.

        tokens: those committed tokens. Costs a forward over them; changes nothing. Raises NotImplementedError unless `gathers`.
        """
        raise NotImplementedError(f"the {self.info.backend} backend does not tell its attention")

    def read_keys(self, sequence: SequenceHandle, layer: int) -> torch.Tensor:
        """[kv heads, length, D] float32: a layer's committed keys, rotated. Raises NotImplementedError unless `gathers`."""
        raise NotImplementedError(f"the {self.info.backend} backend does not show its keys")

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


def known(segment: Segment) -> Segment:
    """The segment with its late token, for which this waits; with any token where that came to nothing."""
    if segment.late is None:
        return segment
    return with_last(segment, max(segment.late.wait().token, 0))


def with_last(segment: Segment, token: int) -> Segment:
    """The segment with this token in the place of the late one."""
    return Segment(segment.sequence, (*segment.tokens[:-1], token), segment.parents, segment.num_logits, segment.draws)


def check_gather(rows: torch.Tensor, length: int, heads: tuple[int, int]) -> torch.Tensor:
    """The rows of a `gather` as [layers, kv heads, K] int64 on their device. Raises OptionError unless they fit the contract.

    length: committed rows; heads: (layers, kv heads).
    """
    shape = tuple(rows.shape)
    if rows.dtype != torch.int64 or (len(shape) != 1 and shape[:-1] != heads):
        raise OptionError(f"rows: shape {shape}, {rows.dtype}: give int64 of shape [K] or [{heads[0]}, {heads[1]}, K]")
    ends = rows.numel() > 0 and (int(rows.min()) < 0 or int(rows.max()) >= length)
    if ends or bool((rows.diff(dim=-1) <= 0).any()):
        raise OptionError(f"rows: must increase and lie in 0 .. {length - 1}")
    return rows.expand(*heads, shape[-1])


def check_thresholds(thresholds: torch.Tensor, runner: Runner) -> torch.Tensor:
    """The thresholds of `set_thresholds`, float32 on the CPU. Raises OptionError unless they fit the runner."""
    _check_matrices("thresholds", tuple(thresholds.shape), runner)
    return thresholds.detach().float().cpu()


def check_grades(wide: Sequence[Sequence[bool]], runner: Runner) -> None:
    """Raises OptionError unless the grades of `set_grades` fit the runner."""
    widths = {len(layer) for layer in wide}
    _check_matrices("wide", (len(wide), widths.pop() if len(widths) == 1 else -1), runner)


def _check_matrices(name: str, shape: tuple[int, ...], runner: Runner) -> None:
    if not runner.grades:
        raise OptionError(f"{name}: precision = {runner.info.precision!r} is one for all; a graded runner has two")
    if shape != (runner.info.num_layers, len(MATRICES)):
        raise OptionError(f"{name}: shape {shape}; {runner.info.num_layers} layers of {len(MATRICES)} matrices are there")


def prefill(
    runner: Runner,
    sequence: SequenceHandle,
    tokens: Sequence[int],
    chunk: int = 512,
    *,
    taps: Sequence[int] = (),
    listen: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Feed and commit tokens without logits, `chunk` at a time, so that activations stay small.

    The end goes as `Runner.prompt_end` says.
    listen: called with each chunk's states of the layers `taps` (see `Runner.forward_tapped`) when there are any.
    """
    rows, piece = runner.prompt_end
    end = max(0, len(tokens) - rows)
    for start, stop in pairwise((*range(0, end, chunk), *range(end, len(tokens), min(piece, chunk)), len(tokens))):
        part = tokens[start:stop]
        segment = Segment(sequence, part, num_logits=0)
        output = runner.forward_tapped([segment], taps) if taps else runner.forward([segment])
        runner.accept(sequence, range(len(part)))
        if listen is not None and output.taps is not None:
            listen(output.taps)

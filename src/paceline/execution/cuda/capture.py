"""Static inputs of captured forwards, and the graphs themselves, one a shape, captured when first needed (ours)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

from paceline.errors import OptionError
from paceline.execution.base import Segment
from paceline.execution.cuda.linears import MAX_ROWS
from paceline.execution.cuda.paging import PAGE

TAIL = 128
"""Keys of a row that attention takes one by one, at most."""
ROW_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 20, 24, 28, 32, 48, 64)
GENERAL_ROWS = (8, 16, 24, 32, 40, 48, 56, 64)
"""Rows of graphs that serve any batch of so many rows, captured before the first round. A capture takes as long as several plain
steps, and a graph for just one way to share rows out saves a percent of a forward at most: there is none."""
FEW_BLOCKS = 16
"""Blocks of query rows of most batches, which have a block a sequence: idle ones took 4 % of a forward over 64 rows."""
LEAST_CHUNKS = 8
"""Of keys in attention's grid: idle blocks of short contexts cost less than more graphs."""
_FIELDS = ("tokens", "lengths", "depths", "indices", "sequences", "sources")
_SEQUENCES, _SOURCES = 4, 5
_WORDS = (len(_FIELDS) + 3) * MAX_ROWS + MAX_ROWS * MAX_ROWS // 4
_STAGES = 8
_CHAIN = np.arange(MAX_ROWS, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one forward of a sequence."""

    slot: int
    """The sequence's row of the page table."""
    length: int
    """Its committed tokens."""
    tokens: Sequence[int]
    """-1 - i stands for token i of `Layout.late`."""
    parents: Sequence[int] | None
    """None: a chain."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for."""

    rows: int
    blocks: int
    """Blocks of query rows in attention."""
    block_tokens: int
    """Tokens of a block at most."""
    chunks: int
    """Chunks of keys in attention's grid."""


class Layout:
    """The tensors that a captured forward reads, at fixed addresses; filled by one copy from the host."""

    def __init__(self, tables: torch.Tensor, heads: int, head_dim: int, max_chunks: int) -> None:
        device = tables.device
        self.tables = tables
        self._words = torch.zeros(_WORDS, dtype=torch.int32, device=device)
        self._prepare_words()
        self.positions = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        self.slots = torch.zeros_like(self.positions)
        self.late = torch.zeros_like(self.positions)
        """Tokens that the host does not know yet."""
        self.tails = torch.zeros(MAX_ROWS, TAIL, dtype=torch.int32, device=device)
        """Cache slot of each of a row's last keys, in order; -1 where there is none."""
        self.sums = torch.zeros(MAX_ROWS * heads * max_chunks * head_dim, device=device)
        self.stats = torch.zeros(MAX_ROWS * heads * max_chunks * 2, device=device)

    def _prepare_words(self) -> None:
        """Views of the words, and memory of their own to fill them from: a twin must not wait for copies of the other."""
        pinned = self._words.is_cuda
        self._stages = [torch.zeros(_WORDS, dtype=torch.int32, pin_memory=pinned) for _ in range(_STAGES)]
        self._copied: list[Any] = [torch.cuda.Event() for _ in self._stages] if pinned else []  # type: ignore[no-untyped-call]
        self._turn = 0
        lines = self._words[: (len(_FIELDS) + 3) * MAX_ROWS].view(-1, MAX_ROWS)
        self.tokens, self.lengths, self.depths, self.indices, self.sequences, self.sources = lines[: len(_FIELDS)]
        self.blocks = lines[len(_FIELDS) :]
        """[3, 64]: first row, number of rows, sequence of each block of query rows."""
        self.paths = self._words[lines.numel() :].view(torch.uint8).view(MAX_ROWS, MAX_ROWS)
        """[64, 64] uint8: the token of the row's segment at each depth of its path."""

    def twin(self) -> Layout:
        """Another description over the same scratch memory, for forwards that are never under way at the same time."""
        other = copy.copy(self)
        other._words = torch.zeros_like(self._words)
        other._prepare_words()
        return other

    def clear(self) -> None:
        """Describe a forward whose rows touch nothing that anyone reads."""
        self.fill((), Shape(1, 1, 1, 1))

    def fill(self, batch: Sequence[Rows], shape: Shape, sources: Sequence[int] = ()) -> None:
        """Describe a forward: rows one after another, then rows that only fill the bucket. sources: see `fused.advance`."""
        self._turn = (self._turn + 1) % _STAGES
        if self._copied:
            self._copied[self._turn].synchronize()
        stage = self._stages[self._turn]
        describe(stage.numpy(), batch, shape, sources)
        self._words.copy_(stage, non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()


def describe(words: np.ndarray, batch: Sequence[Rows], shape: Shape, sources: Sequence[int] = ()) -> None:
    """Write a forward's description into `Layout`'s words (int32)."""
    lines = words[: (len(_FIELDS) + 3) * MAX_ROWS].reshape(-1, MAX_ROWS)
    paths = words[lines.size :].view(np.uint8).reshape(MAX_ROWS, MAX_ROWS)
    lines[:] = 0
    lines[_SEQUENCES] = -1
    lines[_SOURCES, : len(sources)] = sources
    paths[:] = _CHAIN
    # Numbers are gathered in lists and written at once: sequence by sequence took twice as long.
    fields: list[list[int]] = [[] for _ in range(_SOURCES)]
    tokens, lengths, depths, indices, sequences = fields
    blocks: list[tuple[int, int, int]] = []
    for rows in batch:
        start, count = len(tokens), len(rows.tokens)
        tokens += rows.tokens
        lengths += [rows.length] * count
        depths += range(count) if rows.parents is None else _describe_tree(rows.parents, paths[start:])
        indices += range(count)
        sequences += [rows.slot] * count
        for first in range(0, count, shape.block_tokens):
            blocks.append((start + first, min(shape.block_tokens, count - first), rows.slot))
    lines[:_SOURCES, : len(tokens)] = fields
    if blocks:
        lines[len(_FIELDS) :, : len(blocks)] = list(zip(*blocks, strict=True))


def _describe_tree(parents: Sequence[int], paths: np.ndarray) -> list[int]:
    """Writes the tokens' paths, and returns their depths."""
    depths: list[int] = []
    for node, parent in enumerate(parents):
        if parent >= 0:
            paths[node] = paths[parent]
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
        paths[node, depths[node]] = node
    return depths


def check(segments: Sequence[Segment], vocab: int) -> None:
    """Raises OptionError for segments that make no sense."""
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
        told = segment.tokens if segment.late is None else segment.tokens[:-1]
        low, high = min(told, default=0), max(told, default=0)
        if low < 0 or high >= vocab:
            raise OptionError(f"tokens: id {low if low < 0 else high} is outside the vocabulary of {vocab}")


def num_blocks(counts: Sequence[int], block_tokens: int) -> int:
    """Blocks of query rows of segments with so many rows each."""
    return sum(-(-count // block_tokens) for count in counts)


def bucket(rows: int) -> int:
    """The captured number of rows that holds these."""
    return next(b for b in ROW_BUCKETS if b >= rows)


def chunk_size(head_dim: int) -> int:
    """Keys of a chunk in attention: what one block can hold."""
    return max(64, 16384 // head_dim)


def grid_chunks(length: int, head_dim: int) -> int:
    """Chunks of keys in attention's grid that serve rows at positions below `length`; few different numbers."""
    return max(LEAST_CHUNKS, power_of_two(-(-(length // PAGE * PAGE) // chunk_size(head_dim))))


def power_of_two(number: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(0, number - 1).bit_length()


def general(rows: int, blocks: int, block_tokens: int, chunks: int) -> Shape:
    """A shape that serves any batch of about so many rows and blocks, however they are shared out among sequences.

    block_tokens: tokens of a block in long segments. A block holds one row at least, so there are never more blocks than rows.
    """
    rows = next(some for some in GENERAL_ROWS if some >= rows)
    return Shape(rows, min(rows, FEW_BLOCKS) if blocks <= FEW_BLOCKS else rows, block_tokens, chunks)


def for_steps(shape: Shape) -> Shape:
    """The shape of steps over as many sequences as rows, of which there are to be few as well: idle rows cost next to nothing."""
    if shape.rows == 1:
        return shape
    rows = next(rows for rows in (4, *GENERAL_ROWS) if rows >= shape.rows)
    return Shape(rows, rows, shape.block_tokens, shape.chunks)


class Graphs:
    """Captured forwards, one a key; they share one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._graphs: dict[object, torch.cuda.CUDAGraph] = {}
        self.captures = 0
        """Graphs captured so far."""
        self.seconds = 0.0
        """Spent on them, with what had to be compiled."""

    def __len__(self) -> int:
        return len(self._graphs)

    def forget(self) -> None:
        """Drop all graphs: what they read has moved."""
        self._pool = None
        self._graphs = {}

    def choose(self, wanted: Shape, counts: Sequence[int], block_tokens: int) -> Shape:
        """The shape to run a forward with: its own if that was captured, else the closest one that was and has room, else one that
        serves others, too.

        counts: rows of each segment. Rows are the same whatever shape they are in, and a more general one is a little slower.
        """
        if wanted in self._graphs:
            return wanted
        rows = sum(counts)
        bound = general(rows, num_blocks(counts, block_tokens), block_tokens, wanted.chunks)
        fitting = [
            shape
            for shape in self._graphs
            if isinstance(shape, Shape)
            and rows <= shape.rows <= bound.rows
            and shape.chunks == wanted.chunks
            and num_blocks(counts, shape.block_tokens) <= shape.blocks
        ]
        return min(fitting, key=lambda shape: (shape.rows, shape.blocks), default=bound)

    def prepare(self, key: object, run: Callable[[], None], clear: Callable[[], None]) -> bool:
        """Capture a function unless that was done; returns whether it was captured now.

        clear: puts inputs in place with which a trial run before the capture does no harm.
        """
        if key in self._graphs:
            return False
        started = perf_counter()
        clear()
        self._graphs[key] = self._capture(run)
        self.captures += 1
        self.seconds += perf_counter() - started
        return True

    def again(self, key: object) -> None:
        """Replay a graph that was captured, on the inputs that are in place."""
        self._graphs[key].replay()

    def _capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        run()  # compiles what is missing, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph

"""Small Triton kernels at the ends of a forward: embedding and row addresses, the best token, a decoding loop's step (ours)."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def place(row, column):
    """Where an input of an activation row lies in column tiles (`place` of skinny.cu)."""
    tile = column // 64 * 8 + row // 8
    return tile * 512 + column % 64 // 32 * 256 + (row % 8 * 4 + column % 32 // 8) * 8 + column % 8


@triton.jit
def _embed(
    embedding,  # [V, H] bf16
    tokens,  # [rows] int32; -1 - i: entry i of `late`
    late,  # int32
    lengths,  # [rows] int32: committed tokens of the row's sequence
    depths,  # [rows] int32
    indices,  # [rows] int32: place in the segment
    sequences,  # [rows] int32: row of `tables`; -1 for a row that only fills the bucket
    paths,  # [rows, 64] uint8: the token of the row's segment at each depth below it
    tables,
    positions,  # out
    slots,  # out
    tails,  # out [rows, TAIL]: slots of the row's last keys
    x,  # out, column tiles of bf16
    squares,  # out [H / 16, 64] f32
    scale,
    table_stride,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
):
    row = tl.program_id(0)
    sequence, length = tl.load(sequences + row), tl.load(lengths + row)
    live = sequence >= 0
    slot = length + tl.load(indices + row)
    page = tl.load(tables + sequence * table_stride + slot // 64, mask=live, other=0)
    position = tl.where(live, length + tl.load(depths + row), 0)
    tl.store(positions + row, position)
    tl.store(slots + row, tl.where(live, page * 64 + slot % 64, 0))
    key = tl.maximum((position + 1 - 64) // 64, 0) * 64 + tl.arange(0, TAIL)
    fresh = key >= length
    step = tl.load(paths + row * 64 + key - length, mask=live & fresh & (key <= position), other=0).to(tl.int32)
    tail = tl.where(fresh, length + step, key)
    tail_page = tl.load(tables + sequence * table_stride + tail // 64, mask=live & (key <= position), other=0)
    tl.store(tails + row * TAIL + tl.arange(0, TAIL), tl.where(key <= position, tail_page * 64 + tail % 64, -1))
    column = tl.arange(0, WIDTH)
    inside = column < H
    token = tl.load(tokens + row)
    token = tl.load(late + (-1 - token), mask=token < 0, other=token).to(tl.int64)
    value = tl.load(embedding + token * H + column, mask=inside, other=0.0).to(tl.float32) * scale
    value = value.to(tl.bfloat16)
    tl.store(x + place(row, column), value, mask=inside)
    square = value.to(tl.float32) * value.to(tl.float32)
    tile = tl.arange(0, WIDTH // 16)
    tl.store(squares + tile * 64 + row, tl.sum(tl.reshape(square, (WIDTH // 16, 16)), 1), mask=tile < H // 16)


@triton.jit
def _best_of_block(logits, stride, vocab, parts, indices, NUM_BLOCKS, BLOCK: tl.constexpr):
    """A block's largest logit and its lowest index, the second largest, and sums of e^d and d e^d, d relative to the largest."""
    row, block = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    inside = block * BLOCK + lane < vocab
    value = tl.load(logits + row * stride + block * BLOCK + lane, mask=inside, other=float("-inf"))
    best, index = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    mass = tl.exp(value - best)
    at = row * NUM_BLOCKS + block
    tl.store(indices + at, block * BLOCK + index)
    tl.store(parts + at * 4, best)
    tl.store(parts + at * 4 + 1, tl.max(tl.where(lane == index, float("-inf"), value), 0))
    tl.store(parts + at * 4 + 2, tl.sum(mass, 0))
    tl.store(parts + at * 4 + 3, tl.sum(tl.where(inside, mass * (value - best), 0.0), 0))


@triton.jit
def _best_of_row(parts, indices, NUM_BLOCKS, tokens, evidence, PADDED: tl.constexpr):
    row = tl.program_id(0)
    block = tl.arange(0, PADDED)
    known, at = block < NUM_BLOCKS, row * NUM_BLOCKS + block
    value = tl.load(parts + at * 4, mask=known, other=float("-inf"))
    second = tl.load(parts + at * 4 + 1, mask=known, other=float("-inf"))
    mass = tl.load(parts + at * 4 + 2, mask=known, other=0.0)
    moment = tl.load(parts + at * 4 + 3, mask=known, other=0.0)
    best, winner = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    below = tl.max(tl.where(block == winner, second, value), 0)
    scale = tl.exp(value - best)
    total = tl.sum(mass * scale, 0)
    mean = tl.sum(tl.where(known, scale * (moment + (value - best) * mass), 0.0), 0) / total
    token = tl.load(indices + row * NUM_BLOCKS + winner)
    tl.store(tokens + row, tl.where(total < float("inf"), token, -1))  # neither infinite nor not a number
    tl.store(evidence + row * 3, 1.0 / total)
    tl.store(evidence + row * 3 + 1, tl.log(total) - mean)
    tl.store(evidence + row * 3 + 2, (1.0 - tl.exp(below - best)) / total)


@triton.jit(do_not_specialize=["rows"])
def _advance(
    picked,  # a token for each next input; or, unless DRAWN, the best one of each row of the forward
    evidence,  # of the rows of the forward
    chances,  # of drawn tokens, -1 for what is greedy
    sources,  # row of the forward for each next input, if GATHER
    tokens,
    lengths,
    line,  # [1] int32
    history,  # [RING, ROWS] int32
    evidence_history,  # [RING, ROWS, 4] f32
    rows,
    RING: tl.constexpr,
    ROWS: tl.constexpr,
    GATHER: tl.constexpr,
    DRAWN: tl.constexpr,
    GROW: tl.constexpr,
):
    """A token of each row becomes its next input; both histories get a line. One program."""
    row = tl.arange(0, ROWS)
    live = row < rows
    source = row
    if GATHER:
        source = tl.load(sources + row, mask=live, other=0)
    largest = tl.load(evidence + source * 3, mask=live, other=0.0)
    if DRAWN:
        token = tl.load(picked + row, mask=live, other=0)
        chance = tl.load(chances + row, mask=live, other=0.0)
        chance = tl.where(chance < 0.0, largest, chance)
    else:
        token = tl.load(picked + source, mask=live, other=0)
        chance = largest
    at = tl.load(line)
    place_of = at * ROWS + row
    tl.store(history + place_of, token, mask=live)
    for i in tl.static_range(3):
        tl.store(evidence_history + place_of * 4 + i, tl.load(evidence + source * 3 + i, mask=live), mask=live)
    tl.store(evidence_history + place_of * 4 + 3, chance, mask=live)
    tl.store(tokens + row, tl.maximum(token, 0), mask=live)
    if GROW:
        tl.store(lengths + row, tl.load(lengths + row, mask=live, other=0) + 1, mask=live)
    tl.store(line, (at + 1) % RING)


@triton.jit
def _accept(
    tokens,  # of the target's rows; -1 - i: entry i of `late`
    late,
    chosen,  # the target's token at each row
    places,  # [sequences, 2] int32: first row of each sequence, and its rows
    fed,  # out [sequences, 2] int32: tokens
    lengths,  # in and out [sequences, 2] int32: slot of the first row's token; then that of the first of the two that are fed
    later,  # out [sequences] int32: slot behind them
    told,  # out [sequences, 2] int32 of the host
    ahead,  # [sequences, WIDTH] int64: numbers of the positions behind the first row's
    line,  # [1] int32: of the next step
    numbers,  # out [RING, ROWS] int64: of the steps
    vocab,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RING: tl.constexpr,
    STEPS: tl.constexpr,
    DRAWN: tl.constexpr,
):
    sequence, row = tl.program_id(0), tl.arange(0, ROWS)
    first, count = tl.load(places + 2 * sequence), tl.load(places + 2 * sequence + 1)
    drafted = row < count - 1
    token = tl.load(tokens + first + 1 + row, mask=drafted, other=0)
    token = tl.load(late + (-1 - token), mask=drafted & (token < 0), other=token)
    same = drafted & (token == tl.load(chosen + first + row, mask=drafted, other=-1))
    end = tl.min(tl.where(same, ROWS, row), 0)
    last = tl.load(tokens + first + end)
    last = tl.load(late + (-1 - last), mask=last < 0, other=last)
    following = tl.minimum(tl.maximum(tl.load(chosen + first + end), 0), vocab - 1)
    length = tl.load(lengths + 2 * sequence) + end
    tl.store(fed + 2 * sequence, last)
    tl.store(fed + 2 * sequence + 1, following)
    tl.store(lengths + 2 * sequence, length)
    tl.store(lengths + 2 * sequence + 1, length)
    tl.store(later + sequence, length + 2)
    tl.store(told + 2 * sequence, end)
    tl.store(told + 2 * sequence + 1, following)
    if DRAWN:
        at = tl.load(line)
        for step in tl.static_range(STEPS):
            number = tl.load(ahead + sequence * WIDTH + end + step)
            tl.store(numbers + (at + step) % RING * ROWS + sequence, number)


def accept(
    target: Any,
    layout: Any,
    later: torch.Tensor,
    told: torch.Tensor,
    sequences: int,
    vocab: int,
    *,
    ahead: torch.Tensor | None = None,
    line: torch.Tensor | None = None,
    numbers: torch.Tensor | None = None,
    steps: int = 0,
) -> None:
    """Put the last accepted token of each sequence and the one that follows it in place, two rows a sequence.

    target: a `following.Verification`. layout: the tensors of `capture.Layout` of the draft's forward, described as if nothing was
    accepted; its sources are first row and rows of each sequence. later: [>= sequences] int32, slots of the tokens after that.
    told: [>= sequences, 2] int32 of the host. Of drafts that draw: ahead [>= sequences, width] int64, the numbers of the positions
    behind the pending token's successor; line [1] int32, the line of numbers [lines, rows] int64 that the first step reads.
    The readable form is `following.accepted`.
    """
    drawn = ahead is not None
    _accept[(sequences,)](
        target.tokens,
        target.late,
        target.chosen,
        layout.sources,
        layout.tokens,
        layout.lengths,
        later,
        told,
        ahead if drawn else later,
        line if drawn else later,
        numbers if drawn else later,
        vocab,
        ROWS=layout.tokens.shape[0],
        WIDTH=ahead.shape[1] if ahead is not None else 0,
        RING=numbers.shape[0] if numbers is not None else 1,
        STEPS=steps if drawn else 0,
        DRAWN=drawn,
        num_warps=2,
    )


def embed(embedding: torch.Tensor, layout: Any, x: torch.Tensor, squares: torch.Tensor, rows: int, scale: float) -> None:
    """Rows of x from `layout.tokens`, with partial sums of squares; fills `layout`'s positions, slots and tails.

    layout: the tensors of `capture.Layout`. x: column tiles; squares [H / 16, 64] float32.
    """
    hidden = embedding.shape[1]
    _embed[(rows,)](
        embedding,
        layout.tokens,
        layout.late,
        layout.lengths,
        layout.depths,
        layout.indices,
        layout.sequences,
        layout.paths,
        layout.tables,
        layout.positions,
        layout.slots,
        layout.tails,
        x,
        squares,
        scale,
        layout.tables.stride(0),
        H=hidden,
        WIDTH=triton.next_power_of_2(hidden),
        TAIL=layout.tails.shape[1],
        num_warps=8,
    )


class BestToken:
    """The most probable token of each row (ties: lowest id; -1 where a logit is infinite or not a number), on the device."""

    def __init__(self, max_rows: int, vocab: int, device: torch.device) -> None:
        self._vocab, self._blocks = vocab, triton.cdiv(vocab, _BLOCK)
        self._parts = torch.empty(max_rows, self._blocks, 4, device=device)
        self._indices = torch.empty(max_rows, self._blocks, dtype=torch.int32, device=device)
        self.picks = torch.zeros(2, max_rows, dtype=torch.int32, device=device)
        """The most probable token of each row, and what others put beside it, so that both are read at once."""
        self.tokens = self.picks[0]
        self.evidence = torch.zeros(max_rows, 3, device=device)
        """Largest probability, entropy in nats, largest less second-largest probability."""

    def __call__(self, logits: torch.Tensor, rows: int) -> None:
        """logits: [>= rows, >= V] float32."""
        grid = (rows, self._blocks)
        _best_of_block[grid](logits, logits.stride(0), self._vocab, self._parts, self._indices, self._blocks, BLOCK=_BLOCK)
        padded = triton.next_power_of_2(self._blocks)
        _best_of_row[(rows,)](self._parts, self._indices, self._blocks, self.tokens, self.evidence, PADDED=padded)


def advance(
    best: BestToken,
    layout: Any,
    line: torch.Tensor,
    history: torch.Tensor,
    evidence_history: torch.Tensor,
    rows: int,
    *,
    drawer: Any = None,
    gather: bool = False,
    grow: bool,
) -> None:
    """Feed each row of `layout` its best token, or what `drawer` drew for it.

    line: [1] int32, where the histories [lines, MAX_ROWS] and [lines, MAX_ROWS, 4] (of the host, pinned) are written next.
    gather: best tokens and evidence are those of the rows `layout.sources` of the forward.
    """
    lines, width = history.shape
    drawn, chances = (best.tokens, best.evidence) if drawer is None else (drawer.tokens, drawer.chances)
    outputs = (layout.tokens, layout.lengths, line, history, evidence_history)
    _advance[(1,)](
        drawn,
        best.evidence,
        chances,
        layout.sources,
        *outputs,
        rows,
        RING=lines,
        ROWS=width,
        GATHER=gather,
        DRAWN=drawer is not None,
        GROW=grow,
        num_warps=2,
    )

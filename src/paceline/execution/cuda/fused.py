"""Small Triton kernels at the ends of a forward: embedding and row addresses, the best token, the step of a decoding loop (ours)."""

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
    tokens,  # [rows] int32
    lengths,  # [rows] int32: committed tokens of the row's sequence
    depths,  # [rows] int32
    indices,  # [rows] int32: place in the segment
    sequences,  # [rows] int32: row of `tables`; -1 for a row that only fills the bucket
    tables,
    positions,  # out
    slots,  # out
    x,  # out, column tiles of bf16
    squares,  # out [H / 16, 64] f32
    scale,
    table_stride,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    sequence, length = tl.load(sequences + row), tl.load(lengths + row)
    live = sequence >= 0
    slot = length + tl.load(indices + row)
    page = tl.load(tables + sequence * table_stride + slot // 64, mask=live, other=0)
    tl.store(positions + row, tl.where(live, length + tl.load(depths + row), 0))
    tl.store(slots + row, tl.where(live, page * 64 + slot % 64, 0))
    column = tl.arange(0, WIDTH)
    inside = column < H
    token = tl.load(tokens + row).to(tl.int64)
    value = tl.load(embedding + token * H + column, mask=inside, other=0.0).to(tl.float32) * scale
    value = value.to(tl.bfloat16)
    tl.store(x + place(row, column), value, mask=inside)
    square = value.to(tl.float32) * value.to(tl.float32)
    tile = tl.arange(0, WIDTH // 16)
    tl.store(squares + tile * 64 + row, tl.sum(tl.reshape(square, (WIDTH // 16, 16)), 1), mask=tile < H // 16)


@triton.jit
def _best_of_block(logits, stride, vocab, values, indices, masses, NUM_BLOCKS, BLOCK: tl.constexpr):
    """Largest logit of a block, its lowest index, and the block's sum of exponentials relative to it."""
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * stride + column, mask=column < vocab, other=float("-inf"))
    best, index = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    at = row * NUM_BLOCKS + block
    tl.store(values + at, best)
    tl.store(indices + at, block * BLOCK + index)
    tl.store(masses + at, tl.sum(tl.exp(value - best), 0))


@triton.jit
def _best_of_row(values, indices, masses, NUM_BLOCKS, tokens, probs, PADDED: tl.constexpr):
    row = tl.program_id(0)
    block = tl.arange(0, PADDED)
    at = row * NUM_BLOCKS + block
    value = tl.load(values + at, mask=block < NUM_BLOCKS, other=float("-inf"))
    mass = tl.load(masses + at, mask=block < NUM_BLOCKS, other=0.0)
    best, winner = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens + row, tl.load(indices + row * NUM_BLOCKS + winner))
    tl.store(probs + row, 1.0 / tl.sum(mass * tl.exp(value - best), 0))


@triton.jit
def _advance(best, probs, tokens, lengths, step, history, prob_history, ROWS: tl.constexpr):
    """Every row's best token becomes its next one; both histories get a line."""
    row = tl.program_id(0)
    token = tl.load(best + row)
    at = tl.load(step + row)
    tl.store(history + at * ROWS + row, token)
    tl.store(prob_history + at * ROWS + row, tl.load(probs + row))
    tl.store(tokens + row, token)
    tl.store(lengths + row, tl.load(lengths + row) + 1)
    tl.store(step + row, at + 1)


def embed(embedding: torch.Tensor, layout: Any, x: torch.Tensor, squares: torch.Tensor, rows: int, scale: float) -> None:
    """Rows of x from `layout.tokens`, with partial sums of squares; fills `layout.positions` and `layout.slots`.

    layout: the tensors of `capture.Layout`. x: column tiles; squares [H / 16, 64] float32.
    """
    hidden = embedding.shape[1]
    _embed[(rows,)](
        embedding,
        layout.tokens,
        layout.lengths,
        layout.depths,
        layout.indices,
        layout.sequences,
        layout.tables,
        layout.positions,
        layout.slots,
        x,
        squares,
        scale,
        layout.tables.stride(0),
        H=hidden,
        WIDTH=triton.next_power_of_2(hidden),
        num_warps=8,
    )


class BestToken:
    """The most probable token of each row (ties: lowest id) and its probability, on the device."""

    def __init__(self, max_rows: int, vocab: int, device: torch.device) -> None:
        self._vocab, self._blocks = vocab, triton.cdiv(vocab, _BLOCK)
        self._values = torch.empty(max_rows, self._blocks, device=device)
        self._masses = torch.empty_like(self._values)
        self._indices = torch.empty(max_rows, self._blocks, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.probs = torch.zeros(max_rows, device=device)

    def __call__(self, logits: torch.Tensor, rows: int) -> None:
        """logits: [>= rows, >= V] float32."""
        parts = (self._values, self._indices, self._masses, self._blocks)
        _best_of_block[(rows, self._blocks)](logits, logits.stride(0), self._vocab, *parts, BLOCK=_BLOCK)
        _best_of_row[(rows,)](*parts, self.tokens, self.probs, PADDED=triton.next_power_of_2(self._blocks))


def advance(best: BestToken, layout: Any, step: torch.Tensor, history: torch.Tensor, prob_history: torch.Tensor, rows: int) -> None:
    """Feed each row its own best token next. step: [rows] int32; histories: [steps, MAX_ROWS]."""
    width = history.shape[1]
    _advance[(rows,)](best.tokens, best.probs, layout.tokens, layout.lengths, step, history, prob_history, ROWS=width, num_warps=1)

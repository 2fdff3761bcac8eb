"""Attention of decoding and verification over paged keys and values: two Triton kernels (ours).

The sum over keys is split at fixed places that depend on a row's own position alone: the row at position p takes whole pages
below `page_limit(p)` in chunks of CHUNK keys through matrix instructions (`_chunks`), and the 64 to 127 keys up to itself one
by one, in order of depth (`_tail`), which also joins the parts in a fixed order. Tokens that are not committed are at most 64,
so they always fall into the second part, where a row has its own list of keys. Hence a row gets the same bits as a chain, in a
tree, alone or in a batch, and at any length of the captured grid.

A path is 64 bytes a row (the token of its segment at each depth) rather than 64 ancestor bits: bits cannot be walked in order
of depth without a search. Reference: `reference_attention`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.execution.cuda.capture import TAIL, chunk_size
from paceline.execution.cuda.fused import place

PAGE = 64
_CHUNK_WARPS = 8


def page_limit(position: int) -> int:
    """Keys of a row that are summed through matrix instructions: whole pages, at least 63 keys below the row."""
    return max(0, (position + 1 - PAGE) // PAGE) * PAGE


@triton.jit(do_not_specialize=["num_chunks", "table_stride"])
def _chunks(
    q,  # [rows, heads, D] bf16
    keys,  # [pages, kv heads, 64, D] bf16
    values,
    tables,  # [sequences, table_stride] int32: page numbers
    blocks,  # [3, MAX_ROWS] int32: first row, number of rows, sequence
    positions,  # [rows] int32
    sums,  # [rows, heads, chunks, D] f32
    stats,  # [rows, heads, chunks, 2] f32: maximum (base 2) and sum of exponentials
    scale,  # of the scores, times log2(e)
    num_chunks,
    table_stride,
    MAX_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk of keys for the query rows of one sequence and one kv head."""
    block, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(blocks + block)
    count = tl.load(blocks + MAX_ROWS + block)
    sequence = tl.load(blocks + 2 * MAX_ROWS + block)
    lane = tl.arange(0, ROWS)
    row = first + lane // GROUP
    live = lane < count * GROUP
    position = tl.load(positions + row, mask=live, other=0)
    limit = tl.maximum((position + 1 - 64) // 64, 0) * 64
    column = tl.arange(0, CHUNK)
    key = chunk * CHUNK + column
    d = tl.arange(0, D)
    busy = tl.max(tl.where(live, limit, 0)) > chunk * CHUNK
    if busy:
        # Keys of committed tokens do not wait for the kernel before this one.
        page = tl.load(tables + sequence * table_stride + key // 64, mask=key < tl.max(limit), other=0)
        at = ((page.to(tl.int64) * KV_HEADS + head) * 64 + key % 64) * D
        k = tl.load(keys + at[:, None] + d[None, :])
        v = tl.load(values + at[:, None] + d[None, :])
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        query_head = head * GROUP + lane % GROUP
        offset = (row * KV_HEADS * GROUP + query_head) * D
        query = tl.load(q + offset[:, None] + d[None, :], mask=live[:, None], other=0.0, cache_modifier=".cg")
        scores = tl.dot(query, tl.trans(k)) * scale
        seen = key[None, :] < limit[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        peak = tl.max(scores, 1)
        weight = tl.where(seen, tl.exp2(scores - tl.maximum(peak, -1e30)[:, None]), 0.0)
        out = tl.dot(weight.to(tl.bfloat16), v)
        part = (row * KV_HEADS * GROUP + query_head) * num_chunks + chunk
        tl.store(sums + part[:, None] * D + d[None, :], out, mask=live[:, None])
        tl.store(stats + part * 2, peak, mask=live)
        tl.store(stats + part * 2 + 1, tl.sum(weight, 1), mask=live)
    else:
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_chunks"])
def _tail(
    q,
    keys,
    values,
    tails,  # [rows, TAIL] int32: slots of the row's last keys, -1 for none
    positions,
    sums,
    stats,
    out,  # column tiles of bf16
    scale,
    num_chunks,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    TAIL: tl.constexpr,
    JOIN: tl.constexpr,
    WINDOW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The last keys of one row and one head, then the join with the row's chunks.

    `_chunks` lets this kernel start once queries, keys and values are there: only the chunks' sums must be waited for. Loads
    before that wait go past the first-level cache, which may hold the layer before.
    """
    if OVERLAP:
        gdc_launch_dependents()
    row, query_head = tl.program_id(0), tl.program_id(1)
    head = query_head // GROUP
    position, slot = tl.load(positions + row), tl.load(tails + row * TAIL + tl.arange(0, TAIL))
    limit = tl.maximum((position + 1 - 64) // 64, 0) * 64
    seen = slot >= 0
    if WINDOW > 0:
        seen = seen & (limit + tl.arange(0, TAIL) > position - WINDOW)
    at = ((slot.to(tl.int64) // 64 * KV_HEADS + head) * 64 + slot % 64) * D
    d = tl.arange(0, D)
    k = tl.load(keys + at[:, None] + d[None, :], mask=seen[:, None], other=0.0, cache_modifier=".cg")
    v = tl.load(values + at[:, None] + d[None, :], mask=seen[:, None], other=0.0, cache_modifier=".cg")
    entry = row * KV_HEADS * GROUP + query_head
    query = tl.load(q + entry * D + d, cache_modifier=".cg").to(tl.float32) * scale
    scores = tl.where(seen, tl.sum(k.to(tl.float32) * query[None, :], 1), float("-inf"))
    peak = tl.max(scores, 0)
    weight = tl.exp2(scores - peak)
    total = tl.sum(weight, 0)
    result = tl.sum(v.to(tl.float32) * weight[:, None], 0)
    if OVERLAP:
        gdc_wait()
    first_chunk = 0
    if WINDOW > 0:
        first_chunk = tl.maximum(position - WINDOW + 1, 0) // CHUNK
    chunks = (limit + CHUNK - 1) // CHUNK
    for start in range(first_chunk // JOIN * JOIN, chunks, JOIN):
        chunk = start + tl.arange(0, JOIN)
        known = (chunk < chunks) & (chunk >= first_chunk)
        part = entry * num_chunks + chunk
        part_peak = tl.load(stats + part * 2, mask=known, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(stats + part * 2 + 1, mask=known, other=0.0, cache_modifier=".cg")
        part_sum = tl.load(sums + part[:, None] * D + d[None, :], mask=known[:, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(part_peak, 0))
        share = tl.exp2(part_peak - higher)
        keep = tl.exp2(peak - higher)
        total = total * keep + tl.sum(part_total * share, 0)
        result = result * keep + tl.sum(part_sum * share[:, None], 0)
        peak = higher
    tl.store(out + place(row, query_head * D + d), (result / total).to(tl.bfloat16))


def block_tokens(group: int, num_tokens: int) -> int:
    """Tokens of a block of `_chunks`: as many as fill a matrix tile of 16 or, for longer segments, 32 query rows."""
    return max(1, (16 if group * num_tokens <= 16 else 32) // group)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    layout: Any,
    *,
    group: int,
    rows: int,
    blocks: int,
    tokens: int,
    chunks: int,
    scale: float,
    window: int | None = None,
    overlap: bool = False,
) -> None:
    """out[n] = attention of row n < rows, for rows whose keys and values are in the cache already.

    q: [rows, heads, D] bfloat16; out: column tiles [64, heads * D]; keys, values: [pages, kv heads, 64, D].
    layout: the tensors of `capture.Layout`.
    blocks: columns of `layout.blocks` that count, of `tokens` tokens at most; chunks: of the captured grid, enough for the
    longest row.
    """
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    common: dict[str, Any] = {
        "GROUP": group,
        "KV_HEADS": kv_heads,
        "D": head_dim,
        "CHUNK": chunk_size(head_dim),
        "WINDOW": window or 0,
        "OVERLAP": overlap,
    }
    if overlap:
        common["launch_pdl"] = True
    factor, stride = scale * 1.4426950408889634, layout.tables.stride(0)
    _chunks[(blocks, kv_heads, chunks)](
        q,
        keys,
        values,
        layout.tables,
        layout.blocks,
        layout.positions,
        layout.sums,
        layout.stats,
        factor,
        chunks,
        stride,
        MAX_ROWS=layout.blocks.shape[1],
        ROWS=max(16, triton.next_power_of_2(group * tokens)),
        num_warps=_CHUNK_WARPS,
        **common,
    )
    _tail[(rows, kv_heads * group)](
        q,
        keys,
        values,
        layout.tails,
        layout.positions,
        layout.sums,
        layout.stats,
        out,
        factor,
        chunks,
        TAIL=TAIL,
        JOIN=16,
        num_warps=max(4, head_dim // 16),
        **common,
    )

"""A decoder's weights on the GPU, and its forward twice: as a row of kernels to capture, and over torch operators (ours).

Norm weights are folded into the matrices behind them, so that a norm is one number a row, applied to the product's result; the
matrices that write the residual stream leave partial sums of squares for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from paceline.execution.cuda.capture import Layout, Shape
from paceline.execution.cuda.linears import MAX_ROWS, PackedLinear, Tuning
from paceline.execution.cuda.packing import from_column_tiles
from paceline.execution.cuda.paging import PagedCache, PagedSequence
from paceline.execution.structure import LayerWeights, LeanSpec, Matrix, ModelWeights

_TILE = 16


def misfit(spec: LeanSpec) -> str | None:
    """Why these kernels cannot run a structure, or None."""
    for present, what in (
        (spec.qk_norm, "norms of queries and keys"),
        (spec.sandwich_norms, "norms behind attention and MLP"),
        (spec.o_bias or spec.mlp_bias, "biases outside the query, key and value projections"),
        (spec.attention_softcap is not None or spec.logit_softcap is not None, "soft caps"),
        (spec.local_rope is not None, "two sets of rotary positions"),
        (spec.activation not in ("silu", "gelu_tanh"), f"activation {spec.activation}"),
        (spec.head_dim not in (64, 128, 256), f"head size {spec.head_dim} (64, 128 or 256)"),
    ):
        if present:
            return f"the CUDA kernels do not know {what}"
    if spec.heads // spec.kv_heads > 32:
        return f"the CUDA kernels share a kv head among 32 heads at most, not {spec.heads // spec.kv_heads}"
    widths = {"hidden": spec.hidden, "intermediate": spec.intermediate, "heads x head size": spec.heads * spec.head_dim}
    for name, width in widths.items():
        if width % 64:
            return f"{name} = {width} is no multiple of 64"
    return None


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    window: int | None


class Decoder:
    """Weights and activation buffers of one model on one device."""

    def __init__(
        self, weights: ModelWeights, spec: LeanSpec, format: str, max_context: int, device: torch.device, tuning: Tuning
    ) -> None:
        """Loads, folds and packs matrix by matrix, so that no second copy of the model is ever in memory."""
        self.spec, self._device, self._format, self._tuning = spec, device, format, tuning
        self.embedding = weights.embedding.weight().to(device, torch.bfloat16)
        self.layers = [self._layer(layer, spec.windows[i]) for i, layer in enumerate(weights.layers)]
        self.final_norm = weights.final_norm.to(device)
        # As in the other runners, 4 bits are too few for the head.
        self.head = self._linear(weights.head, weights.final_norm, format="int8" if format == "int4" else format)
        angle = torch.arange(max_context, device=device)[:, None] * torch.tensor(spec.rope.inv_freq, device=device)
        self.rotary = torch.stack([angle.cos(), angle.sin()], -1) * spec.rope.attention_factor
        """[positions, head_dim / 2, (cos, sin)] float32."""
        self._scale = float(torch.tensor(spec.embed_scale).to(torch.bfloat16))
        self._allocate()

    def _allocate(self) -> None:
        spec = self.spec

        def zeros(width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.zeros(MAX_ROWS, width, dtype=dtype, device=self._device)

        self.x, self.gated = zeros(spec.hidden), zeros(spec.intermediate)
        self.q, self.attended = zeros(spec.heads * spec.head_dim), zeros(spec.heads * spec.head_dim)
        self.squares = torch.zeros(spec.hidden // _TILE, MAX_ROWS, device=self._device)
        self.logits = zeros(self.head.packed.padded_rows, torch.float32)

    def _linears(self) -> list[PackedLinear]:
        return [m for layer in self.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [self.head]

    @property
    def weight_bytes(self) -> int:
        """Bytes that a forward reads."""
        return sum(linear.packed.num_bytes for linear in self._linears())

    def move(self, device: torch.device) -> None:
        """Take the weights to another device; buffers stay where they are."""
        for linear in self._linears():
            linear.move(device)
        self.embedding = self.embedding.to(device)

    def _layer(self, weights: LayerWeights, window: int | None) -> _Layer:
        return _Layer(
            self._linear(weights.qkv, weights.attention_norm, kind="heads", head_dim=self.spec.head_dim),
            self._linear(weights.o),
            self._linear(weights.gate_up, weights.mlp_norm, kind="gated"),
            self._linear(weights.down),
            window,
        )

    def _linear(
        self, matrix: Matrix, norm: torch.Tensor | None = None, *, format: str | None = None, **options: Any
    ) -> PackedLinear:
        format = format or self._format
        weight, bias = matrix.weight().to(self._device), matrix.bias()
        if norm is not None:
            weight = weight.float() * norm.to(self._device)
        blocks = matrix.blocks() if format == "int4" and norm is None else None
        bias = None if bias is None else bias.to(self._device)
        linear = PackedLinear(weight, format, bias=bias, blocks=blocks, tuning=self._tuning, **options)
        del weight
        linear.settle()
        return linear

    # ---------- up to 64 rows: kernels ----------

    def kernels(self, layout: Layout, cache: PagedCache, shape: Shape, best: Any) -> None:
        """Launch a forward over `shape.rows` rows that `layout` describes; fills `logits` and the best tokens."""
        from paceline.execution.cuda.attention import attend
        from paceline.execution.cuda.fused import embed

        spec, rows, overlap = self.spec, shape.rows, self._tuning.overlap
        embed(self.embedding, layout, self.x, self.squares, rows, self._scale)
        norm: dict[str, Any] = {
            "squares": self.squares,
            "num_squares": spec.hidden // _TILE,
            "inv_width": 1 / spec.hidden,
            "eps": spec.norm_eps,
        }
        rotation: dict[str, Any] = {
            "rotary": self.rotary,
            "positions": layout.positions,
            "slots": layout.slots,
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "out_stride": spec.heads * spec.head_dim,
        }
        residual: dict[str, Any] = {"out_squares": self.squares}
        gelu = int(spec.activation == "gelu_tanh")
        for index, layer in enumerate(self.layers):
            keys, values = cache.keys[index], cache.values[index]
            # The first one waits for the embedding in full: later kernels read positions before they wait.
            first = index > 0
            layer.qkv.launch("qkv", rows, self.x, self.q, overlap=first, k_cache=keys, v_cache=values, **norm, **rotation)
            attend(
                self.q,
                keys,
                values,
                self.attended,
                layout,
                group=spec.heads // spec.kv_heads,
                rows=rows,
                blocks=shape.blocks,
                tokens=shape.block_tokens,
                chunks=shape.chunks,
                scale=spec.attention_scale,
                window=layer.window,
                overlap=overlap,
            )
            layer.o.launch("residual", rows, self.attended, self.x, **residual)
            layer.gate_up.launch("gated", rows, self.x, self.gated, gelu=gelu, **norm)
            layer.down.launch("residual", rows, self.gated, self.x, **residual)
        self.head.launch("logits", rows, self.x, self.logits, out_stride=self.logits.shape[1], **norm)
        best(self.logits, rows)

    def hidden(self, rows: int) -> torch.Tensor:
        """[rows, H] float32: the last forward's states after the final norm."""
        return self._normed(from_column_tiles(self.x)[:rows])

    # ---------- any number of rows of one chain: torch operators ----------

    def dense(
        self, tokens: Sequence[int], sequence: PagedSequence, cache: PagedCache, parents: Sequence[int] | None, wanted: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [wanted, V] and states after the final norm [wanted, H] of the last `wanted` rows of a segment; float32.

        The segment is staged in the cache. Any device; the reference of `kernels`.
        """
        spec, count, start = self.spec, len(tokens), sequence.committed
        depths, seen = _ancestry(parents, count, start)
        where = cache.addresses(sequence, start, start + count)
        pages = torch.tensor(sequence.pages, device=self._device)
        turn = self.rotary[(start + depths).to(self._device), None]
        mask, positions = seen.to(self._device), torch.cat([torch.arange(start), start + depths]).to(self._device)
        x = self.embedding[torch.tensor(tokens, device=self._device)] * self._scale
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv.dense(x, self._norm(x)).view(count, -1, spec.head_dim)
            q, k, v = torch.tensor_split(qkv, [spec.heads, spec.heads + spec.kv_heads], 1)
            cache.keys[index][where[0], :, where[1]] = _rotated(k, turn).to(torch.bfloat16)
            cache.values[index][where[0], :, where[1]] = v.to(torch.bfloat16)
            near = mask
            if layer.window is not None:
                near = mask & (positions[None, :] > positions[start:, None] - layer.window)
            attended = self._attend(_rotated(q, turn), cache.keys[index], cache.values[index], pages, near)
            x = (x + layer.o.dense(attended)).to(torch.bfloat16)
            gate, up = layer.gate_up.dense(x, self._norm(x)).chunk(2, -1)
            gate = F.silu(gate) if spec.activation == "silu" else F.gelu(gate, approximate="tanh")
            x = (x + layer.down.dense((gate * up).to(torch.bfloat16))).to(torch.bfloat16)
        x = x[count - wanted :]
        return self.head.dense(x, self._norm(x))[:, : spec.vocab], self._normed(x)

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """q [T, heads, D]; returns [T, heads * D] bfloat16."""
        group = self.spec.heads // self.spec.kv_heads
        length = seen.shape[1]

        def gathered(pool: torch.Tensor) -> torch.Tensor:
            flat = pool[pages].transpose(0, 1).flatten(1, 2)[:, :length]  # [kv heads, tokens, D]
            return flat.repeat_interleave(group, 0)[None]

        out = F.scaled_dot_product_attention(
            q.to(torch.bfloat16).transpose(0, 1)[None],
            gathered(keys),
            gathered(values),
            attn_mask=seen[None, None],
            scale=self.spec.attention_scale,
        )
        return out[0].transpose(0, 1).flatten(1)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """[T, 1] float32: what an RMS norm multiplies a row with (its weights are in the matrices)."""
        return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.spec.norm_eps)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() * self._norm(x) * self.final_norm


def _rotated(heads: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotary positions. heads [T, n, D] float32; turn [T, 1, D / 2, 2]."""
    low, high = heads.chunk(2, -1)
    cos, sin = turn.unbind(-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def _ancestry(parents: Sequence[int] | None, count: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth of each token, and which slots it sees: bool [count, start + count]."""
    if parents is None:
        return torch.arange(count), torch.ones(count, start + count, dtype=torch.bool).tril(start)
    depths = torch.zeros(count, dtype=torch.int64)
    seen = torch.zeros(count, start + count, dtype=torch.bool)
    seen[:, :start] = True
    for node, parent in enumerate(parents):
        if parent >= 0:
            depths[node] = depths[parent] + 1
            seen[node] = seen[parent]
        seen[node, start + node] = True
    return depths, seen

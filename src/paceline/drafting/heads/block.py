"""A head's decoder layer: a Llama-like block over a cache of its own, whose input and residual stream may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from paceline.drafting.heads.checkpoint import Checkpoint, Shape
from paceline.drafting.heads.target import HeadTarget
from paceline.execution.attention import PackedSegment, packed_attention
from paceline.execution.kvcache import KVCache
from paceline.execution.lean import Rotation
from paceline.execution.structure import LeanSpec, describe_structure

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")
_DEFAULT_HEADS = 32
"""Heads of a Llama whose config leaves them out, as configs do that hold only what differs from the defaults."""


def layer_spec(checkpoint: Checkpoint) -> LeanSpec:
    """The structure of the layer, from its settings and, where they leave a size out, from its tensors.

    Raises ModelError when tensors or settings are missing or of a kind that is not known.
    """
    tensors, given = checkpoint.tensors, dict(checkpoint.layer)
    needed = ("fc.weight", "layer.self_attn.q_proj.weight", "layer.self_attn.k_proj.weight", "layer.mlp.gate_proj.weight")
    missing = [name for name in needed if name not in tensors]
    if missing or not given:
        what = f"{', '.join(missing)} missing" if missing else "config.json is missing beside the weights"
        raise checkpoint.refuse(f"{what}; fetch the whole head")
    fused, query, key, gate = (tuple(tensors[name].shape) for name in needed)
    heads = int(given.get("num_attention_heads") or _DEFAULT_HEADS)
    head_dim = int(given.get("head_dim") or query[0] // heads)
    sizes: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": fused[0],
        "intermediate_size": gate[0],
        "num_attention_heads": heads,
        "num_key_value_heads": key[0] // max(head_dim, 1),
        "vocab_size": 1,
    }
    unstated = {name: value for name, value in sizes.items() if given.get(name) is None}
    spec = describe_structure({**given, **unstated, "head_dim": head_dim, "num_hidden_layers": 1})
    if isinstance(spec, str):
        raise checkpoint.refuse(f"its layer is not known: {spec}")
    if spec.family not in _MODEL_TYPES or spec.activation != "silu":
        raise checkpoint.refuse(f"its layer is a {spec.family} with {spec.activation}; known: {', '.join(_MODEL_TYPES)} with silu")
    return spec


def layer_shapes(checkpoint: Checkpoint, spec: LeanSpec, inputs: int) -> dict[str, Shape]:
    """The tensors of the block; biases where the head has them. inputs: width of what the attention reads."""
    attention, mlp = "layer.self_attn.", "layer.mlp."
    rows = dict(zip(_PROJECTIONS, (spec.heads, spec.kv_heads, spec.kv_heads), strict=True))
    shapes: dict[str, Shape] = {"layer.post_attention_layernorm.weight": (spec.hidden,)}
    for name, count in rows.items():
        shapes[f"{attention}{name}.weight"] = (count * spec.head_dim, inputs)
        if f"{attention}q_proj.bias" in checkpoint.tensors:
            shapes[f"{attention}{name}.bias"] = (count * spec.head_dim,)
    shapes[f"{attention}o_proj.weight"] = (spec.hidden, spec.heads * spec.head_dim)
    if f"{attention}o_proj.bias" in checkpoint.tensors:
        shapes[f"{attention}o_proj.bias"] = (spec.hidden,)
    for name in ("q_norm", "k_norm") if spec.qk_norm else ():
        shapes[f"{attention}{name}.weight"] = (spec.head_dim,)
    for name in ("gate_proj", "up_proj"):
        shapes[f"{mlp}{name}.weight"] = (spec.intermediate, spec.hidden)
    shapes[f"{mlp}down_proj.weight"] = (spec.hidden, spec.intermediate)
    return shapes


class DecoderBlock:
    """Attention, then a gated MLP; norms and sums in float32, as in `execution.lean`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], spec: LeanSpec, target: HeadTarget) -> None:
        """tensors: checked, under `layer.`."""
        self._spec = spec
        attention, mlp = "layer.self_attn.", "layer.mlp."
        qkv = torch.cat([tensors[f"{attention}{name}.weight"] for name in _PROJECTIONS])
        biases = [tensors[name] for name in (f"{attention}{part}.bias" for part in _PROJECTIONS) if name in tensors]
        self._qkv = target.linear(qkv, torch.cat(biases) if biases else None)
        self._o = target.linear(tensors[f"{attention}o_proj.weight"], tensors.get(f"{attention}o_proj.bias"))
        self._gate_up = target.linear(torch.cat([tensors[f"{mlp}{name}.weight"] for name in ("gate_proj", "up_proj")]))
        self._down = target.linear(tensors[f"{mlp}down_proj.weight"])
        self._mlp_norm = target.vector(tensors["layer.post_attention_layernorm.weight"])
        self._qk_norm: torch.Tensor | None = None
        if spec.qk_norm:
            norms = [target.vector(tensors[f"{attention}{name}.weight"]) for name in ("q_norm", "k_norm")]
            self._qk_norm = torch.stack([norms[0]] * spec.heads + [norms[1]] * spec.kv_heads)  # [Hq + Hkv, D]
        self._rotation = Rotation(spec.rope, target.device)
        self._dtype = torch.float32 if target.precision == "fp32" else torch.bfloat16
        self.weight_bytes = sum(linear.weight_bytes for linear in (self._qkv, self._o, self._gate_up, self._down))

    def __call__(
        self, inputs: torch.Tensor, residual: torch.Tensor, cache: KVCache, parents: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Run new rows behind the cache's committed ones; the caller commits them or lets them go.

        inputs: [T, I]; residual: [T, H] float32; parents: as in `Segment`, None for a chain. Returns [T, H] float32.
        """
        count = len(inputs)
        segment = PackedSegment(cache, range(-1, count - 1) if parents is None else parents, parents is None, 0)
        cache.stage(range(-1, count - 1) if parents is None else parents)
        x = residual + self._attend(inputs, segment).float()
        gate, up = self._gate_up(F.rms_norm(x, (self._spec.hidden,), self._mlp_norm, self._spec.norm_eps)).chunk(2, dim=-1)
        return x + self._down(F.silu(gate) * up).float()

    def _attend(self, inputs: torch.Tensor, segment: PackedSegment) -> torch.Tensor:
        spec = self._spec
        positions = torch.tensor(segment.positions, device=inputs.device)
        cos, sin = self._rotation.angles(positions)
        qkv = self._qkv(inputs).unflatten(1, (-1, spec.head_dim))  # type: ignore[no-untyped-call]  # [T, Hq + 2 Hkv, D]
        qk = qkv[:, : spec.heads + spec.kv_heads].float()
        if self._qk_norm is not None:
            qk = F.rms_norm(qk, (spec.head_dim,), None, spec.norm_eps) * self._qk_norm
        qk = torch.addcmul(qk * cos, qk.roll(spec.head_dim // 2, -1), sin).to(self._dtype).transpose(0, 1)
        values = qkv[:, spec.heads + spec.kv_heads :].to(self._dtype).transpose(0, 1)
        out = packed_attention(
            [segment],
            0,
            qk[: spec.heads],
            qk[spec.heads :],
            values,
            scale=spec.attention_scale,
            window=spec.windows[0],
        )
        return self._o(out.flatten(1))

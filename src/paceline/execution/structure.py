"""Decoder structures that the lean and native runners know: one block, with switches (ours).

The block is norm, merged q/k/v, optional q/k norm, rotary positions, attention, o, norm, merged gate/up, activation, down:
Llama, Mistral, Qwen2, Qwen3 and the Gemma family differ in switches only. `describe_structure` reads them from a config and says
why a model does not fit; `merged_weights` hands out the weights in the block's order and refuses what it does not recognise.
Needs torch, not transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from paceline.errors import ModelError
from paceline.models.base import ModelSource, QuantBlocks


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions: angle = position * inv_freq; cos and sin are multiplied by `attention_factor`.

    The second half of a head is paired with its first half (element i with i + head_dim / 2).
    """

    inv_freq: tuple[float, ...]
    """[head_dim / 2], scaling already applied."""
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class LeanSpec:
    """A decoder that the lean block can run, dimension by dimension and switch by switch."""

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm_eps: float
    activation: str
    """`silu`, `gelu` or `gelu_tanh`; applied to the gate."""
    attention_scale: float
    rope: RopeSpec
    local_rope: RopeSpec | None
    """Used instead of `rope` in layers with a window, if not None."""
    windows: tuple[int | None, ...]
    """Per layer: a token at position p sees positions above p - window (itself included); None: all."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each head of q and k, before the rotation."""
    tied: bool = False
    embed_scale: float = 1.0
    """The embedding is multiplied by this, rounded to the working dtype."""
    norm_plus_one: bool = False
    """Norm weights are stored as w - 1. `merged_weights` gives the effective ones."""
    sandwich_norms: bool = False
    """Attention's and the MLP's outputs are normalised before they are added to the residual stream."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def matrix_weights(self) -> tuple[int, int, int, int]:
        """Weights of q/k/v, o, gate/up and down of a layer."""
        heads = self.heads * self.head_dim
        qkv = (heads + 2 * self.kv_heads * self.head_dim) * self.hidden
        return qkv, heads * self.hidden, 2 * self.intermediate * self.hidden, self.intermediate * self.hidden

    def rope_of(self, layer: int) -> RopeSpec:
        """Rotary positions of a layer."""
        return self.local_rope if self.local_rope is not None and self.windows[layer] is not None else self.rope


_GEMMA = {"gemma", "gemma2", "gemma3_text"}
_FAMILIES = {"llama", "mistral", "qwen2", "qwen3"} | _GEMMA
_HEAD_DIM = {"qwen3": 128, **dict.fromkeys(_GEMMA, 256)}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def describe_structure(config: Mapping[str, Any]) -> LeanSpec | str:
    """The lean block's settings for a config (as in Hugging Face's config.json), or the reason why it does not fit."""
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        return f"model_type = {family!r} is not one of {', '.join(sorted(_FAMILIES))}"
    gemma = family in _GEMMA
    try:
        hidden, heads, layers = (int(config[k]) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        vocab, intermediate = int(config["vocab_size"]), int(config["intermediate_size"])
    except (KeyError, TypeError) as error:
        return f"config lacks a usable {error}"
    head_dim = int(config.get("head_dim") or _HEAD_DIM.get(family) or hidden // heads)
    act = config.get("hidden_activation") or config.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
    if gemma and act == "gelu":  # the published Gemma configs say gelu and mean the tanh form
        act = "gelu_pytorch_tanh"
    if act not in _ACTIVATIONS:
        return f"activation {act!r} is not one of {', '.join(_ACTIVATIONS)}"
    if config.get("use_bidirectional_attention"):
        return "use_bidirectional_attention is set: not a causal decoder"
    ropes = _ropes(config, head_dim)
    if isinstance(ropes, str):
        return ropes
    bias = bool(config.get("attention_bias", False)) and family != "mistral"
    scalar = config.get("query_pre_attn_scalar", 256) if family in ("gemma2", "gemma3_text") else head_dim
    softcap = {"gemma2": (50.0, 30.0)}.get(family, (None, None))
    return LeanSpec(
        family=family,
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        intermediate=intermediate,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=_ACTIVATIONS[act],
        attention_scale=float(scalar) ** -0.5,
        rope=ropes[0],
        local_rope=ropes[1],
        windows=_windows(config, family, layers),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and family == "llama",
        qk_norm=family in ("qwen3", "gemma3_text"),
        tied=bool(config.get("tie_word_embeddings", gemma)),
        embed_scale=hidden**0.5 if gemma else 1.0,
        norm_plus_one=gemma,
        sandwich_norms=family in ("gemma2", "gemma3_text"),
        attention_softcap=config.get("attn_logit_softcapping", softcap[0]) if gemma else None,
        logit_softcap=config.get("final_logit_softcapping", softcap[1]) if gemma else None,
    )


def _windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer, by the family's own rules."""
    window = config.get("sliding_window", None if family in ("llama", "gemma") else 4096)
    if family in ("llama", "gemma") or window is None:
        return (None,) * layers
    if family == "mistral":
        return (int(window),) * layers
    if family in ("qwen2", "qwen3"):
        if not config.get("use_sliding_window", False):
            return (None,) * layers
        sliding = [i >= config.get("max_window_layers", 28) for i in range(layers)]
    else:
        pattern = 2 if family == "gemma2" else int(config.get("sliding_window_pattern") or 6)
        sliding = [(i + 1) % pattern != 0 for i in range(layers)]
    types = config.get("layer_types")
    if types is not None:
        sliding = [kind == "sliding_attention" for kind in types]
    return tuple(int(window) if slides else None for slides in sliding)


def _ropes(config: Mapping[str, Any], head_dim: int) -> tuple[RopeSpec, RopeSpec | None] | str:
    """Global and (Gemma 3) local rotary positions from either spelling of the config, or why not."""
    settings: dict[str, Any] = dict(config.get("rope_parameters") or {})
    if not settings:
        settings = dict(config.get("rope_scaling") or {})
        settings.setdefault("rope_theta", config.get("rope_theta"))
    if config.get("model_type") != "gemma3_text":
        return _rope(settings, head_dim, 10_000.0) if "full_attention" not in settings else "rope_parameters differ between layers"
    local = settings.pop("sliding_attention", None) or {"rope_theta": config.get("rope_local_base_freq")}
    whole = _rope(settings.pop("full_attention", None) or settings, head_dim, 1_000_000.0)
    near = _rope(local, head_dim, 10_000.0)
    if isinstance(whole, str) or isinstance(near, str):
        return whole if isinstance(whole, str) else str(near)
    return whole[0], near[0]


def _rope(settings: Mapping[str, Any], head_dim: int, default_theta: float) -> tuple[RopeSpec, None] | str:
    """One set of inverse frequencies (arXiv 2104.09864; linear and Llama 3 scaling), or why not."""
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if float(settings.get("partial_rotary_factor") or 1.0) != 1.0:
        return "partial_rotary_factor is not 1"
    if kind not in ("default", "linear", "llama3"):
        return f"rope_type = {kind!r} is not one of default, linear, llama3"
    theta = float(settings.get("rope_theta") or default_theta)
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if kind == "linear":
        inv_freq = inv_freq / float(settings["factor"])
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, settings)
    return RopeSpec(tuple(inv_freq.tolist())), None


def _llama3(inv_freq: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """Long wavelengths are divided by `factor`, short ones stay, those between are blended linearly."""
    factor, low, high = (float(settings[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(settings["original_max_position_embeddings"]) * inv_freq / (2 * math.pi)  # within the trained context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / factor


@dataclass(frozen=True)
class Matrix:
    """A linear layer: one or several of the source's matrices stacked along their outputs. Loads when asked."""

    source: ModelSource
    names: tuple[str, ...]
    """Parameter names of the parts, in row order."""
    bias_names: tuple[str, ...] = ()

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(out, in), from the parts."""
        shapes = [tuple(self.source.tensors()[name].shape) for name in self.names]
        return sum(s[0] for s in shapes), shapes[0][1]

    def weight(self) -> torch.Tensor:
        """[out, in] in the source's precision (a fresh tensor if stacked)."""
        return self._stacked(self.names)

    def bias(self) -> torch.Tensor | None:
        """[out], or None."""
        return self._stacked(self.bias_names) if self.bias_names else None

    def blocks(self) -> QuantBlocks | None:
        """The file's own quantised blocks, stacked like the weight; None unless all parts have some of the same width."""
        parts = [self.source.quant_blocks(name) for name in self.names]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts) or len({p.bits for p in known}) != 1:
            return None
        if len(known) == 1:
            return known[0]
        stacked = [np.concatenate([getattr(p, f) for p in known]) for f in ("quants", "scales", "offsets")]
        return QuantBlocks(stacked[0], stacked[1], stacked[2], known[0].bits)

    def _stacked(self, names: tuple[str, ...]) -> torch.Tensor:
        tensors = self.source.tensors()
        return tensors[names[0]] if len(names) == 1 else torch.cat([tensors[name] for name in names])


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. Norm weights are effective multipliers (Gemma's + 1 is applied), float32."""

    attention_norm: torch.Tensor
    qkv: Matrix
    """Rows: heads * head_dim of q, then kv_heads * head_dim of k, then of v."""
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Matrix
    attention_out_norm: torch.Tensor | None
    """Of attention's output, before the residual sum (sandwich norms)."""
    mlp_norm: torch.Tensor
    gate_up: Matrix
    """Rows: intermediate of gate, then of up."""
    down: Matrix
    mlp_out_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights of a decoder in the order in which a pass needs them."""

    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Matrix
    """The embedding itself when tied."""


def merged_weights(source: ModelSource, spec: LeanSpec) -> ModelWeights:
    """The source's weights in the lean block's order; matrices load lazily, norms now.

    Raises ModelError when a weight is missing, or when one is there that the block would not use.
    """
    used: set[str] = set()

    def matrix(prefix: str, parts: tuple[str, ...], bias: bool) -> Matrix:
        names = tuple(f"{prefix}{p}.weight" for p in parts)
        bias_names = tuple(f"{prefix}{p}.bias" for p in parts) if bias else ()
        used.update(names, bias_names)
        return Matrix(source, names, bias_names)

    def norm(name: str) -> torch.Tensor:
        used.add(f"{name}.weight")
        weight = _need(source, f"{name}.weight").float()
        return weight + 1.0 if spec.norm_plus_one else weight

    def layer(at: str) -> LayerWeights:
        second = "pre_feedforward_layernorm" if spec.sandwich_norms else "post_attention_layernorm"
        return LayerWeights(
            attention_norm=norm(at + "input_layernorm"),
            qkv=matrix(at + "self_attn.", ("q_proj", "k_proj", "v_proj"), spec.qkv_bias),
            q_norm=norm(at + "self_attn.q_norm") if spec.qk_norm else None,
            k_norm=norm(at + "self_attn.k_norm") if spec.qk_norm else None,
            o=matrix(at + "self_attn.", ("o_proj",), spec.o_bias),
            attention_out_norm=norm(at + "post_attention_layernorm") if spec.sandwich_norms else None,
            mlp_norm=norm(at + second),
            gate_up=matrix(at + "mlp.", ("gate_proj", "up_proj"), spec.mlp_bias),
            down=matrix(at + "mlp.", ("down_proj",), spec.mlp_bias),
            mlp_out_norm=norm(at + "post_feedforward_layernorm") if spec.sandwich_norms else None,
        )

    weights = ModelWeights(
        embedding=matrix("model.", ("embed_tokens",), False),
        layers=tuple(layer(f"model.layers.{i}.") for i in range(spec.layers)),
        final_norm=norm("model.norm"),
        head=matrix("model.", ("embed_tokens",), False) if spec.tied else matrix("", ("lm_head",), False),
    )
    _check_names(source, spec, used)
    return weights


def _need(source: ModelSource, name: str) -> torch.Tensor:
    tensors = source.tensors()
    if name not in tensors:
        raise ModelError(f"{source.name}: weight {name} is missing; the file is incomplete, or not the model that its config says")
    return tensors[name]


def _check_names(source: ModelSource, spec: LeanSpec, used: set[str]) -> None:
    present = set(source.tensors())
    missing = sorted(used - present)
    if missing:
        _need(source, missing[0])
    ignored = {"lm_head.weight"} if spec.tied else set()
    extra = sorted(n for n in present - used - ignored if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise ModelError(f"{source.name}: weight {extra[0]} has no place in a {spec.family} block; use backend = 'hf'")

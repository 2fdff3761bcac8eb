"""Attention of packed tokens over their own sequences: chain, tree and ragged batch are one thing.

A forward packs the new tokens of all segments into one row [1, T]. Each token attends to its sequence's committed prefix, its
ancestors and itself. `reference_attention` is the readable form; `fused_attention` gives the same through torch's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from paceline.errors import ModelError, OptionError
from paceline.execution.kvcache import KVCache

ATTENTION_NAME = "paceline"
"""Our name in transformers' attention interface; no mask builder has it, so models build no mask."""


class PackedSegment:
    """One segment's place in the packed row, and who sees whom in it."""

    def __init__(self, cache: KVCache, parents: Sequence[int], is_chain: bool, start: int) -> None:
        """parents: index of each token's parent, -1 for none. Raises OptionError unless parents come before children."""
        self.cache = cache
        self.start = start
        self.count = len(parents)
        self.prefix = cache.length
        self._parents = parents
        self._is_chain = is_chain
        self._masks: dict[int | None, torch.Tensor | None] = {}
        depths: list[int] = []
        for i, parent in enumerate(parents):
            if not -1 <= parent < i:
                raise OptionError(f"parents[{i}] = {parent}: must be -1 or the index of an earlier token")
            depths.append(0 if parent < 0 else depths[parent] + 1)
        self.positions = [self.prefix + cache.shift + depth for depth in depths]
        """Position of each new token: committed length + depth, shifted where the cache keeps only some rows."""
        self.mass: list[torch.Tensor] | None = None
        """When a list: each layer adds [Hkv, prefix + count], the attention that the new tokens give to each slot."""

    def mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        """[count, prefix + count] bool, True where a token may look; None where all may look everywhere.

        window: a token at position p sees positions above p - window; slots of a tree share positions, so the test is by
        position, never by slot.
        """
        if window is not None and window > max(self.positions, default=0):
            window = None
        if window not in self._masks:
            self._masks[window] = self._build_mask(window, device)
        return self._masks[window]

    def _build_mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        if self.count == 1 and window is None:
            return None
        mask = torch.ones(self.count, self.prefix + self.count, dtype=torch.bool, device=device)
        mask[:, self.prefix :] = self._ancestors(device)
        if window is not None:
            queries = torch.tensor(self.positions, device=device)
            prefix = torch.arange(self.prefix, device=device) + self.cache.shift  # true in windowed layers: they keep last rows
            keys = torch.cat([prefix, queries])
            mask &= queries[:, None] - keys[None, :] < window
        return mask

    def _ancestors(self, device: torch.device) -> torch.Tensor:
        """[count, count] bool: row i marks i and its ancestors."""
        if self._is_chain:
            return torch.ones(self.count, self.count, dtype=torch.bool, device=device).tril_()
        seen = np.eye(self.count, dtype=bool)
        for i, parent in enumerate(self._parents):
            if parent >= 0:
                seen[i] |= seen[parent]
        return torch.from_numpy(seen).to(device)


def reference_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention with grouped heads, softmax in float32 (arXiv 2305.13245 for the grouping).

    query: [Hq, T, D]; keys: [Hkv, S, D]; values: [Hkv, S, Dv]; Hq a multiple of Hkv, query heads of a group are neighbours.
    mask: [T, S] bool or None. softcap: scores become softcap * tanh(score / softcap) before the mask.
    Returns [T, Hq, Dv] in query's dtype.
    """
    heads, count, _ = query.shape
    groups = heads // keys.shape[0]
    grouped = query.reshape(keys.shape[0], groups * count, -1)
    weights = _weights(grouped, keys, None if mask is None else mask.repeat(groups, 1), scale, softcap).to(query.dtype)
    return torch.matmul(weights, values).reshape(heads, count, -1).transpose(0, 1)


def _weights(
    grouped: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """[Hkv, groups * T, S] float32: attention of each grouped query row."""
    scores = torch.matmul(grouped, keys.transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def attention_received(
    query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """[Hkv, S] float32: the weights of `reference_attention`, summed over rows and over the heads of a group."""
    heads, count, _ = query.shape
    groups = heads // keys.shape[0]
    grouped = query.reshape(keys.shape[0], groups * count, -1)
    return _weights(grouped, keys, None if mask is None else mask.repeat(groups, 1), scale, softcap).sum(dim=1)


def fused_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """As `reference_attention` without softcap, through torch's fused kernels.

    A group's query heads are folded into rows, so that keys and values are never repeated.
    """
    heads, count, _ = query.shape
    groups = heads // keys.shape[0]
    grouped = query.reshape(1, keys.shape[0], groups * count, -1)
    folded = None if mask is None else mask.repeat(groups, 1)
    out = F.scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=folded, scale=scale)
    return out.reshape(heads, count, -1).transpose(0, 1)


def packed_attention(
    pack: Sequence[PackedSegment],
    layer: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Store the new keys and values of a layer in each sequence's cache, and attend.

    query: [Hq, T, D], keys and values: [Hkv, T, D], T the tokens of all segments in order. Returns [T, Hq, D].
    """
    outs = []
    for segment in pack:
        rows = slice(segment.start, segment.start + segment.count)
        all_keys, all_values = segment.cache.write(layer, keys[:, rows], values[:, rows])
        if window is not None:
            segment.cache.windowed.add(layer)
        mask = segment.mask(window, query.device)
        if segment.mass is not None:
            segment.mass.append(attention_received(query[:, rows], all_keys, mask, scale, softcap))
        if softcap is None:
            outs.append(fused_attention(query[:, rows], all_keys, all_values, mask, scale))
        else:
            outs.append(reference_attention(query[:, rows], all_keys, all_values, mask, scale, softcap))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict", "is_causal"}


def interface_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pack: Sequence[PackedSegment],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' models call under our name: query [1, Hq, T, D] in, [1, T, Hq, D] out.

    Raises ModelError when the model asks for something that this attention would get wrong.
    """
    if attention_mask is not None:
        raise ModelError("the model builds an attention mask of its own; trees and packed batches cannot honour it")
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _HARMLESS)
    if unknown or dropout or others.get("is_causal") is False:
        raise ModelError(f"the model's attention wants {', '.join(unknown) or 'dropout or a view of later tokens'}: not supported")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if sliding_window is None:
        sliding_window = _window_of(getattr(module, "config", None), layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_attention(pack, layer, query[0], key[0], value[0], scale=scale, window=sliding_window, softcap=softcap)
    return out[None], None


def _window_of(config: Any, layer: int) -> int | None:
    """Window of a layer whose model states it in the config only (it would have put it into a mask)."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None or kinds[layer] != "sliding_attention":
        return None
    return int(config.sliding_window)


def register() -> None:
    """Make `ATTENTION_NAME` known to transformers. Harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, interface_attention)

"""A model's first layers and the top of its vocabulary, as a source: enough to time a step, small enough to load twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from paceline.models.base import ModelSource, QuantBlocks, Tokenizer

_WEIGHTS = 32_000_000
"""Weights to keep at least, so that a step still reads more than caches hold."""
_VOCABULARY = 4096
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_VOCABULARY_ROWS = ("model.embed_tokens.weight", "lm_head.weight")


class FirstLayers(ModelSource):
    """A Llama-like source cut to its first layers and `_VOCABULARY` tokens."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self.name, self.fingerprint = f"{source.name} (part)", f"{source.fingerprint} (part)"
        config = dict(source.config)
        each = int(config["hidden_size"]) * (2 * int(config["hidden_size"]) + 3 * int(config["intermediate_size"]))
        self._layers = min(int(config["num_hidden_layers"]), max(2, _WEIGHTS // each))
        self._vocabulary = min(int(config["vocab_size"]), _VOCABULARY)
        config.update(num_hidden_layers=self._layers, vocab_size=self._vocabulary)
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][: self._layers]
        self.config: dict[str, Any] = config

    @property
    def max_context(self) -> int:
        return min(self._source.max_context, 256)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._source.tokenizer

    @property
    def is_quantised(self) -> bool:
        return self._source.is_quantised

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return _Part(self._source.tensors(), self._layers, self._vocabulary)

    def quant_blocks(self, name: str) -> QuantBlocks | None:
        blocks = self._source.quant_blocks(name)
        if blocks is None or name not in _VOCABULARY_ROWS:
            return blocks
        top = slice(self._vocabulary)
        return replace(blocks, quants=blocks.quants[top], scales=blocks.scales[top], offsets=blocks.offsets[top])

    def hf_model(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        raise NotImplementedError("a part of a model is run by the lean and native runners only")


class _Part(Mapping[str, torch.Tensor]):
    """The tensors that are left, still loaded lazily."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], layers: int, vocabulary: int) -> None:
        self._tensors, self._vocabulary = tensors, vocabulary
        self._names = [n for n in tensors if (found := _LAYER.search(n)) is None or int(found[1]) < layers]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._tensors[name]
        return tensor[: self._vocabulary] if name in _VOCABULARY_ROWS else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

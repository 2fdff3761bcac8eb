"""Cost-expanded targets: a checkpoint embedded in a larger shape, which answers as the small model and costs as the large one.

Widths are padded with zeros and extra layers add nothing, so the function stays; every weight that meets a zero is random, so
the cost is real. It separates cost from acceptance, which no pair of published models does. Say "SmolLM2-135M at 8B cost"
wherever such a figure is shown. Idea: function-preserving growth (Net2Net, arXiv 1511.05641, section 2.2), here for cost, not
for training.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paceline.errors import ModelError, OptionError
from paceline.models.base import ModelSource, Tokenizer
from paceline.models.lazy import HEAD, LazyTensors, stored_name

_FAMILIES = ("llama", "mistral")
_DEVIATION = 0.02
_LAYER = "model.layers."


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder's size. Query heads follow from the source's group size; the head size stays."""

    hidden: int
    layers: int
    kv_heads: int
    intermediate: int


SHAPES = {
    "1b": Shape(hidden=2304, layers=32, kv_heads=6, intermediate=4608),
    "8b": Shape(hidden=4608, layers=32, kv_heads=12, intermediate=14336),
    "30b": Shape(hidden=6912, layers=60, kv_heads=12, intermediate=20480),
}
"""Sizes for a source with groups of 3 heads of 64 and at most 32 layers, such as SmolLM2-135M."""


class UpscaledSource(ModelSource):
    """A Llama-like source in a larger shape. Tensors are made when asked for, always the same ones."""

    def __init__(self, source: ModelSource, shape: Shape, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> None:
        """device, dtype: of the tensors.

        Raises ModelError for a family that cannot grow, OptionError for a shape that is too small.
        """
        config = source.config
        if config.get("model_type") not in _FAMILIES or config.get("sliding_window"):
            raise ModelError(
                f"{source.name}: model_type = {config.get('model_type')!r} cannot be upscaled, only "
                f"{', '.join(_FAMILIES)} without a sliding window"
            )
        self._source, self._shape, self._device, self._dtype = source, shape, device, dtype
        self._small = _Sizes.of(config)
        self._large = self._small.grown(shape)
        self.name = f"{source.name} at the cost of {shape.hidden} x {shape.layers}"
        self.fingerprint = f"{source.fingerprint} upscaled {shape}"
        self.config = _grown_config(config, self._small, self._large)
        self._home = _spread(self._small.layers, shape.layers)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._source.tokenizer

    def tensors(self) -> Mapping[str, torch.Tensor]:
        names = [n for n in self._source.tensors() if not n.startswith(_LAYER) and n != HEAD] + [HEAD]
        parts = [n.removeprefix(f"{_LAYER}0.") for n in self._source.tensors() if n.startswith(f"{_LAYER}0.")]
        names += [f"{_LAYER}{i}.{part}" for i in range(self._shape.layers) for part in parts]
        return LazyTensors(names, self._tensor)

    def hf_model(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = LlamaForCausalLM(LlamaConfig(**self.config))
        finally:
            torch.set_default_dtype(usual)
        made = self.tensors()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(made[name])
        return model.eval()  # type: ignore[no-any-return]

    def _tensor(self, name: str) -> torch.Tensor:
        if name.startswith(_LAYER):
            index, _, part = name.removeprefix(_LAYER).partition(".")
            home = self._home.get(int(index))
            small = None if home is None else self._source.tensors()[f"{_LAYER}{home}.{part}"]
        else:
            stored = self._source.tensors()
            part, small = name, stored[stored_name(name, stored)]
        small = None if small is None else small.to(self._device, torch.float32)
        if part.endswith("norm.weight"):
            return self._norm(small)
        rows, columns = self._large.matrix(part)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        matrix = torch.empty(rows, columns, device=self._device, dtype=self._dtype)
        matrix.normal_(0, _DEVIATION, generator=generator)
        if part.endswith("embed_tokens.weight"):
            matrix[:, self._small.hidden :] = 0
        elif part.endswith(("o_proj.weight", "down_proj.weight")):  # what they write beyond the small width, and beyond its layers
            matrix[0 if small is None else self._small.hidden :] = 0
            if small is not None:  # other heads and units are random: they must not be heard
                matrix[: self._small.hidden] = 0
        if small is not None:
            matrix[: small.shape[0], : small.shape[1]] = small.to(self._dtype)
        return matrix

    def _norm(self, small: torch.Tensor | None) -> torch.Tensor:
        """Norm weights. The mean square shrinks with the share of used inputs, and the weights with its root."""
        weight = torch.ones(self._shape.hidden, device=self._device)
        if small is not None:
            weight[: len(small)] = small * math.sqrt(self._small.hidden / self._shape.hidden)
        return weight


@dataclass(frozen=True, slots=True)
class _Sizes:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Sizes:
        heads = int(config["num_attention_heads"])
        return cls(
            hidden=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
        )

    def grown(self, shape: Shape) -> _Sizes:
        """The large sizes. Raises OptionError when one is smaller than this."""
        for name in ("hidden", "layers", "kv_heads", "intermediate"):
            small, large = getattr(self, name), getattr(shape, name)
            if large < small:
                raise OptionError(f"{name} = {large}: must be at least the source's {small}")
        group = self.heads // self.kv_heads
        return _Sizes(
            shape.hidden, shape.layers, shape.kv_heads * group, shape.kv_heads, self.head_dim, shape.intermediate, self.vocab
        )

    def matrix(self, part: str) -> tuple[int, int]:
        """[out, in] of a matrix by its name within a layer, or of the embedding or head."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
            "embed_tokens": (self.vocab, self.hidden),
            "lm_head": (self.vocab, self.hidden),
        }
        kind = part.removesuffix(".weight").rpartition(".")[2]
        if kind not in shapes or not part.endswith(".weight"):
            raise ModelError(f"weight {part}: has no place in an upscaled model; only plain Llama blocks without biases grow")
        return shapes[kind]


def _grown_config(config: Mapping[str, Any], small: _Sizes, large: _Sizes) -> dict[str, Any]:
    return {
        **config,
        "model_type": "llama",
        "hidden_size": large.hidden,
        "num_hidden_layers": large.layers,
        "num_attention_heads": large.heads,
        "num_key_value_heads": large.kv_heads,
        "head_dim": large.head_dim,
        "intermediate_size": large.intermediate,
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)) * small.hidden / large.hidden,
        "tie_word_embeddings": False,
    }


def _spread(small: int, large: int) -> dict[int, int]:
    """Which large layer carries which small one: evenly spread, first and last included."""
    if small == 1:
        return {0: 0}
    return {round(i * (large - 1) / (small - 1)): i for i in range(small)}

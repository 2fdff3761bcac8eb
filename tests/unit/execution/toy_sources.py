"""Tiny random models of transformers, as sources: no weights, no network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paceline.execution.base import ForwardOutput, Runner, Segment, SequenceHandle
from paceline.models.base import ModelSource, Tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_COMMON, "tie_word_embeddings": True},
    "llama3": {
        "model_type": "llama",
        **_COMMON,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_linear": {
        "model_type": "llama",
        **_COMMON,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    },
    "qwen2": {"model_type": "qwen2", **_COMMON},
    "qwen2_sliding": {
        "model_type": "qwen2",
        **_COMMON,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **_COMMON, "head_dim": 16},
    "mistral": {"model_type": "mistral", **_COMMON, "sliding_window": 6},
    "gemma": {"model_type": "gemma", **_COMMON, "head_dim": 16},
    "gemma2": {"model_type": "gemma2", **_COMMON, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24},
    "gemma3": {
        "model_type": "gemma3_text",
        **_COMMON,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 5,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi": {"model_type": "phi", **_COMMON, "partial_rotary_factor": 0.5},
    "gpt_neox": {"model_type": "gpt_neox", **_COMMON},
}

EXTRA_CONFIGS: dict[str, dict[str, Any]] = {}
"""Models of single test files; not part of the sweeps over CONFIGS."""


@lru_cache
def stock_model(name: str) -> torch.nn.Module:
    """The model of transformers itself, with its own eager attention, random float32 weights, biases and norms."""
    torch.manual_seed(7)
    settings = dict((CONFIGS | EXTRA_CONFIGS)[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class ToySource(ModelSource):
    """A random model under a name of CONFIGS."""

    def __init__(self, name: str) -> None:
        self.name = self.fingerprint = name
        self.config = stock_model(name).config.to_dict()

    @property
    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {k: v.detach() for k, v in stock_model(self.name).state_dict().items()}

    def hf_model(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        return copy.deepcopy(stock_model(self.name)).to(device=device, dtype=dtype)


def stock_logits(name: str, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] float32 of the model's own forward over a whole text."""
    with torch.inference_mode():
        return stock_model(name)(torch.tensor([list(tokens)]), use_cache=False).logits[0]


def feed(runner: Runner, sequence: SequenceHandle, tokens: Sequence[int]) -> ForwardOutput:
    """Feed and commit a chain."""
    out = runner.forward([Segment(sequence, tokens)])
    runner.accept(sequence, range(len(tokens)))
    return ForwardOutput(out.logits.clone())


def random_tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, _COMMON["vocab_size"], (count,), generator=generator).tolist()

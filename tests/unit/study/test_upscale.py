"""A small model in a large shape answers as the small one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.errors import ModelError, OptionError
from paceline.models.base import ModelSource, Tokenizer
from paceline.models.resolve import open_model
from paceline.models.upscale import SHAPES, Shape, UpscaledSource

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LARGE = Shape(hidden=96, layers=5, kv_heads=4, intermediate=120)
TOKENS = torch.tensor([[5, 17, 60, 3, 3, 21, 9, 40]])


@lru_cache
def small_model() -> torch.nn.Module:
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class SmallSource(ModelSource):
    """The model above, with its configuration changed at will."""

    def __init__(self, **changes: object) -> None:
        self.name = self.fingerprint = "small"
        self.config = {**CONFIG, **changes}

    @property
    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {k: v.detach() for k, v in small_model().state_dict().items() if k != "lm_head.weight"}

    def hf_model(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        raise NotImplementedError


def large(shape: Shape = LARGE) -> UpscaledSource:
    return UpscaledSource(SmallSource(), shape, dtype=torch.float32)


def test_the_large_model_has_the_small_ones_logits() -> None:
    with torch.inference_mode():
        want = small_model()(TOKENS).logits
        got = large().hf_model(torch.float32, "cpu")(TOKENS).logits
    assert torch.allclose(got, want, atol=2e-4)


def test_it_costs_what_its_shape_says() -> None:
    tensors = large().tensors()
    assert sum(name.endswith("q_proj.weight") for name in tensors) == 5
    assert tensors["model.layers.4.mlp.gate_proj.weight"].shape == (120, 96)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (12 * 8, 96)
    assert tensors["lm_head.weight"].shape == (61, 96)


def test_a_tensor_is_the_same_each_time_and_has_no_cheap_zero_rows_where_inputs_are_zero() -> None:
    source = large()
    name = "model.layers.0.mlp.up_proj.weight"
    first = source.tensors()[name]
    assert torch.equal(first, source.tensors()[name])
    assert (first[:, 48:] != 0).any(0).all()
    assert (first[40:] != 0).any(1).all()


def test_first_and_last_layer_carry_the_small_models_first_and_last() -> None:
    tensors, stored = large().tensors(), small_model().state_dict()
    for large_index, small_index in ((0, 0), (2, 1), (4, 2)):
        part = "self_attn.k_proj.weight"
        got = tensors[f"model.layers.{large_index}.{part}"][:16, :48]
        assert torch.equal(got, stored[f"model.layers.{small_index}.{part}"])


@pytest.mark.parametrize("field", ["hidden", "layers", "kv_heads", "intermediate"])
def test_a_shape_that_is_too_small_is_refused(field: str) -> None:
    sizes = {"hidden": 96, "layers": 5, "kv_heads": 4, "intermediate": 120, field: 1}
    with pytest.raises(OptionError, match=f"{field} = 1: must be at least"):
        large(Shape(**sizes))


def test_a_family_that_cannot_grow_is_refused() -> None:
    with pytest.raises(ModelError, match="model_type = 'gpt2'"):
        UpscaledSource(SmallSource(model_type="gpt2"), LARGE)
    with pytest.raises(ModelError, match="without a sliding window"):
        UpscaledSource(SmallSource(model_type="mistral", sliding_window=16), LARGE)


def test_sizes_are_named_by_what_they_cost() -> None:
    def billions(shape: Shape) -> float:
        group, width = 3, 64
        attention = shape.hidden * shape.kv_heads * width * (2 * group + 2)
        return (shape.layers * (attention + 3 * shape.hidden * shape.intermediate) + 2 * 49152 * shape.hidden) / 1e9

    assert {name: round(billions(shape)) for name, shape in SHAPES.items()} == {"1b": 1, "8b": 8, "30b": 29}


@pytest.mark.parametrize("name", ["upscaled:9b:default", "upscaled:8b", "upscaled:8b:"])
def test_a_name_without_a_known_shape_or_a_model_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="upscaled:SHAPE:MODEL with a shape of 1b, 8b, 30b"):
        open_model(name)

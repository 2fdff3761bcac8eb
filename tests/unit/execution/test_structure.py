"""What the lean block accepts, what it reads from a config, and that no weight is overlooked."""

import pytest
import torch

from paceline.errors import ModelError
from paceline.execution.structure import describe_structure, merged_weights
from unit.execution.toy_sources import ToySource

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


class Edited(ToySource):
    def __init__(self, name, remove=(), add=()):
        super().__init__(name)
        self._remove, self._add = remove, add

    def tensors(self):
        kept = {k: v for k, v in super().tensors().items() if k not in self._remove}
        return kept | {name: torch.zeros(1) for name in self._add}


def test_defaults_of_a_short_config():
    spec = describe_structure(LLAMA)
    assert (spec.kv_heads, spec.head_dim, spec.activation, spec.tied) == (4, 16, "silu", False)
    assert spec.windows == (None,) * 4
    assert spec.rope.inv_freq[0] == 1.0
    assert spec.rope.inv_freq[1] == pytest.approx(10_000 ** (-1 / 8))


def test_old_and_new_spelling_of_rotary_settings_agree():
    old = describe_structure(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = describe_structure(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})
    assert old == new
    assert old.rope.inv_freq[0] == 0.5


def test_gemma3_layers_take_their_own_window_and_rotation():
    config = LLAMA | {"model_type": "gemma3_text", "sliding_window": 512, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    spec = describe_structure(config | {"num_hidden_layers": 7, "head_dim": 16})
    assert spec.windows == (512,) * 5 + (None, 512)
    assert spec.rope_of(5).inv_freq[1] == pytest.approx(1e6 ** (-1 / 8))
    assert spec.rope_of(6).inv_freq[1] == pytest.approx(1e4 ** (-1 / 8))
    assert (spec.norm_plus_one, spec.sandwich_norms, spec.qk_norm, spec.embed_scale) == (True, True, True, 8.0)


def test_qwen2_windows_only_when_switched_on():
    config = LLAMA | {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 3}
    assert describe_structure(config).windows == (None,) * 4
    assert describe_structure(config | {"use_sliding_window": True}).windows == (None, None, None, 8)
    assert describe_structure(config).qkv_bias
    assert not describe_structure(config).o_bias


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba'"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "causal"),
        ({"hidden_size": None}, "config lacks"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(change, reason):
    assert reason in describe_structure(LLAMA | change)


def test_matrices_are_merged_in_order():
    source = ToySource("qwen2")
    weights = merged_weights(source, describe_structure(source.config))
    qkv, tensors = weights.layers[1].qkv, source.tensors()
    at = "model.layers.1.self_attn."
    assert qkv.shape == (64, 32)
    assert torch.equal(qkv.weight(), torch.cat([tensors[f"{at}{p}_proj.weight"] for p in "qkv"]))
    assert torch.equal(qkv.bias(), torch.cat([tensors[f"{at}{p}_proj.bias"] for p in "qkv"]))
    assert weights.layers[1].o.bias() is None
    assert qkv.blocks() is None


def test_gemma_norms_come_as_multipliers():
    source = ToySource("gemma3")
    weights = merged_weights(source, describe_structure(source.config))
    assert torch.equal(weights.final_norm, source.tensors()["model.norm.weight"] + 1)


def test_missing_and_unknown_weights_are_refused_by_name():
    spec = describe_structure(ToySource("llama").config)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        merged_weights(Edited("llama", remove=["model.norm.weight"]), spec)
    with pytest.raises(ModelError, match=r"down_proj\.weight is missing"):
        merged_weights(Edited("llama", remove=["model.layers.0.mlp.down_proj.weight"]), spec)
    with pytest.raises(ModelError, match=r"q_proj\.bias has no place"):
        merged_weights(Edited("llama", add=["model.layers.0.self_attn.q_proj.bias"]), spec)
    merged_weights(Edited("llama", add=["model.layers.0.self_attn.rotary_emb.inv_freq"]), spec)

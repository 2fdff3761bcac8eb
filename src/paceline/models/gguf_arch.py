"""From a GGUF's metadata and tensor names to Hugging Face's: configuration, parameter names, and what llama.cpp changed.

Adding an architecture whose blocks are Llama-like is one entry of ARCHITECTURES.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline.errors import ModelError
from paceline.models.gguf_file import GGUFContents

Metadata = Mapping[str, Any]

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ROPE_FACTORS = "rope_freqs.weight"


def _silu(_: Metadata, __: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu"}


def _gemma3_config(meta: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if layers == 62 else config["head_dim"],
        "sliding_window": meta["gemma3.attention.sliding_window"],
        "rope_local_base_freq": 10000.0,
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)],
    }


@dataclass(frozen=True, slots=True)
class Architecture:
    """How llama.cpp names and stores one family."""

    model_type: str
    causal_lm: str
    blocks: Mapping[str, str]
    """Tensor name inside a block -> parameter name inside a decoder layer."""
    interleaved_rope: bool = False
    """llama.cpp stored rows of q and k so that the two halves of a rotary pair are neighbours."""
    norms_plus_one: bool = False
    """Norm weights are stored as 1 + the model definition's weight."""
    more_config: Callable[[Metadata, dict[str, Any]], dict[str, Any]] = _silu
    """Entries of config.json that not every family has."""


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LINEARS | _NORMS, interleaved_rope=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LINEARS | _NORMS),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LINEARS | _NORMS | _HEAD_NORMS),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _LINEARS
        | _HEAD_NORMS
        | {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norms_plus_one=True,
        more_config=_gemma3_config,
    ),
}


def find_architecture(contents: GGUFContents) -> Architecture:
    """Raises ModelError for a family that is not known here."""
    name = contents.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"GGUF architecture {name!r} is not supported (known: {known}); use its Hugging Face folder instead")
    return ARCHITECTURES[name]


def parameter_names(contents: GGUFContents, architecture: Architecture) -> dict[str, str]:
    """Hugging Face parameter name -> tensor name in the file. Raises ModelError when a tensor has no place."""
    names = {}
    for tensor in contents.tensors:
        if tensor == _ROPE_FACTORS:
            continue
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor)
        if tensor in _OUTER:
            names[_OUTER[tensor]] = tensor
        elif block and block[2] in architecture.blocks:
            names[f"model.layers.{block[1]}.{architecture.blocks[block[2]]}.{block[3]}"] = tensor
        else:
            raise ModelError(
                f"GGUF tensor {tensor!r} has no place in a {architecture.causal_lm}; use the model's Hugging Face folder instead"
            )
    return names


def hf_config(contents: GGUFContents, architecture: Architecture) -> dict[str, Any]:
    """A config.json for the model. Raises ModelError when the file lacks a figure or uses an unknown kind of rope scaling."""
    meta = contents.metadata
    prefix = meta["general.architecture"]
    try:
        heads = meta[f"{prefix}.attention.head_count"]
        hidden = meta[f"{prefix}.embedding_length"]
        end_ids = end_token_ids(meta)
        config: dict[str, Any] = {
            "architectures": [architecture.causal_lm],
            "model_type": architecture.model_type,
            "vocab_size": contents.tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": meta[f"{prefix}.feed_forward_length"],
            "num_hidden_layers": meta[f"{prefix}.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get(f"{prefix}.attention.head_count_kv", heads),
            "head_dim": meta.get(f"{prefix}.attention.key_length", hidden // heads),
            "max_position_embeddings": meta[f"{prefix}.context_length"],
            "rms_norm_eps": float(np.float32(meta[f"{prefix}.attention.layer_norm_rms_epsilon"]).astype(str)),
            "rope_theta": meta.get(f"{prefix}.rope.freq_base", 10000.0),
            "attention_bias": "blk.0.attn_q.bias" in contents.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in contents.tensors,
            "tie_word_embeddings": "output.weight" not in contents.tensors,
            "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids or None,
            "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        }
        config |= architecture.more_config(meta, config)
    except KeyError as error:
        raise ModelError(f"GGUF metadata lacks {error}; convert the model again with a recent llama.cpp") from error
    if meta.get(f"{prefix}.rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise ModelError(f"GGUF {prefix}.rope.dimension_count: partial rotary is not supported; use its Hugging Face folder")
    return config


def rope_scaling(contents: GGUFContents, factors: npt.NDArray[np.float32] | None, config: dict[str, Any]) -> dict[str, Any] | None:
    """The `rope_scaling` entry of config.json, or None.

    factors: [head_dim / 2] the file's `rope_freqs.weight`, where it has one: Llama 3's scaling, whose settings the file does not
    name. They are recognised by trying the published ones. Raises ModelError for anything else.
    """
    meta = contents.metadata
    prefix = meta["general.architecture"]
    kind = meta.get(f"{prefix}.rope.scaling.type", "none")
    if factors is not None:
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = 8192
        if np.allclose(factors, llama3_factors(scaling, config["rope_theta"], config["head_dim"]), rtol=1e-3):
            return scaling
        raise ModelError(f"GGUF {_ROPE_FACTORS}: unknown rope scaling; use the model's Hugging Face folder instead")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta[f"{prefix}.rope.scaling.factor"]}
    raise ModelError(f"GGUF {prefix}.rope.scaling.type = {kind!r} is not supported; use the model's Hugging Face folder instead")


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> npt.NDArray[np.float64]:
    """[head_dim / 2] divisors of the rotary frequencies under Llama 3's scaling (as in the model's published code)."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelength
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors


def end_token_ids(meta: Metadata) -> list[int]:
    """Ids that end a text or a turn: those that the file declares, and end-of-turn marks known by name."""
    declared = [meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ids = {int(token) for token in declared if token is not None}
    marks = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>"}
    ids |= {i for i, token in enumerate(meta.get("tokenizer.ggml.tokens", ())) if token in marks}
    return sorted(ids)


def hf_row_order(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Index of the stored row for each row of a Hugging Face q or k weight, where rotary pairs were interleaved."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()

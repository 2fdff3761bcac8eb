"""Random heads in every published layout, and the methods written down plainly: whole sequences, no cache, no batching.

The reference follows the formulas of the papers token by token; the package must agree with it at every step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from paceline.drafting import registry
from paceline.drafting.base import Drafter, DrafterContext
from paceline.execution.base import Runner
from unit.execution.toy_sources import CONFIGS, EXTRA_CONFIGS, ToySource, stock_model

LAYERS, VOCAB, HIDDEN = 6, 97, 32
TARGET = "heads_target"
EXTRA_CONFIGS[TARGET] = {**CONFIGS["llama"], "head_dim": 16, "num_hidden_layers": LAYERS, "max_position_embeddings": 512}
SMALL_TARGET, SMALL_VOCAB = "heads_small_target", 6
EXTRA_CONFIGS[SMALL_TARGET] = {**EXTRA_CONFIGS[TARGET], "num_hidden_layers": 3, "vocab_size": SMALL_VOCAB}
WIDTH, HEADS, KV_HEADS, HEAD_DIM, EPS = 48, 4, 2, 8, 1e-5
KEPT = tuple(range(0, VOCAB, 3))
"""Target ids in the reduced vocabulary of the random EAGLE-3 heads."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Head:
    """A random head: tensors under the authors' names, and settings."""

    method: str
    tensors: Tensors
    settings: dict[str, Any]
    target: str = TARGET


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        made[name] = 1.0 + 0.2 * values if "norm" in name else values * (1.5 / math.sqrt(shape[-1]))
    return made


def _layer(prefix: str, inputs: int, *, biases: bool = False, qk_norm: bool = False) -> dict[str, tuple[int, ...]]:
    rows = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}self_attn.{name}.weight": (count, inputs) for name, count in rows.items()}
    if biases:
        shapes |= {f"{prefix}self_attn.{name}.bias": (count,) for name, count in rows.items()}
    if qk_norm:
        shapes |= {f"{prefix}self_attn.{name}.weight": (HEAD_DIM,) for name in ("q_norm", "k_norm")}
    return shapes | {
        f"{prefix}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        f"{prefix}mlp.gate_proj.weight": (WIDTH, HIDDEN),
        f"{prefix}mlp.up_proj.weight": (WIDTH, HIDDEN),
        f"{prefix}mlp.down_proj.weight": (HIDDEN, WIDTH),
        f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
    }


LAYER_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "rope_theta": 500.0,
    "vocab_size": VOCAB,
}


def random_eagle(seed: int = 1, *, bias: bool = True, target: str = TARGET, qkv_biases: bool = False) -> Head:
    shapes = {"fc.weight": (HIDDEN, 2 * HIDDEN), **_layer("layers.0.", HIDDEN, biases=qkv_biases)}
    if bias:
        shapes["fc.bias"] = (HIDDEN,)
    return Head("eagle", _random(shapes, seed), dict(LAYER_CONFIG), target)


def random_eagle3(seed: int = 2, *, target: str = TARGET, reduced: bool = True, qk_norm: bool = False, **settings: Any) -> Head:
    vocab = stock_model(target).config.vocab_size
    kept = [i for i in KEPT if i < vocab] if reduced else list(range(vocab))
    states = len(settings.get("eagle_aux_hidden_state_layer_ids") or (0, 0, 0))
    shapes = {
        "fc.weight": (HIDDEN, states * HIDDEN),
        **_layer("midlayer.", 2 * HIDDEN, qk_norm=qk_norm),
        "midlayer.hidden_norm.weight": (HIDDEN,),
        "midlayer.input_layernorm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (len(kept), HIDDEN),
    }
    if settings.get("norm_before_fc"):
        shapes["input_norm.weight"] = (states * HIDDEN,)
    if settings.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (HIDDEN,) for i in range(states)}
    tensors = _random(shapes, seed)
    if reduced:
        tensors["d2t"] = torch.tensor(kept) - torch.arange(len(kept))
        tensors["t2d"] = torch.tensor([i in kept for i in range(vocab)])
    kind = {"model_type": "qwen3"} if qk_norm else {}
    return Head("eagle3", tensors, {**LAYER_CONFIG, **kind, "draft_vocab_size": len(kept), **settings}, target)


def random_medusa(
    seed: int = 3, *, heads: int = 3, layers: int = 1, own: bool = True, bias: bool = True, target: str = TARGET
) -> Head:
    vocab = stock_model(target).config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(heads):
        for layer in range(layers):
            shapes[f"{head}.{layer}.linear.weight"] = (HIDDEN, HIDDEN)
            if bias:
                shapes[f"{head}.{layer}.linear.bias"] = (HIDDEN,)
        if own:
            shapes[f"{head}.{layers}.weight"] = (vocab, HIDDEN)
    settings = {"medusa_num_heads": heads, "medusa_num_layers": layers, "base_model_name_or_path": target}
    return Head("medusa", _random(shapes, seed), settings, target)


# ---------- files ----------


def write(head: Head, folder: Path, layout: str = "original", *, file: str | None = None, **config: Any) -> str:
    """Write a head; returns what to put behind the colon of a draft specification."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, settings = (head.tensors, head.settings) if layout == "original" else _as_speculators(head)
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    default = {"medusa": "medusa_lm_head.pt", "eagle": "pytorch_model.bin"}.get(head.method, "model.safetensors")
    path = folder / (file or (default if layout == "original" else "model.safetensors"))
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, str(path))
    else:
        torch.save(tensors, path)
    return str(folder)


def _as_speculators(head: Head) -> tuple[Tensors, dict[str, Any]]:
    """The same head as `speculators` (Medusa: also vLLM) names it."""
    common = {"speculators_config": {"algorithm": head.method, "verifier": {"name_or_path": head.target}}}
    if head.method == "medusa":
        layers = head.settings["medusa_num_layers"]
        tensors = {}
        for name, value in head.tensors.items():
            number, place, *rest = name.split(".")
            tensors[f"blocks.{number}.layers.{place}.{rest[-1]}" if int(place) < layers else f"lm_heads.{number}.weight"] = value
        return tensors, {"speculators_model_type": "medusa", **common, "num_heads": head.settings["medusa_num_heads"]}
    renames = {"eagle": {"fc.": "fusion_fc.", "layers.0.": "transformer."}, "eagle3": {"midlayer.": "layers.0."}}[head.method]
    tensors = {}
    for name, value in head.tensors.items():
        old = next((old for old in renames if name.startswith(old)), "")
        tensors[renames.get(old, "") + name.removeprefix(old)] = value
    layer = {name: value for name, value in head.settings.items() if name in LAYER_CONFIG}
    rest = {name: value for name, value in head.settings.items() if name not in LAYER_CONFIG}
    return tensors, {"speculators_model_type": head.method, **common, "transformer_layer_config": layer, **rest}


def drafter_of(
    head: Head, folder: Path, target: Runner, layout: str = "original", *, tree: bool = False, **options: object
) -> Drafter:
    """The drafter of a head, made as the engine makes it."""
    context = DrafterContext(vocab_size=target.info.vocab_size, max_context=512, target=target, source=ToySource(head.target))
    return registry.create(f"{head.method}:{write(head, folder, layout)}{'+tree' if tree else ''}", dict(options), context)


# ---------- the plain reference ----------


@lru_cache(maxsize=512)
def _states(target: str, tokens: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        out = stock_model(target)(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    return tuple(state[0] for state in out.hidden_states)


def target_states(target: str, tokens: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """hidden_states of transformers: what enters each layer, and the last state after the final norm; each [n, H]."""
    return _states(target, tuple(tokens))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    """Rotary position of one head vector [D]."""
    half = len(x) // 2
    angles = position / (LAYER_CONFIG["rope_theta"] ** (torch.arange(half) / half))
    first, second = x[:half], x[half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


def attend(tensors: Tensors, prefix: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Causal attention's output [H] at the last of these positions."""

    def project(name: str, i: int) -> torch.Tensor:
        bias = tensors.get(f"{prefix}self_attn.{name}.bias")
        heads = F.linear(inputs[i], tensors[f"{prefix}self_attn.{name}.weight"], bias).view(-1, HEAD_DIM)
        norm = tensors.get(f"{prefix}self_attn.{name[0]}_norm.weight")
        if norm is not None and name != "v_proj":
            heads = torch.stack([rms(h, norm) for h in heads])
        return heads if name == "v_proj" else torch.stack([rotate(h, i) for h in heads])

    last = len(inputs) - 1
    queries = project("q_proj", last)
    keys = [project("k_proj", i) for i in range(len(inputs))]
    values = [project("v_proj", i) for i in range(len(inputs))]
    outs = []
    for h in range(HEADS):
        group = h // (HEADS // KV_HEADS)
        scores = torch.stack([queries[h] @ key[group] for key in keys]) / math.sqrt(HEAD_DIM)
        weights = torch.softmax(scores, 0)
        outs.append(sum(weight * value[group] for weight, value in zip(weights, values, strict=True)))
    return F.linear(torch.cat(outs), tensors[f"{prefix}self_attn.o_proj.weight"])  # type: ignore[arg-type]


def mlp(tensors: Tensors, prefix: str, x: torch.Tensor) -> torch.Tensor:
    gate, up = (F.linear(x, tensors[f"{prefix}mlp.{name}.weight"]) for name in ("gate_proj", "up_proj"))
    return F.linear(F.silu(gate) * up, tensors[f"{prefix}mlp.down_proj.weight"])


class PlainHead:
    """One step of a recurrent head at a time, from scratch.

    `row(tokens, path)` is the distribution's logits [V] of what follows committed `tokens` and then the drafted `path`.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        model = stock_model(head.target)
        self.embedding = model.get_input_embeddings().weight.detach()
        self.matrix = model.lm_head.weight.detach()

    def row(self, tokens: Sequence[int], path: Sequence[int]) -> torch.Tensor:
        known = self.features(tokens)[: len(tokens) - 1]
        following = [*tokens[1:], *path]
        features = list(known)
        while True:
            output = self.output(features, following[: len(features)])
            if len(features) == len(following):
                return self.logits(output)
            features.append(self.fed_back(output))

    def features(self, tokens: Sequence[int]) -> torch.Tensor: ...
    def output(self, features: list[torch.Tensor], tokens: Sequence[int]) -> torch.Tensor: ...
    def logits(self, output: torch.Tensor) -> torch.Tensor: ...

    def fed_back(self, output: torch.Tensor) -> torch.Tensor:
        return output


class PlainEagle(PlainHead):
    def features(self, tokens: Sequence[int]) -> torch.Tensor:
        return target_states(self.head.target, tokens)[-1]

    def output(self, features: list[torch.Tensor], tokens: Sequence[int]) -> torch.Tensor:
        t = self.head.tensors
        x = [
            F.linear(torch.cat([self.embedding[token], feature]), t["fc.weight"], t.get("fc.bias"))
            for feature, token in zip(features, tokens, strict=True)
        ]
        y = x[-1] + attend(t, "layers.0.", x)
        return y + mlp(t, "layers.0.", rms(y, t["layers.0.post_attention_layernorm.weight"]))

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        return self.matrix @ output


class PlainEagle3(PlainHead):
    def features(self, tokens: Sequence[int]) -> torch.Tensor:
        t, settings = self.head.tensors, self.head.settings
        states = target_states(self.head.target, tokens)
        layers = len(states) - 1
        ids = settings.get("eagle_aux_hidden_state_layer_ids") or [2, layers // 2, layers - 3]
        taken = [states[i] for i in ids]
        if settings.get("fc_norm"):
            taken = [rms(state, t[f"fc_norm.{i}.weight"]) for i, state in enumerate(taken)]
        joined = torch.cat(taken, dim=-1)
        if settings.get("norm_before_fc"):
            joined = rms(joined, t["input_norm.weight"])
        return joined @ t["fc.weight"].T

    def output(self, features: list[torch.Tensor], tokens: Sequence[int]) -> torch.Tensor:
        t = self.head.tensors
        normed = [rms(feature, t["midlayer.hidden_norm.weight"]) for feature in features]
        embedded = [rms(self.embedding[token], t["midlayer.input_layernorm.weight"]) for token in tokens]
        inputs = [torch.cat(pair) for pair in zip(embedded, normed, strict=True)]
        residual = normed[-1] if self.head.settings.get("norm_before_residual") else features[-1]
        z = residual + attend(t, "midlayer.", inputs)
        return z + mlp(t, "midlayer.", rms(z, t["midlayer.post_attention_layernorm.weight"]))

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        t = self.head.tensors
        small = t["lm_head.weight"] @ rms(output, t["norm.weight"])
        if "d2t" not in t:
            return small
        wide = torch.full((len(self.embedding),), -math.inf)
        for draft_id, value in enumerate(small):
            wide[draft_id + int(t["d2t"][draft_id])] = value
        return wide

    def fed_back(self, output: torch.Tensor) -> torch.Tensor:
        return rms(output, self.head.tensors["norm.weight"]) if self.head.settings.get("norm_output") else output


class PlainMedusa:
    """`row(tokens, path)`: the head of that depth, over the state of the token before the pending one."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def row(self, tokens: Sequence[int], path: Sequence[int]) -> torch.Tensor:
        t, number = self.head.tensors, len(path)
        x = target_states(self.head.target, tokens[:-1])[-1][-1]
        layers = self.head.settings["medusa_num_layers"]
        for layer in range(layers):
            x = x + F.silu(F.linear(x, t[f"{number}.{layer}.linear.weight"], t.get(f"{number}.{layer}.linear.bias")))
        own = t.get(f"{number}.{layers}.weight")
        return (stock_model(self.head.target).lm_head.weight.detach() if own is None else own) @ x


def plain(head: Head) -> PlainHead | PlainMedusa:
    return {"eagle": PlainEagle, "eagle3": PlainEagle3, "medusa": PlainMedusa}[head.method](head)

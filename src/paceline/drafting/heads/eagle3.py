"""EAGLE-3 heads (2503.01840; the variants of `speculators` by their settings).

g fuses the target's states of a low, a middle and a high layer; e is the embedding of the next token. One decoder layer attends
over [norm(e), norm(g)] beside the residual stream g; its output is fed back in the place of g, and its norm goes to an output
matrix over a reduced vocabulary. Costs one layer and that matrix a drafted token, or a level of a tree; needs three hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from paceline.drafting.heads.block import DecoderBlock, layer_shapes, layer_spec
from paceline.drafting.heads.checkpoint import EAGLE3, Checkpoint
from paceline.drafting.heads.recurrent import RecurrentDrafter, RecurrentHead
from paceline.drafting.heads.target import DraftVocabulary, HeadTarget


class Eagle3Head(RecurrentHead):
    """The graph of EAGLE-3.

    Settings of the checkpoint that change it, all off when absent: `norm_before_residual` (the residual stream starts from the
    normed g), `norm_output` (the normed output is fed back), `norm_before_fc` (one norm over all states), `fc_norm` (one a state).
    """

    def __init__(self, checkpoint: Checkpoint, target: HeadTarget) -> None:
        """Raises ModelError when the files do not make up the graph, or were made for another target."""
        spec, tensors, settings = layer_spec(checkpoint), checkpoint.tensors, checkpoint.settings
        self.layers = aux_layers(checkpoint, target)
        hidden, states = spec.hidden, len(self.layers)
        target.check_hidden(checkpoint, tensors["fc.weight"].shape[1] // states)
        norms = {f"{name}.weight": (hidden,) for name in ("layer.input_layernorm", "layer.hidden_norm", "norm")}
        if settings.get("norm_before_fc"):
            norms["input_norm.weight"] = (states * target.hidden,)
        if settings.get("fc_norm"):
            norms |= {f"fc_norm.{i}.weight": (target.hidden,) for i in range(states)}
        drafted = int(settings.get("draft_vocab_size") or 0) or len(tensors.get("lm_head.weight", ()))
        shapes = {"fc.weight": (hidden, states * target.hidden), "lm_head.weight": (drafted, hidden)}
        own = {"embed_tokens.weight": (target.vocab, hidden)}
        checkpoint.check(
            shapes | norms | layer_shapes(checkpoint, spec, 2 * hidden) | (own if hidden != target.hidden else {}),
            {"d2t": (drafted,), "t2d": (target.vocab,), **own},
        )
        self._eps = spec.norm_eps
        self._norms = {name: target.vector(tensors[name]) for name in norms}
        self._fc = target.linear(tensors["fc.weight"])
        self._norm_before_residual = bool(settings.get("norm_before_residual"))
        self._norm_output = bool(settings.get("norm_output"))
        self.block = DecoderBlock(tensors, spec, target)
        self.embedding = target.embedding(tensors.get("embed_tokens.weight"))
        self.output = target.output(tensors["lm_head.weight"])
        self.vocabulary = DraftVocabulary(checkpoint, target, drafted)

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        if "fc_norm.0.weight" in self._norms:
            states = torch.stack([self._norm(states[:, i], f"fc_norm.{i}") for i in range(states.shape[1])], dim=1)
        joined = states.flatten(1)
        if "input_norm.weight" in self._norms:
            joined = self._norm(joined, "input_norm")
        return self._fc(joined).float()

    def enter(self, embedded: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self._norm(features, "layer.hidden_norm")
        inputs = torch.cat([self._norm(embedded, "layer.input_layernorm"), normed], dim=-1)
        return inputs, normed if self._norm_before_residual else features

    def leave(self, outputs: torch.Tensor) -> torch.Tensor:
        return self._norm(outputs, "norm")

    def feed_back(self, outputs: torch.Tensor) -> torch.Tensor:
        return self._norm(outputs, "norm") if self._norm_output else outputs

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self._norms[f"{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, self._eps)


def aux_layers(checkpoint: Checkpoint, target: HeadTarget) -> tuple[int, ...]:
    """Layers whose entering states the head reads: those that its config names, else 2, half and all but 3 of the target's.

    Raises ModelError when the target has no such layer.
    """
    if checkpoint.settings.get("use_aux_hidden_state") is False:
        raise checkpoint.refuse("use_aux_hidden_state = false: the variant without the states of several layers is not known")
    named = checkpoint.settings.get("eagle_aux_hidden_state_layer_ids")
    layers: Sequence[int] = named or (2, target.layers // 2, target.layers - 3)
    if not all(isinstance(layer, int) and 0 <= layer <= target.layers for layer in layers):
        raise checkpoint.refuse(f"reads the states of layers {list(layers)}, and {target.name} has {target.layers} layers")
    return tuple(layers)


class Eagle3Drafter(RecurrentDrafter):
    """`eagle3:PATH`."""

    method = EAGLE3
    head_type = Eagle3Head

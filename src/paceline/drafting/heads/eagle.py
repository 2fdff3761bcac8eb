"""EAGLE-1 and EAGLE-2 heads (2401.15077, 2406.16858: one graph, chains and trees of it).

f is the target's state after its final norm, e the embedding of the next token: one decoder layer without an input norm over
fc([e, f]) predicts the next f, which the target's own output matrix turns into a distribution and which is fed back as it is.
Costs one layer and one output matrix a drafted token, or a level of a tree; needs the target's last hidden states.
"""

from __future__ import annotations

import torch

from paceline.drafting.heads.block import DecoderBlock, layer_shapes, layer_spec
from paceline.drafting.heads.checkpoint import EAGLE, Checkpoint
from paceline.drafting.heads.recurrent import RecurrentDrafter, RecurrentHead
from paceline.drafting.heads.target import DraftVocabulary, HeadTarget


class EagleHead(RecurrentHead):
    """The graph of EAGLE-1."""

    def __init__(self, checkpoint: Checkpoint, target: HeadTarget) -> None:
        """Raises ModelError when the files do not make up the graph, or were made for another target."""
        if checkpoint.settings.get("layernorms"):
            raise checkpoint.refuse("layernorms = true: the variant with extra norms is not known")
        spec, tensors = layer_spec(checkpoint), checkpoint.tensors
        target.check_hidden(checkpoint, tensors["fc.weight"].shape[0])
        hidden = spec.hidden
        shared = dict.fromkeys(("embed_tokens.weight", "lm_head.weight"), (target.vocab, hidden))
        shapes = {"fc.weight": (hidden, 2 * hidden), **layer_shapes(checkpoint, spec, hidden)}
        checkpoint.check(shapes, {"fc.bias": (hidden,), **shared})
        self.layers = (target.layers,)
        self.block = DecoderBlock(tensors, spec, target)
        self.embedding = target.embedding(tensors.get("embed_tokens.weight"))
        self.output = target.output(tensors.get("lm_head.weight"))
        self.vocabulary = DraftVocabulary(checkpoint, target, target.vocab)
        self._fc = target.linear(tensors["fc.weight"], tensors.get("fc.bias"))

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, 0]

    def enter(self, embedded: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fused = self._fc(torch.cat([embedded, features], dim=-1)).float()
        return fused, fused


class EagleDrafter(RecurrentDrafter):
    """`eagle:PATH`."""

    method = EAGLE
    head_type = EagleHead

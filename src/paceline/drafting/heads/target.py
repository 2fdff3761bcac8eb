"""What a head needs of its target: sizes, shared matrices, device and precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from paceline.config import PRECISIONS
from paceline.drafting.base import DrafterContext, DrafterSpec
from paceline.drafting.heads.checkpoint import Checkpoint
from paceline.errors import OptionError
from paceline.execution.linears import Linear, make_linear
from paceline.models.lazy import EMBEDDING, HEAD


@dataclass(frozen=True, slots=True)
class HeadTarget:
    """A target as its heads see it."""

    name: str
    hidden: int
    layers: int
    vocab: int
    """Rows of its embedding."""
    draft_vocab: int
    """V: width of drafted distributions (without padding of the embedding)."""
    max_context: int
    tensors: Mapping[str, torch.Tensor]
    device: torch.device
    precision: str
    """Of the head's matrices: `fp32`, `bf16`, `int8` or `int4`."""

    @classmethod
    def of(cls, spec: DrafterSpec, context: DrafterContext, precision: str) -> HeadTarget:
        """precision: `auto` is the target's own, but never below 8 bits. Raises OptionError when the target cannot have heads."""
        runner, source = context.target, context.source
        if runner is None or source is None:
            raise OptionError(f"draft = '{spec}': there is no target to attach a head to here; use another drafter")
        if not runner.has_taps:
            raise OptionError(
                f"draft = '{spec}': the {runner.info.backend} backend does not hand out hidden states; use backend = 'lean' or 'hf'"
            )
        device = torch.device(runner.info.device)
        if precision == "auto":
            precision = {"fp32": "fp32", "bf16": "bf16"}.get(runner.info.precision, "int8" if device.type == "cpu" else "bf16")
        return cls(
            name=source.name,
            hidden=int(source.config["hidden_size"]),
            layers=runner.info.num_layers,
            vocab=runner.info.vocab_size,
            draft_vocab=context.vocab_size,
            max_context=runner.info.max_context,
            tensors=source.tensors(),
            device=device,
            precision=precision,
        )

    def check_hidden(self, checkpoint: Checkpoint, hidden: int) -> None:
        """Raises ModelError when the head was made for another hidden size."""
        if hidden != self.hidden:
            raise checkpoint.refuse(
                f"made for a target of hidden size {hidden}, and {self.name} has {self.hidden}; take a head of this target"
            )

    def embedding(self, own: torch.Tensor | None) -> torch.Tensor:
        """[vocab, H] on the device: the head's own embedding, else the target's."""
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        return (self.tensors[EMBEDDING] if own is None else own).to(device=self.device, dtype=dtype)

    def output(self, own: torch.Tensor | None) -> Linear:
        """The head's own output matrix, else the target's."""
        shared = HEAD if HEAD in self.tensors else EMBEDDING
        return self.linear(self.tensors[shared] if own is None else own)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """A linear layer on the target's device, in the head's precision."""
        return make_linear(weight.to(self.device), None if bias is None else bias.to(self.device), self.precision)

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        """A norm's weight, float32 on the device."""
        return values.float().to(self.device)


class DraftVocabulary:
    """The ids of a head's output in the target's vocabulary (EAGLE-3's `d2t`: target id = draft id + d2t[draft id])."""

    def __init__(self, checkpoint: Checkpoint, target: HeadTarget, size: int) -> None:
        """size: rows of the head's output matrix. Raises ModelError when an id is outside the target's vocabulary."""
        offsets = checkpoint.tensors.get("d2t")
        ids = torch.arange(size) if offsets is None else torch.arange(size) + offsets.long()
        if size > target.vocab or int(ids.min()) < 0 or int(ids.max()) >= target.vocab:
            raise checkpoint.refuse(
                f"drafts {size} tokens with ids up to {int(ids.max())}, and {target.name} has {target.vocab} tokens; "
                "take a head of this target"
            )
        if len(set(ids.tolist())) < size:
            raise checkpoint.refuse("d2t maps two tokens of the draft to one of the target; fetch the head again")
        self.target_ids: torch.Tensor | None = None if offsets is None else ids.to(target.device)
        """[V_d] int64; None: the draft's first ids are the target's."""
        self._width = target.vocab

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        """[R, V_d] to [R, V]: tokens outside the draft's vocabulary are impossible."""
        if self.target_ids is None:
            return logits
        wide = logits.new_full((len(logits), self._width), float("-inf"))
        wide[:, self.target_ids] = logits
        return wide


def check_precision(precision: str) -> None:
    """Raises OptionError for an unknown precision."""
    if precision not in PRECISIONS:
        raise OptionError(f"precision = {precision!r}: choose one of {', '.join(PRECISIONS)}")

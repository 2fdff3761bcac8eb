"""`layer_skip`: the target without some inner layers (Draft & Verify, 2309.08168; a fixed set, every second inner one unless
given).

The target's own cache serves: what the draft writes behind the committed rows, verification writes again. Costs the share of
the layers that are left, and the head. Models that were not trained for it agree with themselves poorly when layers are
missing; the pacer finds out and stops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.drafting.base import DrafterContext, DrafterSpec, SequenceView
from paceline.drafting.self_draft.session import SelfDrafter, SelfSession, target_of
from paceline.drafting.temperature import check_draft_temperature
from paceline.errors import OptionError
from paceline.execution.base import Runner, Segment, SequenceHandle

HEAD_SHARE = 0.3
"""First guess of embedding, norms and head in a plain step: a good part of a small model."""
_SKIP_BOTH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSkipOptions:
    """Settings of `layer_skip`."""

    skip: tuple[int, ...] = ()
    """Layers left out (0-based); empty: every second one, the first two and last two kept."""
    temperature: float | str | None = None
    """As in `model`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        check_draft_temperature(self.temperature)


class LayerSkipDrafter(SelfDrafter):
    """See the module's text."""

    options_type = LayerSkipOptions

    def __init__(self, runner: Runner, name: str, vocab_size: int, skip: bytes, temperature: float | str | None = None) -> None:
        """skip: as in `Runner.forward_part`."""
        super().__init__(runner, name, vocab_size, temperature)
        self.skip = skip
        halves = sum(bits.bit_count() for bits in skip)
        self.share_of_target = HEAD_SHARE + (1 - HEAD_SHARE) * (1 - halves / (2 * len(skip)))

    @classmethod
    def build(cls, spec: DrafterSpec, options: LayerSkipOptions, context: DrafterContext) -> LayerSkipDrafter:
        runner = target_of(spec, context, parts=True)
        count = runner.info.num_layers
        skip = options.skip or tuple(range(2, count - 2, 2))
        bad = [layer for layer in skip if not 0 < layer < count]
        if bad or not skip:
            raise OptionError(f"skip = {bad or skip}: name inner layers, from 1 to {count - 1}")
        both = bytes(_SKIP_BOTH if layer in skip else 0 for layer in range(count))
        return cls(runner, str(spec), context.vocab_size, both, options.temperature)

    def open(self, view: SequenceView) -> LayerSkipSession:
        return LayerSkipSession(self, view)


class LayerSkipSession(SelfSession):
    """Reads the drafter's skip set at every draft: it may change between rounds (`swift`)."""

    def __init__(self, drafter: LayerSkipDrafter, view: SequenceView) -> None:
        super().__init__(drafter, view)
        self._skipping = drafter
        self._skip = drafter.skip

    def _enter(self, sequence: SequenceHandle) -> SequenceHandle:
        self._skip = self._skipping.skip
        return sequence

    def _logits(self, cache: SequenceHandle, token: int) -> torch.Tensor:
        logits = self._runner.forward_part([Segment(cache, [token])], skip=self._skip).logits[0]
        self._runner.accept(cache, [0])
        return logits

    def review(self, segment: Segment) -> torch.Tensor:
        return self._runner.forward_part([segment], skip=self._skip).logits

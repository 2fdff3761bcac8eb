"""Drafts from the target's own weights: no second model, no training.

`quantized_self`: the same weights rounded to fewer bits, with a cache of its own (ML-SpecQD, 2503.13565: the idea; the formats are
those of our runners). It pays when the target runs in a wide precision.
`early_exit`: the first layers, the final norm and the head (LayerSkip, 2404.16710). The target's own cache serves: what the first
layers write there is what verification writes again, so nothing is fed twice and nothing is kept.
`layer_skip`: all layers but some inner ones (Draft & Verify, 2309.08168; a fixed set, every second inner layer unless given).
Models that were not trained for it agree with themselves poorly when layers are missing; the pacer finds out and stops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from paceline.config import PRECISIONS
from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.choice import TokenChooser
from paceline.drafting.model import ModelDrafter, ModelOptions
from paceline.drafting.options import whole
from paceline.errors import OptionError
from paceline.execution.base import Runner, Segment
from paceline.records import Draft, Outlook

_SKIP_BOTH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedSelfOptions:
    """Settings of `quantized_self`."""

    precision: str = "int4"
    """Precision of the draft copy."""
    temperature: float | None = None
    """As in `model`."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS[1:]:
            raise OptionError(f"precision = {self.precision!r}: choose one of {', '.join(PRECISIONS[1:])}")
        ModelOptions(temperature=self.temperature)


class QuantizedSelfDrafter(ModelDrafter):
    """The target, rounded. A `ModelDrafter` over a second runner of the same source."""

    options_type = QuantizedSelfOptions  # type: ignore[assignment]

    @classmethod
    def build(cls, spec: DrafterSpec, options: QuantizedSelfOptions, context: DrafterContext) -> QuantizedSelfDrafter:  # type: ignore[override]
        if context.open_self is None:
            raise OptionError(f"draft = '{spec}': the target's weights cannot be loaded again here; use another drafter")
        runner = context.open_self(options.precision)
        if context.target is not None and context.target.info.precision == options.precision:
            raise OptionError(
                f"draft = '{spec}': the target itself runs in {options.precision}, so a copy would save nothing; "
                "give the target a wider precision"
            )
        model_options = ModelOptions(temperature=options.temperature)
        return cls(runner, str(spec), options=model_options, vocab_size=context.vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyExitOptions:
    """Settings of `early_exit`."""

    layer: int = 0
    """Layers that run; 0: a third of the model."""

    def __post_init__(self) -> None:
        whole("layer", self.layer, 0, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSkipOptions:
    """Settings of `layer_skip`."""

    skip: tuple[int, ...] = ()
    """Layers left out (0-based); empty: every second one, the first two and last two kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))


class PartialDrafter(Drafter):
    """Drafts with some layers of the target, in the target's own cache."""

    samples = True

    def __init__(self, runner: Runner, name: str, *, layers: int | None = None, skip: bytes | None = None) -> None:
        if not runner.runs_parts:
            raise OptionError(f"draft = {name!r}: the {runner.info.backend} backend runs whole models only; use backend = 'native'")
        self.runner = runner
        self.name = name
        self.layers = layers
        self.skip = skip
        run = (layers or runner.info.num_layers) - (sum(1 for bits in skip if bits) if skip else 0)
        self.share_of_target = 0.3 + 0.7 * run / runner.info.num_layers  # the head is a good part of a small model

    def open(self, view: SequenceView) -> PartialSession:
        return PartialSession(self, view)


class EarlyExitDrafter(PartialDrafter):
    """See the module's text."""

    options_type = EarlyExitOptions

    @classmethod
    def build(cls, spec: DrafterSpec, options: EarlyExitOptions, context: DrafterContext) -> EarlyExitDrafter:
        runner = _target(spec, context)
        layer = options.layer or max(1, runner.info.num_layers // 3)
        if layer >= runner.info.num_layers:
            raise OptionError(f"layer = {layer}: the model has {runner.info.num_layers} layers; leave after fewer")
        return cls(runner, str(spec), layers=layer)


class LayerSkipDrafter(PartialDrafter):
    """See the module's text."""

    options_type = LayerSkipOptions

    @classmethod
    def build(cls, spec: DrafterSpec, options: LayerSkipOptions, context: DrafterContext) -> LayerSkipDrafter:
        runner = _target(spec, context)
        count = runner.info.num_layers
        skip = options.skip or tuple(range(2, count - 2, 2))
        bad = [layer for layer in skip if not 0 < layer < count]
        if bad or not skip:
            raise OptionError(f"skip = {bad or skip}: name inner layers, from 1 to {count - 1}")
        return cls(runner, str(spec), skip=bytes(_SKIP_BOTH if layer in skip else 0 for layer in range(count)))


def _target(spec: DrafterSpec, context: DrafterContext) -> Runner:
    if context.target is None:
        raise OptionError(f"draft = '{spec}': there is no target to run parts of here; use another drafter")
    return context.target


class PartialSession(DraftSession):
    """Has no state of its own: the drafted rows are taken back before the target verifies."""

    def __init__(self, drafter: PartialDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._view = view
        sampling = view.sampling if not view.sampling.greedy else replace(view.sampling, n=1)
        self._chooser = TokenChooser(view, sampling, drafter.runner.info.vocab_size)

    def outlook(self, max_tokens: int) -> Outlook:
        room = self._drafter.runner.info.max_context - len(self._view.tokens)
        return Outlook(self._drafter.name, max(0, min(max_tokens, room)) if self._view.sequence is not None else 0)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        runner, sequence = self._drafter.runner, self._view.sequence
        if sequence is None or num_tokens < 1:
            return Draft((), drafter=self._drafter.name)
        committed = sequence.length
        chosen = self._chooser.begin()
        feed = self._view.tokens[-1]
        try:
            while True:
                features = chosen.add(self._logits(feed))
                feed = chosen.tokens[-1]
                if len(chosen.tokens) >= num_tokens or feed in self._view.end_ids or not keep_drafting(features):
                    return chosen.draft(self._drafter.name)
        finally:
            runner.truncate(sequence, committed)

    def _logits(self, token: int) -> torch.Tensor:
        drafter, sequence = self._drafter, self._view.sequence
        assert sequence is not None
        out = drafter.runner.forward_part([Segment(sequence, [token])], layers=drafter.layers, skip=drafter.skip)
        drafter.runner.accept(sequence, [0])
        return out.logits[0]

"""`early_exit`: the target's first layers, the final norm and the head (LayerSkip, 2404.16710), in the target's own cache.

What the first layers write there is what verification writes again, so nothing is fed twice and nothing is kept. A drafted
token costs the share of its layers and the head.

With `calibrate`, confidences are those of a temperature that is fitted to each exit from what the target said (2004.07453;
`calibration.py`). With several `exits`, a round leaves at the first one whose calibrated confidence in the token behind the
pending one reaches `threshold`, at the last one otherwise: one exit for the whole round, since a token that left early has no
keys in the layers above it. Passes of exits that were not sure enough are lost time. Each choice is made before a token is
drawn.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from paceline.drafting.base import DrafterContext, DrafterSpec, SequenceView
from paceline.drafting.options import number, whole
from paceline.drafting.self_draft.calibration import Calibration
from paceline.drafting.self_draft.layer_skip import HEAD_SHARE
from paceline.drafting.self_draft.session import SelfDrafter, SelfSession, target_of
from paceline.drafting.temperature import check_draft_temperature
from paceline.errors import OptionError
from paceline.execution.base import Runner, Segment, SequenceHandle
from paceline.records import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyExitOptions:
    """Settings of `early_exit`."""

    layer: int = 0
    """Layers that run; 0: a third of the model."""
    exits: tuple[int, ...] = ()
    """Several numbers of layers to choose among in each round, smallest first (instead of `layer`; implies `calibrate`)."""
    threshold: float = 0.6
    """Calibrated confidence at which a round leaves at an exit before the last."""
    calibrate: bool = False
    """Give calibrated confidences to the controller."""
    temperature: float | str | None = None
    """As in `model`."""

    def __post_init__(self) -> None:
        whole("layer", self.layer, 0, 1024)
        object.__setattr__(self, "exits", tuple(self.exits))
        for layer in self.exits:
            whole("exits", layer, 1, 1024)
        if self.exits and (self.layer or list(self.exits) != sorted(set(self.exits))):
            raise OptionError(f"exits = {self.exits}: must increase, and `layer` must then be left out")
        number("threshold", self.threshold, 0.0, 1.0)
        check_draft_temperature(self.temperature)


class EarlyExitDrafter(SelfDrafter):
    """See the module's text."""

    options_type = EarlyExitOptions

    def __init__(self, runner: Runner, name: str, vocab_size: int, options: EarlyExitOptions) -> None:
        super().__init__(runner, name, vocab_size, options.temperature)
        count = runner.info.num_layers
        self.exits = options.exits or (options.layer or max(1, count // 3),)
        if self.exits[-1] >= count:
            raise OptionError(f"layer = {self.exits[-1]}: the model has {count} layers; leave after fewer")
        self.threshold = options.threshold
        self.calibrate = options.calibrate or bool(options.exits)
        self.share_of_target = HEAD_SHARE + (1 - HEAD_SHARE) * self.exits[0] / count
        self._calibrations: defaultdict[tuple[int, float], Calibration] = defaultdict(Calibration)

    @classmethod
    def build(cls, spec: DrafterSpec, options: EarlyExitOptions, context: DrafterContext) -> EarlyExitDrafter:
        return cls(target_of(spec, context, parts=True), str(spec), context.vocab_size, options)

    def calibration(self, layer: int, temperature: float) -> Calibration:
        """Of an exit, for requests of a sampling temperature (0: greedy, whose evidence is at temperature 1)."""
        return self._calibrations[layer, temperature]

    def open(self, view: SequenceView) -> EarlyExitSession:
        return EarlyExitSession(self, view)


class EarlyExitSession(SelfSession):
    """Keeps the rows of its last draft until the verdict has told what the target says there."""

    def __init__(self, drafter: EarlyExitDrafter, view: SequenceView) -> None:
        super().__init__(drafter, view)
        self._exits = drafter
        self._layers = 0
        """Exit of the current draft; 0 before it is chosen."""
        self._rows: list[torch.Tensor] = []

    def _enter(self, sequence: SequenceHandle) -> SequenceHandle:
        self._layers, self._rows = 0, []
        return sequence

    def _logits(self, cache: SequenceHandle, token: int) -> torch.Tensor:
        logits = self._run(cache, token, self._layers) if self._layers else self._choose_exit(cache, token)
        self._runner.accept(cache, [0])
        return logits

    def _choose_exit(self, cache: SequenceHandle, token: int) -> torch.Tensor:
        """Logits of the first exit that is sure enough; nothing is drawn from those of the others."""
        for layers in self._exits.exits:
            self._layers, logits = layers, self._run(cache, token, layers)
            if layers == self._exits.exits[-1]:
                break
            if self._calibration(layers).confidence(self._row(logits, [])) >= self._exits.threshold:
                break
        return logits

    def _run(self, cache: SequenceHandle, token: int, layers: int) -> torch.Tensor:
        return self._runner.forward_part([Segment(cache, [token])], layers=layers).logits[0]

    def review(self, segment: Segment) -> torch.Tensor:
        return self._runner.forward_part([segment], layers=self._exits.exits[-1]).logits

    def _row(self, logits: torch.Tensor, path: list[int]) -> torch.Tensor:
        """Processed logits behind a path of the draft, as the temperature is fitted to them."""
        row = self._chooser.processed(logits, path)
        temperature = self._view.sampling.temperature
        return row / max(temperature, 1e-3) if temperature > 0 else row.clone()  # the runner writes into its buffer again

    def _calibration(self, layers: int) -> Calibration:
        return self._exits.calibration(layers, self._view.sampling.temperature)

    def _confidence(self, logits: torch.Tensor, tokens: list[int], max_prob: float) -> float:
        if not self._exits.calibrate:
            return max_prob
        self._rows.append(self._row(logits, tokens[:-1]))
        return self._calibration(self._layers).confidence(self._rows[-1])

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        """Emitted tokens follow the target's distribution, accepted or not: they are the labels. What follows them is not used."""
        super().observe(verdict, target_logits)
        if verdict is not None:
            for row, token in zip(self._rows, verdict.emitted, strict=False):  # the bonus token has no row
                self._calibration(self._layers).learn(row, token)
        self._rows = []

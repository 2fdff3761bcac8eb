"""`dynamic_precision`: a rounded copy of the target whose layers differ in precision, by what each layer's rounding does.

After DP-LLM (2508.06041): a threshold at a quantile of the measured errors decides who computes in the wider format, and the
quantile follows from the mean number of bits. There the choice is made for each token and each matrix, from the matrix's input
and on nested weights; here it is made once for each layer, when the drafter is made (our kernels have no nested formats, and
what enters a matrix is normalised, so its length tells little). An error is the relative change of the logits on a short text
when that layer alone is in the narrower format. Both formats of every layer stay in memory: 1.5 times an int8 copy for int4 and
int8. A drafted token costs a step of the copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.drafting.base import DrafterContext, DrafterSpec
from paceline.drafting.model import ModelDrafter, ModelOptions
from paceline.drafting.options import number
from paceline.drafting.self_draft.quantized import refuse_same
from paceline.errors import OptionError
from paceline.execution.base import Runner, Segment
from paceline.execution.measure import recall

_BITS = {"int4": 4.0, "int8": 8.0, "bf16": 16.0, "fp32": 32.0}
_TOKENS = 32
_TEXT = (
    "The committee met on 14 March to discuss three questions: who pays, who decides, and what happens next year. "
    "def total(prices, rate=0.2): return sum(p * (1 + rate) for p in prices)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicPrecisionOptions:
    """Settings of `dynamic_precision`."""

    bits: float = 5.0
    """Bits of a weight, on average over the layers (to within one layer; scales not counted)."""
    narrow: str = "int4"
    """Precision of the layers that bear it."""
    wide: str = "int8"
    """Precision of the others."""
    temperature: float | str | None = None
    """As in `model`."""

    def __post_init__(self) -> None:
        for name in ("narrow", "wide"):
            if getattr(self, name) not in _BITS:
                raise OptionError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(_BITS)}")
        low, high = _BITS[self.narrow], _BITS[self.wide]
        if low >= high:
            raise OptionError(f"wide = {self.wide!r}: must have more bits than narrow = {self.narrow!r}")
        number("bits", self.bits, low, high)
        ModelOptions(temperature=self.temperature)


class DynamicPrecisionDrafter(ModelDrafter):
    """See the module's text. A `ModelDrafter` over a second runner of the same source."""

    options_type = DynamicPrecisionOptions  # type: ignore[assignment]

    @classmethod
    def build(cls, spec: DrafterSpec, options: DynamicPrecisionOptions, context: DrafterContext) -> DynamicPrecisionDrafter:  # type: ignore[override]
        if context.open_graded is None:
            raise OptionError(f"draft = '{spec}': the target's weights cannot be loaded again here; use another drafter")
        refuse_same(spec, options.narrow, context)

        def choose(runner: Runner) -> list[bool]:
            errors = _known_errors(runner, context)
            return wide_layers(errors, options.bits, _BITS[options.narrow], _BITS[options.wide])

        runner = context.open_graded(options.narrow, options.wide, choose)
        return cls(runner, str(spec), options=ModelOptions(temperature=options.temperature), vocab_size=context.vocab_size)


def wide_layers(errors: Sequence[float], bits: float, low: float, high: float) -> list[bool]:
    """Which layers get `high` bits, the others `low`, so that the mean is `bits` to within one layer.

    Those above the quantile of the errors at the share of layers that must stay low, 1 - (bits - low) / (high - low).
    """
    if bits >= high:
        return [True] * len(errors)
    threshold = float(np.quantile(errors, 1.0 - (bits - low) / (high - low)))
    return [error > threshold for error in errors]


def layer_errors(runner: Runner, tokens: Sequence[int]) -> list[float]:
    """For each layer |logits with it narrow - logits| / |logits|, with all others wide, over the rows of a text.

    Costs a forward a layer, and one. Leaves some other choice of grades behind.
    """
    count = runner.info.num_layers
    sequence = runner.open()
    try:
        runner.set_grades([True] * count)
        exact = runner.forward([Segment(sequence, tokens)]).logits.clone()
        errors = []
        for layer in range(count):
            runner.set_grades([other != layer for other in range(count)])
            changed = runner.forward([Segment(sequence, tokens)]).logits
            errors.append(float((changed - exact).norm() / exact.norm()))
        return errors
    finally:
        runner.close(sequence)


def _known_errors(runner: Runner, context: DrafterContext) -> list[float]:
    """Errors on a text of ours, measured once for a model where it can be told from others."""
    if context.tokenizer is not None:
        tokens = context.tokenizer.encode(_TEXT)[:_TOKENS]
    else:
        tokens = [(37 * i + 11) % context.vocab_size for i in range(_TOKENS)]
    if context.source is None:
        return layer_errors(runner, tokens)
    key = {
        "model": context.source.fingerprint,
        "backend": runner.info.backend,
        "precision": runner.info.precision,
        "tokens": hashlib.sha256(repr(tokens).encode()).hexdigest()[:16],
    }

    def parse(document: Sequence[float]) -> list[float]:
        if len(document) != runner.info.num_layers:
            raise ValueError("not one error a layer")
        return [float(error) for error in document]

    return recall("layer_errors", key, parse, lambda: layer_errors(runner, tokens), list)[0]

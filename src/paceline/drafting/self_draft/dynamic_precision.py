"""`dynamic_precision`: a rounded copy of the target whose matrices differ in precision, by what the rounding of each one does.

After DP-LLM (2508.06041): thresholds on errors decide who computes in the wider format, and follow from the mean number of bits.
Here every matrix's own damage is measured first: the relative change of the logits on a short text when that matrix alone is in
the narrower format. Independent errors add up as squares, so the wider format goes where it saves most squared error for each of
its bits (ours). Both formats stay in memory: 1.5 times an int8 copy for int4 and int8. A drafted token costs a step of the copy.

`decide=matrix` settles that once; `decide=token`, as in the paper, for each row that is computed: a matrix's damage is scaled by
the estimated error on the row's own input (`execution/graded.py`). On Gemma 3 270M (int4 and int8, overlap with the float32 model's
distributions over 500 tokens of English) the choice by matrix gave 0.800 at 5.46 bits and 0.841 at 6.0, by token 0.788 at 5.47 and
0.832 at 5.96, one choice for a whole layer 0.791 at 5.56 and 0.805 at 6.0. So the choice by token is there to be tried, and off.
The paper learns each layer's mean precision by back-propagation and trains its estimators of the error; here both are measured
without training. What is estimated is the error of a matrix's own output on a row, not what it does to that row's logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec
from paceline.drafting.model import ModelOptions
from paceline.drafting.options import number
from paceline.drafting.self_draft.copy import CopyDrafter
from paceline.drafting.self_draft.quantized import refuse_same
from paceline.errors import OptionError
from paceline.execution.base import MATRICES, Runner, Segment
from paceline.execution.measure import recall

_BITS = {"int4": 4.0, "int8": 8.0, "bf16": 16.0, "fp32": 32.0}
_DECISIONS = ("matrix", "token")
_TOKENS = 32
"""Of the text that damage is measured on; it costs a forward over them for each matrix."""
_TEXT = (
    "The committee met on 14 March to discuss three questions: who pays, who decides, and what happens next year. "
    "def total(prices, rate=0.2): return sum(p * (1 + rate) for p in prices)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicPrecisionOptions:
    """Settings of `dynamic_precision`."""

    bits: float = 5.0
    """Bits of a weight, on average (scales not counted): to within a matrix, or over the text that thresholds are fitted on."""
    narrow: str = "int4"
    """Precision of the matrices that bear it."""
    wide: str = "int8"
    """Precision of the others."""
    decide: str = "matrix"
    """`matrix`: once for each matrix. `token`: for each matrix and row, from the row's own input."""
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
        if self.decide not in _DECISIONS:
            raise OptionError(f"decide = {self.decide!r}: choose one of {', '.join(_DECISIONS)}")
        ModelOptions(temperature=self.temperature)

    @property
    def wide_share(self) -> float:
        """Share of the weights that compute in the wider format."""
        low, high = _BITS[self.narrow], _BITS[self.wide]
        return (self.bits - low) / (high - low)


class DynamicPrecisionDrafter(CopyDrafter):
    """See the module's text."""

    options_type = DynamicPrecisionOptions

    @classmethod
    def build(cls, spec: DrafterSpec, options: DynamicPrecisionOptions, context: DrafterContext) -> Drafter:
        if context.open_graded is None:
            raise OptionError(f"draft = '{spec}': the target's weights cannot be loaded again here; use another drafter")
        refuse_same(spec, options.narrow, context)

        def set_up(runner: Runner) -> str:
            text = _text(context)
            damage = _known_damage(runner, context, text[:_TOKENS])
            if options.decide == "token":
                runner.set_thresholds(fit_thresholds(damage, _errors(runner, text), _shares(runner), options.wide_share))
            else:
                runner.set_grades(wide_matrices(damage, _shares(runner), options.wide_share).tolist())
            return f"{options.bits:g} bits by {options.decide}"

        runner = context.open_graded(options.narrow, options.wide, set_up)
        return cls.over(runner, spec, options.temperature, context)


def wide_matrices(damage: torch.Tensor, shares: torch.Tensor, wide_share: float) -> torch.Tensor:
    """[layers, 4] bool: those that save most squared damage for each weight, until they hold `wide_share` of all weights.

    damage, shares: [layers, 4]; shares are of the weights, and add up to 1.
    """
    gain = damage.square() / shares
    return gain > _limit(gain, shares, wide_share)


def fit_thresholds(damage: torch.Tensor, errors: torch.Tensor, shares: torch.Tensor, wide_share: float) -> torch.Tensor:
    """[layers, 4] thresholds of `Runner.set_thresholds`, so that over the rows of `errors` the mean is kept.

    As `wide_matrices`, where a row's damage is the matrix's own times the row's estimated error over its root mean square.
    errors: [rows, layers, 4] estimates.
    """
    typical = errors.square().mean(0).sqrt().clamp_min(1e-30)
    scale = damage / (typical * shares.sqrt())  # a row's gain is (scale * error) squared
    limit = _limit(scale * errors, shares.expand_as(errors), wide_share)
    return limit / scale


def _limit(scores: torch.Tensor, weights: torch.Tensor, share: float) -> float:
    """The score that `share` of all weight lies above, to within one item; below all scores at share 1."""
    order = scores.flatten().argsort(descending=True)
    above = weights.flatten()[order].cumsum(0)
    taken = int((above <= share * float(above[-1]) * (1 + 1e-6)).sum())
    return float(scores.flatten()[order[taken]]) if taken < len(order) else -1.0


def matrix_damage(runner: Runner, tokens: Sequence[int]) -> torch.Tensor:
    """[layers, 4]: |logits with that matrix narrow - logits| / |logits|, with all others wide, over the rows of a text.

    Costs a forward a matrix, and one. Leaves some other choice of grades behind.
    """
    damage = torch.zeros(runner.info.num_layers, len(MATRICES))
    wide = torch.ones_like(damage, dtype=torch.bool)
    exact = _logits(runner, wide, tokens)
    for layer, matrix in torch.ones_like(damage).nonzero().tolist():
        wide[layer, matrix] = False
        damage[layer, matrix] = (_logits(runner, wide, tokens) - exact).norm() / exact.norm()
        wide[layer, matrix] = True
    return damage


def _logits(runner: Runner, wide: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    runner.set_grades(wide.tolist())
    sequence = runner.open()
    try:
        return runner.forward([Segment(sequence, tokens)]).logits.clone()
    finally:
        runner.close(sequence)


def _errors(runner: Runner, tokens: Sequence[int]) -> torch.Tensor:
    """Estimates on a text that is computed in the wider format."""
    runner.set_thresholds(torch.full((runner.info.num_layers, len(MATRICES)), -1.0))
    return runner.rounding_errors(tokens)


def _shares(runner: Runner) -> torch.Tensor:
    weights = torch.tensor(runner.matrix_weights, dtype=torch.float32).repeat(runner.info.num_layers, 1)
    return weights / weights.sum()


def _text(context: DrafterContext) -> list[int]:
    if context.tokenizer is not None:
        return context.tokenizer.encode(_TEXT)
    return [(37 * i + 11) % context.vocab_size for i in range(_TOKENS)]


def _known_damage(runner: Runner, context: DrafterContext, tokens: Sequence[int]) -> torch.Tensor:
    """Damage on a text of ours, measured once for a model where it can be told from others."""
    if context.source is None:
        return matrix_damage(runner, tokens)
    key = {
        "model": context.source.fingerprint,
        "backend": runner.info.backend,
        "precision": runner.info.precision,
        "tokens": hashlib.sha256(repr(list(tokens)).encode()).hexdigest()[:16],
    }

    def parse(document: Any) -> torch.Tensor:
        damage = torch.tensor(document, dtype=torch.float32)
        if damage.shape != (runner.info.num_layers, len(MATRICES)):
            raise ValueError("not one figure a matrix")
        return damage

    return recall("matrix_damage", key, parse, lambda: matrix_damage(runner, tokens), torch.Tensor.tolist)[0]

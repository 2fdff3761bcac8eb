"""`quantized_self`: the target's own weights in fewer bits (ML-SpecQD, 2503.13565: the idea; the formats are those of our runners).
It pays when the target runs in a wider precision; a drafted token costs a step of the copy. The copy works in the target's cache
where the backend lets it (`copy`), else in one of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.config import PRECISIONS
from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec
from paceline.drafting.model import ModelOptions
from paceline.drafting.self_draft.copy import CopyDrafter
from paceline.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedSelfOptions:
    """Settings of `quantized_self`."""

    precision: str = "int4"
    """Precision of the draft copy."""
    temperature: float | str | None = None
    """As in `model`."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS[1:]:
            raise OptionError(f"precision = {self.precision!r}: choose one of {', '.join(PRECISIONS[1:])}")
        ModelOptions(temperature=self.temperature)


class QuantizedSelfDrafter(CopyDrafter):
    """The target, rounded."""

    options_type = QuantizedSelfOptions

    @classmethod
    def build(cls, spec: DrafterSpec, options: QuantizedSelfOptions, context: DrafterContext) -> Drafter:
        if context.open_self is None:
            raise OptionError(f"draft = '{spec}': the target's weights cannot be loaded again here; use another drafter")
        refuse_same(spec, options.precision, context)
        return cls.over(context.open_self(options.precision), spec, options.temperature, context)


def refuse_same(spec: DrafterSpec, precision: str, context: DrafterContext) -> None:
    """Raises OptionError when the target itself runs in a draft copy's precision."""
    if context.target is not None and context.target.info.precision == precision:
        raise OptionError(
            f"draft = '{spec}': the target itself runs in {precision}, so a copy would save nothing; "
            "give the target a wider precision"
        )

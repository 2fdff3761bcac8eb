"""The same draft length every round: the baseline that every adaptive rule has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import Controller, RoundContext, longest_outlook
from paceline.costs import CostTable
from paceline.errors import OptionError
from paceline.records import Plan

_PLAIN = Plan(None, 0, "nothing to draft")


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedOptions:
    """Options of `fixed`."""

    num_draft: int = 4
    """Draft length (0 to 63); 0 is plain decoding."""

    def __post_init__(self) -> None:
        if not isinstance(self.num_draft, int) or isinstance(self.num_draft, bool) or not 0 <= self.num_draft <= 63:
            raise OptionError(f"num_draft = {self.num_draft!r}: must be a whole number in [0, 63]")


class Fixed(Controller):
    """Draft `num_draft` tokens, or as many as there are, with the first drafter that has something to propose."""

    name = "fixed"
    learns_late = True
    options_type = FixedOptions

    def __init__(self, options: FixedOptions, costs: CostTable) -> None:
        self.options = options

    def plan(self, context: RoundContext) -> Plan:
        outlook = longest_outlook(context)
        if outlook is None:
            return _PLAIN
        num_draft = min(self.options.num_draft, context.max_draft, outlook.available)
        return Plan(outlook.drafter, num_draft, "fixed") if num_draft > 0 else _PLAIN

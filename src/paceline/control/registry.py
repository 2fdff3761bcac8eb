"""The table of controllers: one line each. Nothing of a controller is imported before it is asked for.

To add a controller: one file with a frozen options dataclass and a class whose `options_type` names it and whose constructor
takes `(options, costs)`; one line here; one test file.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from paceline.config import build_options
from paceline.control.base import Controller
from paceline.costs import CostTable
from paceline.errors import OptionError


@dataclass(frozen=True, slots=True)
class ControllerInfo:
    """One line of `paceline controllers`."""

    target: str
    """`module:Class` inside `paceline.control`."""
    summary: str
    reads: str
    """What the controller learns or decides from."""
    lossless: bool = True
    """False when its own default options relax the acceptance test."""
    trained: bool = False
    """True when it needs parameters that were fitted beforehand."""


class ControllerClass(Protocol):
    """What the registry asks of a controller's class."""

    options_type: type[Any]

    def __call__(self, options: Any, costs: CostTable) -> Controller: ...


_CONTROLLERS: dict[str, ControllerInfo] = {
    "fixed": ControllerInfo("fixed:Fixed", "the same draft length every round", "nothing"),
    "pacer": ControllerInfo("pacer:Pacer", "prices every drafter and length, never slower than plain", "A, signals, max q, times"),
    "hf_heuristic": ControllerInfo("hf:HfHeuristic", "transformers: +2 after a full acceptance, else -1", "A"),
    "hf_confidence": ControllerInfo("hf:HfConfidence", "transformers: confidence stop, online ROC threshold", "q(x), A"),
    "gammatune": ControllerInfo("gammatune:GammaTune", "length follows the mean accepted length", "A"),
    "gammatune_plus": ControllerInfo("gammatune:GammaTunePlus", "gammatune with a confidence stop", "A, max q"),
    "adasd_like": ControllerInfo("adasd:AdaSdLike", "entropy stop at a balanced midpoint (stop side of AdaSD)", "H(q), A"),
    "draft_verify": ControllerInfo("draft_verify:DraftVerify", "confidence stop steered to an acceptance rate", "q(x), A"),
    "adaedl": ControllerInfo("adaedl:AdaEdl", "entropy bound on acceptance, steered threshold", "H(q), A"),
    "svip": ControllerInfo("svip:Svip", "stateless entropy stop", "H(q)"),
    "dsde": ControllerInfo("dsde:Dsde", "length from size and steadiness of the divergence", "1 - TV of past rounds"),
    "specdecpp": ControllerInfo("specdecpp:SpecDecPp", "stops when some token is probably rejected", "q features", trained=True),
    "disco": ControllerInfo("disco:Disco", "classifier decides after each token", "q features, A", trained=True),
    "goodput": ControllerInfo("goodput:Goodput", "SmartSpec: most expected tokens a second", "A, costs, batch size"),
    "sglang_ladder": ControllerInfo("sglang_ladder:SglangLadder", "ladder of lengths per batch size", "A, batch size"),
    "exl_ema": ControllerInfo("exl_ema:ExlEma", "censored average of accepted lengths, skips below a level", "A"),
    "table": ControllerInfo("table:Table", "batch size to length, by hand", "batch size"),
    "ucb": ControllerInfo("bandits:Ucb", "lengths as arms, upper confidence bound", "Y, times"),
    "exp3": ControllerInfo("bandits:Exp3", "lengths as arms, exponential weights", "Y, times"),
    "tapout": ControllerInfo("tapout:TapOut", "bandit over stop rules", "A, times, q features"),
    "hedge": ControllerInfo("hedge:Hedge", "every length scored after every round", "1 - TV of past rounds, costs"),
    "mdp": ControllerInfo("mdp:Mdp", "tabular stop-or-continue process learnt while running", "H(q), A, costs"),
}


def names() -> tuple[str, ...]:
    """All registered names, in the order of the table."""
    return tuple(_CONTROLLERS)


def info(name: str) -> ControllerInfo:
    """Facts about one controller. Raises OptionError for an unknown name."""
    try:
        return _CONTROLLERS[name]
    except KeyError:
        raise OptionError(f"controller = {name!r}: unknown; choose one of {', '.join(_CONTROLLERS)}") from None


def controller_class(name: str) -> ControllerClass:
    """The class behind a name, imported now. Raises OptionError for an unknown name."""
    module, _, attribute = info(name).target.partition(":")
    return cast("ControllerClass", getattr(import_module(f"paceline.control.{module}"), attribute))


def create(name: str, costs: CostTable, options: dict[str, Any] | None = None) -> Controller:
    """Make a controller. Raises OptionError for an unknown name, an unknown option or a value out of range."""
    cls = controller_class(name)
    return cls(build_options(cls.options_type, options or {}, f"controller {name}"), costs)

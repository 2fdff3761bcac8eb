"""A small logistic head over draft-side features, for the trained stop rules; fitted by `paceline.study.heads.fit_head`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from paceline.errors import OptionError
from paceline.records import DraftFeatures


def logit(probability: float) -> float:
    """log(p / (1 - p)), with p kept away from 0 and 1 by 1e-4."""
    p = min(max(probability, 1e-4), 1 - 1e-4)
    return math.log(p / (1 - p))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), safe for any x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


FEATURES: dict[str, Callable[[DraftFeatures, float], float]] = {
    "max_prob": lambda f, _: f.max_prob,
    "second_prob": lambda f, _: f.max_prob - f.margin,
    "max_logit": lambda f, _: logit(f.max_prob),
    "entropy": lambda f, _: f.entropy,
    "position": lambda f, _: float(f.position),
    "recent": lambda _, recent: recent,
}
"""Inputs that a head may name. `recent` is accepted / drafted of the request's last round. None looks at the drawn token."""

ANY = "any"
"""Key of the head for drafters without one of their own."""


@dataclass(frozen=True, slots=True)
class LogisticHead:
    """P(accept) = sigmoid(bias + weights . features)."""

    inputs: tuple[str, ...]
    weights: tuple[float, ...]
    bias: float
    note: str = ""
    """How it was fitted."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.inputs if name not in FEATURES]
        if unknown or not self.inputs:
            raise OptionError(f"head inputs = {self.inputs!r}: choose from {', '.join(FEATURES)}")
        if len(self.weights) != len(self.inputs):
            raise OptionError(f"head weights = {self.weights!r}: {len(self.inputs)} inputs need as many weights")

    def score(self, features: DraftFeatures, recent: float = 1.0) -> float:
        """Log-odds of acceptance."""
        return self.bias + sum(w * FEATURES[name](features, recent) for name, w in zip(self.inputs, self.weights, strict=True))

    def probability(self, features: DraftFeatures, recent: float = 1.0) -> float:
        return sigmoid(self.score(features, recent))

    def to_json(self) -> dict[str, Any]:
        return {"inputs": list(self.inputs), "weights": list(self.weights), "bias": self.bias, "note": self.note}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LogisticHead:
        """Raises KeyError, TypeError or ValueError on a document that is not a head."""
        weights = tuple(float(w) for w in data["weights"])
        return cls(tuple(map(str, data["inputs"])), weights, float(data["bias"]), str(data.get("note", "")))


@dataclass(frozen=True, slots=True)
class HeadSet:
    """Heads by kind of drafter: how far a draft's confidence can be trusted is a property of the pair."""

    heads: dict[str, LogisticHead]
    """Keyed by drafter kind (`quantized_self`, `model`); the one under `any` serves all others."""

    def __post_init__(self) -> None:
        if ANY not in self.heads:
            raise ValueError(f"no head for `{ANY}` drafter")

    def of(self, drafter: str) -> LogisticHead:
        """The head for a drafter by its full name (`model:PATH`, `early_exit`)."""
        return self.heads.get(drafter.partition(":")[0].partition("+")[0], self.heads[ANY])

    def to_json(self) -> dict[str, Any]:
        return {"heads": {kind: head.to_json() for kind, head in self.heads.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeadSet:
        """A set, or a single head, which then serves every drafter. Raises KeyError, TypeError or ValueError on anything else."""
        heads = {ANY: data} if "inputs" in data else data["heads"]
        return cls({str(kind): LogisticHead.from_json(head) for kind, head in heads.items()})

    @classmethod
    def load(cls, path: str) -> HeadSet:
        """Read from a JSON file. Raises OptionError when the file cannot be read or holds no heads."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise OptionError(f"head = {path!r}: not a readable head ({error}); fit one from a trace, or leave it out") from error


@cache
def shipped(name: str) -> HeadSet:
    """The heads that come with the package for a controller; `benchmarks/fit_heads.py` made them."""
    text = files("paceline.control").joinpath("fitted", f"{name}.json").read_text(encoding="utf-8")
    return HeadSet.from_json(json.loads(text))

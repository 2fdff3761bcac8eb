"""Paceline: adaptive speculative decoding. The same text, sooner, and never slower than plain decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline._version import __version__
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.errors import PacelineError
from paceline.records import GenerationResult, StepRecord

if TYPE_CHECKING:
    from paceline.engine import Engine, StreamEvent

__all__ = [
    "Engine",
    "GenerationResult",
    "PacelineError",
    "RunnerConfig",
    "SamplingParams",
    "SpeculationConfig",
    "StepRecord",
    "StreamEvent",
    "__version__",
]


def __getattr__(name: str) -> object:
    """The engine is imported when it is first asked for: it brings torch, which settings and the command line can do without."""
    if name in ("Engine", "StreamEvent"):
        from paceline import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

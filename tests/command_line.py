"""What a test gets back from running the command line in its own process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paceline.cli.options import Settings


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    settings: list[Settings]
    """Those of every engine that the command loaded."""


Run = Callable[..., Outcome]

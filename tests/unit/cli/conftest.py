"""The command line over a fake engine."""

from __future__ import annotations

import io
import sys

import pytest

from command_line import Outcome, Run
from fake_engine import FakeEngine
from paceline.cli import loading, main
from paceline.cli.options import Settings


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def run(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `paceline ARGUMENTS` in this process: exit code, stdout, stderr, and the settings that reached the engine."""
    seen: list[Settings] = []

    def load(settings: Settings, console: object) -> FakeEngine:
        seen.append(settings)
        return engine

    monkeypatch.setattr(loading, "load_engine", load)
    monkeypatch.setattr(loading, "engine_factory", lambda settings, console: lambda speculation: engine)

    def call(*arguments: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["paceline", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main.run_guarded()
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err, list(seen))

    return call

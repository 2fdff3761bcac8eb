"""From settings to a target: contexts that are held, and those that are refused."""

from __future__ import annotations

import pytest

from paceline import assembly
from paceline.assembly import load_target
from paceline.config import RunnerConfig
from paceline.costs import CostTable
from paceline.errors import OptionError
from unit.execution.toy_sources import ToySource

COSTS = CostTable([1, 8], [1], [[1e-3, 1.2e-3]])


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model of 128 tokens under every name, and what its loading says."""
    monkeypatch.setattr(assembly, "open_model", lambda name, progress: ToySource("llama"))
    monkeypatch.setattr(assembly, "load_or_measure", lambda runner, fingerprint: (COSTS, None))
    return []


def test_a_context_beyond_the_models_is_refused_before_it_is_loaded(loaded: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        load_target("toy", RunnerConfig(max_context=129, backend="lean"), loaded.append)
    assert str(caught.value) == (
        f"max_context = 129: {ToySource('llama').name} holds 128 tokens, prompt and answer together; "
        "choose 128 or less, or leave it out"
    )
    assert not loaded


@pytest.mark.parametrize(("asked", "held"), [(128, 128), (50, 50), (None, 128)])
def test_a_context_that_the_model_has_is_held(loaded: list[str], asked: int | None, held: int) -> None:
    assert load_target("toy", RunnerConfig(max_context=asked, backend="lean")).runner.info.max_context == held


def test_a_context_beyond_what_the_backend_holds_is_refused(loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    create = assembly.create_runner
    monkeypatch.setattr(assembly, "create_runner", lambda source, _: create(source, RunnerConfig(max_context=64, backend="lean")))
    with pytest.raises(OptionError, match=r"max_context = 100: .* holds 64 tokens"):
        load_target("toy", RunnerConfig(max_context=100))

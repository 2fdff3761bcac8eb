"""Layers of two precisions: who gets more bits, and that the runners compute with what was chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.config import RunnerConfig
from paceline.drafting import registry
from paceline.drafting.base import DrafterContext
from paceline.drafting.self_draft.dynamic_precision import layer_errors, wide_layers
from paceline.errors import OptionError
from paceline.execution.base import Runner, Segment
from paceline.execution.factory import create_graded
from unit.drafting.self_kit import BACKENDS, COMPILED, PROMPT, generate, make, target
from unit.execution.toy_sources import ToySource


def logits_of(run: Runner) -> torch.Tensor:
    sequence = run.open()
    out = run.forward([Segment(sequence, PROMPT)]).logits.clone()
    run.close(sequence)
    return out


def test_layers_above_the_quantile_of_the_errors_get_more_bits() -> None:
    errors = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    wide = wide_layers(errors, 3.25, 3, 4)  # the quantile is 0.625
    assert [error for error, is_wide in zip(errors, wide, strict=True) if is_wide] == [0.7, 0.8]
    assert 3 + sum(wide) / 8 == 3.25
    assert wide_layers(errors, 5, 4, 8) == wide
    assert not any(wide_layers(errors, 4, 4, 8))
    assert all(wide_layers(errors, 8, 4, 8))


@pytest.mark.parametrize("bits", [4.0, 4.7, 5.5, 6.9, 7.9])
def test_the_mean_is_the_budget_to_within_a_layer(bits: float) -> None:
    errors = torch.rand(30, generator=torch.Generator().manual_seed(3)).tolist()
    mean = 4 + 4 * sum(wide_layers(errors, bits, 4, 8)) / 30
    assert mean == pytest.approx(bits, abs=4 / 30)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_layers_of_one_grade_are_the_runner_of_that_precision(backend: str) -> None:
    graded = target(backend, precision="int8+int4")
    graded.set_grades([False] * 6)
    assert torch.equal(logits_of(graded), logits_of(target(backend, precision="int8")))
    graded.set_grades([True] * 6)  # embedding and head keep 8 bits in both
    assert torch.allclose(logits_of(graded), logits_of(target(backend, precision="int4")), rtol=0.05, atol=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_are_those_of_one_rounded_layer_at_a_time(backend: str) -> None:
    graded = target(backend, precision="int4+int8")
    errors = layer_errors(graded, PROMPT)
    graded.set_grades([True] * 6)
    exact = logits_of(graded)
    graded.set_grades([True, True, False, True, True, True])
    assert errors[2] == pytest.approx(float((logits_of(graded) - exact).norm() / exact.norm()), rel=1e-5)
    assert min(errors) > 0.0
    assert len(set(errors)) == 6


@COMPILED
def test_more_bits_agree_more_often() -> None:
    def accepted(bits: float) -> int:
        return sum(generate(make("dynamic_precision", bits=bits), prompt=PROMPT[i:], max_tokens=60).num_accepted for i in range(3))

    assert accepted(8.0) > accepted(4.0)


@COMPILED
def test_errors_are_measured_once_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    forwards: list[int] = []

    def open_graded(narrow: str, wide: str, choose: object) -> Runner:
        runner = target(precision=f"{narrow}+{wide}")
        forward = runner.forward
        monkeypatch.setattr(runner, "forward", lambda segments: forwards.append(1) or forward(segments))
        runner.set_grades(choose(runner))  # type: ignore[operator]
        monkeypatch.setattr(runner, "forward", forward)
        return runner

    for _ in range(2):
        context = DrafterContext(
            vocab_size=97, max_context=512, open_graded=open_graded, target=target(), source=ToySource("self_draft")
        )
        registry.create("dynamic_precision", {}, context)
    assert len(forwards) == 7


def test_a_backend_is_found_for_any_two_precisions() -> None:
    config = RunnerConfig(device="cpu", threads=1)
    assert create_graded(ToySource("self_draft"), config, "bf16", "fp32").info.backend == "lean"
    graded = create_graded(ToySource("self_draft"), config, "int4", "int8")
    assert graded.info.precision == "int4+int8"
    assert graded.grades


@pytest.mark.parametrize("backend", BACKENDS)
def test_grades_of_another_number_of_layers_are_refused(backend: str) -> None:
    with pytest.raises(OptionError, match="2 layers named"):
        target(backend, precision="int4+int8").set_grades([True, False])
    with pytest.raises(OptionError, match="6 layers named"):
        target(backend).set_grades([True] * 6)


def test_a_target_as_narrow_as_the_draft_is_refused() -> None:
    context = DrafterContext(
        vocab_size=97, max_context=512, open_graded=lambda *_: target("lean"), target=target("lean", precision="int4")
    )
    with pytest.raises(OptionError, match="would save nothing"):
        registry.create("dynamic_precision", {}, context)
    with pytest.raises(OptionError, match="cannot be loaded again"):
        registry.create("dynamic_precision", {}, DrafterContext(vocab_size=97, max_context=512))

"""Matrices of two precisions: who gets more bits, and that the runners compute with what was chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.config import RunnerConfig
from paceline.drafting import registry
from paceline.drafting.base import DrafterContext
from paceline.drafting.self_draft.dynamic_precision import fit_thresholds, matrix_damage, wide_matrices
from paceline.errors import OptionError
from paceline.execution.base import MATRICES, Runner, Segment
from paceline.execution.factory import create_graded
from unit.drafting.self_kit import BACKENDS, COMPILED, PROMPT, generate, make, target
from unit.execution.toy_sources import ToySource

LAYERS, INF = 6, float("inf")
ALL, NONE = [[True] * 4] * LAYERS, [[False] * 4] * LAYERS


def logits_of(run: Runner, tokens: list[int] = PROMPT) -> torch.Tensor:
    sequence = run.open()
    out = run.forward([Segment(sequence, tokens)]).logits.clone()
    run.close(sequence)
    return out


def grid(seed: int) -> torch.Tensor:
    return torch.rand(30, 4, generator=torch.Generator().manual_seed(seed)) + 0.1


def test_the_worst_matrices_get_more_bits_until_they_hold_their_share() -> None:
    damage = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    even = torch.full((2, 4), 1 / 8)
    wide = wide_matrices(damage, even, 0.25)  # 3.25 bits of 3 and 4
    assert damage[wide].tolist() == pytest.approx([0.7, 0.8])
    assert not wide_matrices(damage, even, 0.0).any()
    assert wide_matrices(damage, even, 1.0).all()


def test_a_large_matrix_must_do_more_damage_for_its_bits() -> None:
    damage, shares = torch.tensor([[0.3, 0.3, 0.4, 0.3]]), torch.tensor([[0.1, 0.1, 0.7, 0.1]])
    assert wide_matrices(damage, shares, 0.35).tolist() == [[True, True, False, True]]


@pytest.mark.parametrize("share", [0.0, 0.175, 0.375, 0.725, 0.975])
def test_the_mean_is_the_budget_to_within_a_matrix(share: float) -> None:
    shares = grid(4) / grid(4).sum()
    taken = float(shares[wide_matrices(grid(3), shares, share)].sum())
    assert share - float(shares.max()) < taken <= share + 1e-5


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_thresholds_keep_the_mean_over_the_rows_that_they_were_fitted_on(share: float) -> None:
    shares = grid(4) / grid(4).sum()
    errors = torch.rand(40, 30, 4, generator=torch.Generator().manual_seed(5)) * grid(6)
    wide = errors > fit_thresholds(grid(3), errors, shares, share)
    assert float((wide * shares).sum()) / 40 == pytest.approx(share, abs=0.005)


def test_a_quarter_of_the_tokens_gets_the_wider_format_as_in_the_worked_example() -> None:
    errors = torch.arange(1, 9).view(8, 1, 1) / 10  # 0.1 ... 0.8 of one matrix, 3.25 bits of 3 and 4
    threshold = fit_thresholds(torch.ones(1, 1), errors, torch.ones(1, 1), 0.25)
    assert 0.6 - 1e-6 <= float(threshold) < 0.7  # the note's quantile, 0.625, lies between the same two
    assert errors[errors > threshold + 1e-6].tolist() == pytest.approx([0.7, 0.8])


def test_with_one_row_thresholds_choose_as_the_choice_by_matrix_does() -> None:
    shares = grid(4) / grid(4).sum()
    thresholds = fit_thresholds(grid(3), grid(6)[None], shares, 0.4)
    assert int(((grid(6) > thresholds) != wide_matrices(grid(3), shares, 0.4)).sum()) <= 1  # rounding at the limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_matrices_of_one_grade_are_the_runner_of_that_precision(backend: str) -> None:
    graded = target(backend, precision="int8+int4")
    graded.set_grades(NONE)
    assert torch.equal(logits_of(graded), logits_of(target(backend, precision="int8")))
    graded.set_grades(ALL)  # embedding and head keep 8 bits in both
    assert torch.allclose(logits_of(graded), logits_of(target(backend, precision="int4")), rtol=0.05, atol=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_is_that_of_one_rounded_matrix_at_a_time(backend: str) -> None:
    graded = target(backend, precision="int4+int8")
    damage = matrix_damage(graded, PROMPT)
    graded.set_grades(ALL)
    exact = logits_of(graded)
    graded.set_grades([[(layer, m) != (2, 3) for m in range(4)] for layer in range(LAYERS)])
    assert damage[2, 3] == pytest.approx(float((logits_of(graded) - exact).norm() / exact.norm()), rel=1e-5)
    assert damage.min() > 0.0
    assert len(damage.unique()) == 4 * LAYERS


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_at_the_ends_are_the_two_grades(backend: str) -> None:
    graded = target(backend, precision="int4+int8")
    for grades, threshold in ((ALL, -1.0), (NONE, INF)):
        graded.set_grades(grades)
        expected = logits_of(graded)
        graded.set_thresholds(torch.full((LAYERS, 4), threshold))
        slack = 0.0 if backend == "native" else 0.2  # torch's formats return two dtypes, which meet in the wider one
        assert torch.allclose(logits_of(graded), expected, rtol=0.0, atol=slack)
    graded.set_grades(ALL)  # undoes them
    assert not torch.equal(logits_of(graded), expected)


@COMPILED
def test_kernels_and_torch_estimate_alike_and_near_the_truth() -> None:
    kernels, plain = target("native", precision="int4+int8"), target("lean", precision="int4+int8")
    text = [(7 * i + 3) % 97 for i in range(40)]
    errors = []
    for runner in (kernels, plain):
        runner.set_thresholds(torch.full((LAYERS, 4), -1.0))
        errors.append(runner.rounding_errors(text))
    assert torch.allclose(errors[0][:, 0, 0], errors[1][:, 0, 0], rtol=0.02)
    assert float((errors[0] / errors[1]).log().abs().mean()) < 0.05  # activations part ways, layer by layer
    first = plain._graded[0].graded_linears[0]  # type: ignore[attr-defined]
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    first(x)
    true = (first._wide(x).float() - first._narrow(x).float()).norm(dim=-1)
    assert float((first.errors / true).log().abs().mean()) < 0.2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_chooses_for_itself_whatever_its_neighbours_do(backend: str) -> None:
    graded = target(backend, precision="int4+int8")
    if not graded.info.deterministic_rows:
        pytest.skip(f"a row's last bits depend on its neighbours here: {'; '.join(graded.info.lost_paths)}")
    graded.set_thresholds(torch.full((LAYERS, 4), -1.0))
    errors = graded.rounding_errors(PROMPT)
    ranked = errors.sort(dim=0).values  # a limit between two rows: alone, a row's error may have other last bits
    middle = (ranked[len(ranked) // 2 - 1] + ranked[len(ranked) // 2]) / 2
    graded.set_thresholds(middle)
    together = logits_of(graded)
    sequence = graded.open()
    for i, token in enumerate(PROMPT):
        alone = graded.forward([Segment(sequence, [token])]).logits[0]
        assert torch.allclose(alone, together[i], rtol=1e-4, atol=1e-4)
        graded.accept(sequence, [0])
    graded.close(sequence)
    assert 0 < int((errors > middle).sum()) < errors.numel()
    for end in (-1.0, INF):
        graded.set_thresholds(torch.full((LAYERS, 4), end))
        assert not torch.equal(logits_of(graded), together)


@COMPILED
@pytest.mark.parametrize("decide", ["matrix", "token"])
def test_more_bits_agree_more_often(decide: str) -> None:
    def accepted(bits: float) -> int:
        drafter = make("dynamic_precision", bits=bits, decide=decide)
        return sum(generate(drafter, prompt=PROMPT[i:], max_tokens=60).num_accepted for i in range(3))

    assert accepted(8.0) > accepted(4.0)


@COMPILED
def test_damage_is_measured_once_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    forwards: list[int] = []

    def open_graded(narrow: str, wide: str, set_up: object) -> Runner:
        runner = target(precision=f"{narrow}+{wide}")
        forward = runner.forward
        monkeypatch.setattr(runner, "forward", lambda segments: forwards.append(1) or forward(segments))
        assert set_up(runner) == "5 bits by matrix"  # type: ignore[operator]
        monkeypatch.setattr(runner, "forward", forward)
        return runner

    for _ in range(2):
        context = DrafterContext(
            vocab_size=97, max_context=512, open_graded=open_graded, target=target(), source=ToySource("self_draft")
        )
        registry.create("dynamic_precision", {}, context)
    assert len(forwards) == 1 + LAYERS * len(MATRICES)


def test_a_backend_is_found_for_any_two_precisions() -> None:
    config = RunnerConfig(device="cpu", threads=1)
    assert create_graded(ToySource("self_draft"), config, "bf16", "fp32").info.backend == "lean"
    graded = create_graded(ToySource("self_draft"), config, "int4", "int8")
    assert graded.info.precision == "int4+int8"
    assert graded.grades


@pytest.mark.parametrize("backend", BACKENDS)
def test_grades_and_thresholds_that_do_not_fit_are_refused(backend: str) -> None:
    graded = target(backend, precision="int4+int8")
    with pytest.raises(OptionError, match="6 layers of 4 matrices"):
        graded.set_grades([[True] * 4] * 2)
    with pytest.raises(OptionError, match="6 layers of 4 matrices"):
        graded.set_thresholds(torch.zeros(LAYERS, 3))
    with pytest.raises(OptionError, match="is one for all"):
        target(backend).set_grades(ALL)
    fresh = create_graded(ToySource("self_draft"), RunnerConfig(device="cpu", threads=1, backend="auto"), "int4", "int8")
    with pytest.raises(OptionError, match="must be set first"):
        fresh.rounding_errors(PROMPT)


def test_a_target_as_narrow_as_the_draft_is_refused() -> None:
    context = DrafterContext(
        vocab_size=97, max_context=512, open_graded=lambda *_: target("lean"), target=target("lean", precision="int4")
    )
    with pytest.raises(OptionError, match="would save nothing"):
        registry.create("dynamic_precision", {}, context)
    with pytest.raises(OptionError, match="cannot be loaded again"):
        registry.create("dynamic_precision", {}, DrafterContext(vocab_size=97, max_context=512))
    with pytest.raises(OptionError, match="decide"):
        make("dynamic_precision", "lean", decide="row")

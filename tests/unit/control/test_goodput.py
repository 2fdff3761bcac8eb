"""`goodput`."""

from __future__ import annotations

import pytest

from paceline.control.goodput import Goodput, GoodputOptions, expected_emitted
from paceline.control.rounds import round_seconds
from paceline.costs import CostTable, DraftCost
from unit.control.kit import context, costs, record


def linear_costs(base: float, slope: float, draft: float, overhead: float) -> CostTable:
    """t_verify(n) = base + slope * n, milliseconds."""
    rows = [1, 1000]
    verify = [(base + slope * n) / 1000 for n in rows]
    return CostTable(rows, [0], [verify], overhead / 1000, {"model": DraftCost(per_token=draft / 1000)})


def goodputs(table: CostTable, batch: int, most: int) -> list[float]:
    at = context(batch=batch)
    return [expected_emitted(0.7, k) / round_seconds(table, at, "model", k) for k in range(most + 1)]


def test_goodput_gives_the_worked_values_at_batch_8() -> None:
    table = linear_costs(20, 0.1, 1.5, 1.0)
    expected = [384.615, 564.315, 663.636, 706.063, 715.639, 706.587]
    assert goodputs(table, 8, 5) == pytest.approx(expected, abs=1e-3)
    assert Goodput(GoodputOptions(), table).plan(context(batch=8)).num_draft == 4


def test_goodput_gives_the_worked_values_at_batch_64() -> None:
    table = linear_costs(20, 0.25, 2.5, 1.0)
    assert goodputs(table, 64, 3) == pytest.approx([1777.778, 1960.360, 1894.054, 1752.562], abs=1e-3)
    assert Goodput(GoodputOptions(), table).plan(context(batch=64)).num_draft == 1


def test_rate_follows_the_worked_average() -> None:
    controller = Goodput(GoodputOptions(), costs())
    controller.observe(record(3, 5))
    assert controller.alpha == pytest.approx(0.685)
    controller.observe(record(1, 5))
    assert controller.alpha == pytest.approx(0.61225)
    controller.observe(record(0, 0))
    assert controller.alpha == pytest.approx(0.61225)


def test_expected_emitted_gives_the_worked_values() -> None:
    assert expected_emitted(0.8, 4) == pytest.approx(3.3616)
    assert expected_emitted(1.0, 4) == 5.0


def test_a_batch_teaches_once() -> None:
    controller = Goodput(GoodputOptions(), costs())
    controller.observe(record(5, 5, request_id=1, batch=2))
    assert controller.alpha == 0.7
    controller.observe(record(1, 5, request_id=2, batch=2))
    assert controller.alpha == pytest.approx(0.85 * 0.7 + 0.15 * 0.6)


def test_scan_looks_past_a_step_of_the_costs() -> None:
    table = CostTable([1, 2, 3, 4, 8, 16], [0], [[10, 10, 14, 14, 14, 14]], 0.0, {"model": DraftCost()})
    assert Goodput(GoodputOptions(start=0.9, k_max=7), table).plan(context()).num_draft == 7


def test_hopeless_rate_switches_off() -> None:
    assert Goodput(GoodputOptions(start=0.01), costs()).plan(context()).drafter is None


def test_speed_up_at_constant_costs_gives_the_worked_values() -> None:
    """Leviathan et al.: E[emitted] / (k c + 1)."""

    def speed_up(alpha: float, c: float, k: int) -> float:
        return expected_emitted(alpha, k) / (k * c + 1)

    assert expected_emitted(0.8, 4) == pytest.approx(3.3616)
    assert speed_up(0.8, 0.1, 4) == pytest.approx(2.401143, abs=1e-6)
    assert [round(speed_up(0.8, 0.1, k), 4) for k in (5, 6, 7)] == [2.4595, 2.4696, 2.4477]
    assert speed_up(0.3, 0.3, 1) == pytest.approx(1.0)
    assert max(range(20), key=lambda k: speed_up(0.5, 0.05, k)) == 3

"""`svip`."""

from __future__ import annotations

from paceline.control.svip import Svip, SvipOptions
from unit.control.kit import context, costs, shown


def test_stops_where_the_worked_example_stops() -> None:
    controller = Svip(SvipOptions(), costs())
    assert not controller.keep_drafting(0, shown(entropy=0.801819))
    assert controller.keep_drafting(0, shown(entropy=0.232166))


def test_threshold_is_six_tenths_of_a_nat() -> None:
    controller = Svip(SvipOptions(), costs())
    assert controller.keep_drafting(0, shown(entropy=0.599))
    assert not controller.keep_drafting(0, shown(entropy=0.601))


def test_drafters_without_confidences_get_the_full_length() -> None:
    controller = Svip(SvipOptions(k_max=40), costs())
    assert controller.plan(context(available=12)).num_draft == 12
    assert controller.plan(context(available=63)).num_draft == 40

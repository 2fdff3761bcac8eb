"""`gammatune` and `gammatune_plus`."""

from __future__ import annotations

import pytest

from paceline.control.gammatune import GammaTune, GammaTuneOptions, GammaTunePlus, GammaTunePlusOptions
from paceline.errors import OptionError
from unit.control.kit import context, costs, lengths, record, shown


def test_lengths_and_means_follow_the_worked_example() -> None:
    controller = GammaTune(GammaTuneOptions(), costs())
    means = []
    for accepted, length in zip([3, 2, 3, 0, 0, 0, 0], [5, 3, 5, 2, 2, 1, 1], strict=True):
        drafted = controller.plan(context()).num_draft
        controller.observe(record(accepted, drafted))
        assert controller.plan(context()).num_draft == length
        means.append(controller._lengths[0].mean)
    assert means == pytest.approx([3, 2.7, 2.7, 1.89, 1.323, 1.0, 1.0])


def test_length_is_capped() -> None:
    assert lengths(GammaTune(GammaTuneOptions(k_max=6), costs()), [63] * 5)[-1] == 6


def test_requests_have_their_own_lengths() -> None:
    controller = GammaTune(GammaTuneOptions(), costs())
    controller.observe(record(3, 3, request_id=1))
    assert controller.plan(context(request_id=1)).num_draft == 5
    assert controller.plan(context(request_id=2)).num_draft == 3


def test_finished_requests_are_forgotten() -> None:
    controller = GammaTune(GammaTuneOptions(), costs())
    controller.observe(record(3, 3))
    controller.finish(0)
    assert controller.plan(context()).num_draft == 3


def test_plus_stops_at_an_unsure_token() -> None:
    controller = GammaTunePlus(GammaTunePlusOptions(threshold=0.4), costs())
    assert controller.keep_drafting(0, shown(max_prob=0.41))
    assert not controller.keep_drafting(0, shown(max_prob=0.39))


def test_start_outside_the_bounds_is_refused() -> None:
    with pytest.raises(OptionError, match="start = 12"):
        GammaTuneOptions(start=12)
    with pytest.raises(OptionError, match="threshold"):
        GammaTunePlusOptions(threshold=2.0)

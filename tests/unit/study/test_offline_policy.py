"""The policy learnt offline."""

from __future__ import annotations

import pytest

from paceline.errors import OptionError
from paceline.study.offline_policy import OfflineController, record_world, train
from paceline.study.regimes import all_regimes
from paceline.study.replay import make_controller, run_world
from paceline.study.simulator import Simulator, World, draw_world

REGIMES = all_regimes()


def world(name: str, seed: int = 0, tokens: int = 1500) -> World:
    return draw_world(REGIMES[name], seed, tokens)


def test_hopeless_drafts_teach_it_to_stay_plain() -> None:
    policies = train(record_world(world("zero@cpu-native")), REGIMES["zero@cpu-native"].table())
    outcome = Simulator(world("zero@cpu-native", seed=9), OfflineController(policies)).run()
    assert outcome.drafted == 0


def test_keeps_up_with_the_best_fixed_length_on_a_draw_it_has_not_seen() -> None:
    for name in ("confident@cpu-native", "mid@gpu-8b"):
        (row,) = run_world(world(name, seed=9), ["offline_policy"])
        assert row.regret_vs_best_fixed < 0.04


def test_chooses_between_two_drafters() -> None:
    unseen = world("both@cpu-native", seed=9)
    (row,) = run_world(unseen, ["offline_policy"])
    used: set[str | None] = set()
    Simulator(unseen, make_controller("offline_policy", unseen.regime.table(), unseen), lambda r: used.add(r.drafter)).run()
    assert {"ngram", "model"} <= used
    assert row.speedup_vs_plain > 1.3


def test_price_is_what_the_policy_reaches() -> None:
    policies = train(record_world(world("high@cpu-native")), REGIMES["high@cpu-native"].table())
    plain = 1 / REGIMES["high@cpu-native"].table().t_plain(300)
    assert 1.5 * plain < policies[0].price < 2.2 * plain


def test_rounds_without_drafts_are_refused() -> None:
    with pytest.raises(OptionError, match="no round drafted"):
        train([], REGIMES["mid@gpu-8b"].table())

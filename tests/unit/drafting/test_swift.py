"""The search for layers to skip, on a landscape that is known and on a tiny model."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from paceline.drafting.self_draft.skip_search import SkipSearch
from paceline.drafting.self_draft.swift import SwiftDrafter, SwiftOptions
from paceline.errors import OptionError
from unit.drafting.self_kit import COMPILED, PROMPT, generate, in_cache, make, target

WORTH = np.random.default_rng(1).uniform(size=(28, 2))


def agreement(skip: bytes) -> float:
    """1 less what the sub-layers that are left out are worth."""
    bits = np.array([[half >> i & 1 for i in (0, 1)] for half in skip[1:-1]])
    return float(1 - (bits * WORTH).sum() / WORTH.sum())


def searched(trials: int, **settings: float) -> SkipSearch:
    search = SkipSearch(30, **settings)  # type: ignore[arg-type]
    search.renew(agreement(search.best))
    for _ in range(trials):
        if search.done:
            break
        search.judge(agreement(search.propose()))
    return search


def test_every_set_has_the_wanted_size_and_keeps_first_and_last_layer() -> None:
    search = SkipSearch(30)
    for skip in [search.best, *(search.propose() for _ in range(60))]:
        assert len(skip) == 30
        assert skip[0] == skip[-1] == 0
        assert sum(half.bit_count() for half in skip) == round(0.45 * 56)
        search.judge(0.1)


def test_the_search_comes_near_the_best_set() -> None:
    lost = np.sort(WORTH.ravel())
    possible = 1 - lost[:25].sum() / lost.sum()
    start, found = searched(0).agreement, searched(300).agreement
    assert start is not None
    assert found is not None
    assert found > start + 0.8 * (possible - start)


def test_the_best_set_never_gets_worse_on_one_piece_of_text() -> None:
    search, seen = searched(0), [0.0]
    for _ in range(80):
        search.judge(agreement(search.propose()))
        assert search.agreement is not None
        seen.append(search.agreement)
    assert seen == sorted(seen)
    assert search.agreement == agreement(search.best)


def test_it_ends_when_good_enough_or_fruitless_or_after_its_trials() -> None:
    assert searched(300, good=0.5).trials < 40
    fruitless = SkipSearch(30, patience=7)
    fruitless.renew(0.9)
    while not fruitless.done:
        fruitless.propose()
        fruitless.judge(0.1)
    assert fruitless.trials == 7
    assert searched(300, most=12).trials == 12


@COMPILED
def test_the_search_takes_no_more_than_its_share_and_one_pass() -> None:
    times = count()  # each look at the clock is a second
    options = SwiftOptions(window=4, share=0.25)
    drafter = SwiftDrafter(target(), "swift", 97, options, clock=lambda: float(next(times)))
    spent: list[float] = []
    original = drafter.spend

    def spend(seconds: float) -> None:
        spent.append(seconds)
        original(seconds)

    drafter.spend = spend  # type: ignore[method-assign]
    generate(drafter, max_tokens=100)
    assert drafter.search.trials > 3
    assert sum(spent) <= 0.25 * next(times) + max(spent)


@COMPILED
def test_what_was_found_serves_the_next_request() -> None:
    drafter = make("swift", window=4, share=0.9)
    assert isinstance(drafter, SwiftDrafter)
    generate(drafter, max_tokens=120)
    assert drafter.search.trials > 0
    assert drafter.skip == drafter.search.best
    trials = drafter.search.trials
    generate(drafter, prompt=PROMPT[::-1])
    assert drafter.search.trials >= trials


@COMPILED
def test_a_set_is_judged_by_what_the_thinned_model_would_have_said() -> None:
    """With nothing left out the model agrees with its own greedy text; a thinned one of random layers does not."""
    drafter = make("swift", window=6)
    assert isinstance(drafter, SwiftDrafter)
    answer = list(generate(None, max_tokens=8).token_ids)
    view = in_cache(tokens=[*PROMPT, *answer], num_prompt=len(PROMPT))
    session = drafter.open(view)
    assert view.sequence is not None
    session._search(view.sequence)
    assert session._agreement(bytes(6)) == 1.0
    assert session._agreement(bytes([0, 3, 3, 3, 3, 0])) < 1.0
    assert view.sequence.length == len(view.tokens) - 1


def test_a_model_of_two_layers_is_refused() -> None:
    with pytest.raises(OptionError, match="2 layers"):
        SwiftDrafter(target("lean", "llama"), "swift", 97, SwiftOptions())

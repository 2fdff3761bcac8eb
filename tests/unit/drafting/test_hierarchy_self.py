"""Hierarchies whose levels are parts of the target, in the target's own cache."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting.base import Drafter
from paceline.drafting.hierarchy import CascadeDrafter, CascadeOptions
from paceline.drafting.ngram import NgramDrafter
from paceline.execution.base import prefill
from unit.drafting.self_kit import (
    COMPILED,
    all_of,
    gives_the_cache_back,
    in_cache,
    keeps_the_cache_exact,
    make,
    marginals_are_the_targets,
    target,
    writes_the_targets_text,
)

FIXED = {"controller": "fixed", "num_draft": 3}
STACKS = ("ngram>early_exit", "early_exit>layer_skip", "ngram>early_exit>quantized_self", "ngram>sparse_kv", "early_exit>sparse_kv")


EVERYWHERE = [*(pytest.param(names, "native", marks=COMPILED) for names in STACKS), ("early_exit>sparse_kv", "lean")]


def stack(names: str, backend: str = "native", name: str = "self_draft") -> Drafter:
    """A hierarchy as the engine makes it; `sparse_kv` with settings that fit toys."""
    if not names.endswith("sparse_kv"):
        return make(f"cascade:{names}", backend, name, **FIXED)
    upper = make("sparse_kv", backend, name, budget=6, refresh=5, least_context=4)
    lower = NgramDrafter() if names.startswith("ngram") else make("early_exit", backend, name)
    return CascadeDrafter(upper, lower, f"cascade:{names}", options=CascadeOptions(controller="fixed", num_draft=3))


@pytest.mark.parametrize(("names", "backend"), EVERYWHERE)
def test_the_text_is_the_targets_own(names: str, backend: str) -> None:
    writes_the_targets_text(stack(names, backend), backend)


@COMPILED
@pytest.mark.parametrize("names", STACKS)
def test_sampled_text_follows_the_targets_distribution(names: str) -> None:
    assert marginals_are_the_targets(stack(names, name="self_draft_small"))


@pytest.mark.parametrize(("names", "backend"), EVERYWHERE)
def test_the_targets_cache_is_given_back_as_it_was(names: str, backend: str) -> None:
    assert gives_the_cache_back(stack(names, backend), backend) >= 4


@COMPILED
@pytest.mark.parametrize("names", ["ngram>early_exit", "ngram>layer_skip"])
def test_drafts_are_what_the_part_would_say_by_itself(names: str) -> None:
    alone, above = in_cache(), in_cache()
    single, levels = make(names.partition(">")[2]).open(alone), stack(names).open(above)
    for accepted in (2, 0, 4, 1):
        expected = all_of(single, 6).tokens
        draft = all_of(levels, 6).tokens
        assert draft == expected[: len(draft)]
        for view in (alone, above):
            assert view.sequence is not None
            kept = [view.tokens[-1], *draft[:accepted]]
            prefill(target(), view.sequence, kept)
            view.tokens += [*draft[:accepted], 11]


@COMPILED
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_after_any_rounds_the_cache_equals_one_built_afresh(data: st.DataObject) -> None:
    view = in_cache()
    keeps_the_cache_exact(data, view, [stack(data.draw(st.sampled_from(STACKS))).open(view)])

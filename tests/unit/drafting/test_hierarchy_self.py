"""Hierarchies whose levels are parts of the target, in the target's own cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting.base import Drafter
from paceline.drafting.hierarchy import CascadeDrafter, CascadeOptions
from paceline.drafting.ngram import NgramDrafter
from paceline.execution.base import Segment, prefill
from unit.drafting.self_kit import COMPILED, PROMPT, all_of, generate, in_cache, make, marginals_are_the_targets, target

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
    drafter = stack(names, backend)
    drafted = generate(drafter, backend)
    assert drafted.token_ids == generate(None, backend).token_ids
    assert drafted.num_drafted > 0
    seeded = {"temperature": 1.0, "seed": 4}
    assert generate(drafter, backend, **seeded).token_ids == generate(None, backend, **seeded).token_ids


@COMPILED
@pytest.mark.parametrize("names", STACKS)
def test_sampled_text_follows_the_targets_distribution(names: str) -> None:
    assert marginals_are_the_targets(stack(names, name="self_draft_small"))


@pytest.mark.parametrize(("names", "backend"), EVERYWHERE)
def test_the_targets_cache_is_given_back_as_it_was(names: str, backend: str) -> None:
    run, view = target(backend), in_cache(backend)
    assert view.sequence is not None
    before = run.forward([Segment(view.sequence, PROMPT[-1:])]).logits.clone()
    assert len(all_of(stack(names, backend).open(view), 5)) >= 4
    assert view.sequence.length == len(PROMPT) - 1
    assert torch.equal(run.forward([Segment(view.sequence, PROMPT[-1:])]).logits, before)


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
    run, view = target(), in_cache()
    sequence = view.sequence
    assert sequence is not None
    session = stack(data.draw(st.sampled_from(STACKS))).open(view)
    for _ in range(data.draw(st.integers(1, 5))):
        session.outlook(4)
        draft = all_of(session, data.draw(st.integers(1, 5)))
        run.forward([Segment(sequence, (view.tokens[-1], *draft.tokens))])
        kept = data.draw(st.integers(0, len(draft)))
        run.accept(sequence, range(kept + 1))
        view.tokens += [*draft.tokens[:kept], data.draw(st.integers(0, 96))]
    session.close()
    fresh = run.open()
    prefill(run, fresh, view.tokens[:-1])
    logits = [run.forward([Segment(cache, view.tokens[-1:])]).logits.clone() for cache in (sequence, fresh)]
    assert torch.equal(*logits)

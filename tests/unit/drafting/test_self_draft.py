"""All self-drafts on a tiny model: the text is the target's own, and the target's cache comes back as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting import registry
from paceline.drafting.base import DrafterContext, DraftJob
from paceline.drafting.self_draft.copy import CopyDrafter
from paceline.errors import OptionError
from paceline.execution.base import Segment
from toys import ToyRunner, random_language
from unit.drafting.self_kit import (
    BACKENDS,
    COMPILED,
    PROMPT,
    all_of,
    generate,
    gives_the_cache_back,
    in_cache,
    keeps_the_cache_exact,
    make,
    marginals_are_the_targets,
    target,
    writes_the_targets_text,
)

SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "quantized_self": ("quantized_self", {}),
    "dynamic_precision": ("dynamic_precision", {}),
    "early_exit": ("early_exit", {"calibrate": True}),
    "early_exit_of_several": ("early_exit", {"exits": (1, 3, 5), "threshold": 0.3}),
    "layer_skip": ("layer_skip", {}),
    "swift": ("swift", {"window": 4, "share": 0.9}),
    "sparse_ends": ("sparse_kv", {"budget": 6, "refresh": 5, "least_context": 4}),
    "sparse_attended": ("sparse_kv", {"choose": "attended", "budget": 6, "queries": 3, "refresh": 5, "least_context": 4}),
    "sparse_spread": ("sparse_kv", {"choose": "spread", "budget": 6, "queries": 3, "refresh": 5, "least_context": 4}),
}
IN_THE_TARGETS_CACHE = [name for name in SETTINGS if name not in ("quantized_self", "dynamic_precision")]
COPIES = ("quantized_self", "dynamic_precision")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_text_is_the_targets_own(name: str, backend: str) -> None:
    kind, options = SETTINGS[name]
    writes_the_targets_text(make(kind, backend, **options), backend)


@COMPILED
@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_text_follows_the_targets_distribution(name: str) -> None:
    kind, options = SETTINGS[name]
    assert marginals_are_the_targets(make(kind, name="self_draft_small", **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", IN_THE_TARGETS_CACHE)
def test_the_targets_cache_is_given_back_as_it_was(name: str, backend: str) -> None:
    kind, options = SETTINGS[name]
    assert gives_the_cache_back(make(kind, backend, **options), backend) == 5


@COMPILED
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_gives_the_targets_cache_back_as_it_was(name: str) -> None:
    assert gives_the_cache_back(make(name, "native"), "native") == 5


@COMPILED
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_after_any_rounds_the_cache_equals_one_built_afresh(data: st.DataObject) -> None:
    """Several drafters take turns in the cache of one sequence."""
    view = in_cache()
    names = data.draw(st.lists(st.sampled_from((*IN_THE_TARGETS_CACHE, *COPIES)), min_size=1, max_size=3, unique=True))
    keeps_the_cache_exact(data, view, [make(SETTINGS[name][0], **SETTINGS[name][1]).open(view) for name in names])


def test_several_sequences_at_once_are_as_alone() -> None:
    for name in ("swift", "sparse_attended", "early_exit_of_several"):
        kind, options = SETTINGS[name]
        prompts = [PROMPT, PROMPT[::-1], [4, 4, 9]]
        together = generate(make(kind, "lean", **options), "lean", prompts)  # type: ignore[arg-type]
        assert [r.token_ids for r in together] == [generate(None, "lean", prompt).token_ids for prompt in prompts]  # type: ignore[attr-defined]


@COMPILED
def test_layers_that_are_left_out_are_left_out() -> None:
    view = in_cache()
    assert view.sequence is not None
    skip = bytes([0, 0, 3, 0, 3, 0])
    want = int(target().forward_part([Segment(view.sequence, PROMPT[-1:])], skip=skip).logits.argmax())
    assert all_of(make("layer_skip", skip=(2, 4)).open(view), 1).tokens == (want,)


@COMPILED
def test_parts_of_both_backends_agree() -> None:
    skip = bytes([0, 1, 2, 3, 0, 0])
    logits = []
    for backend in ("native", "lean"):
        view = in_cache(backend)
        assert view.sequence is not None
        segment = [Segment(view.sequence, PROMPT[-1:])]
        logits.append([target(backend).forward_part(segment, layers=n, skip=s).logits.clone() for n, s in ((4, skip), (2, None))])
    for native, lean in zip(*logits, strict=True):
        torch.testing.assert_close(native, lean, rtol=1e-4, atol=1e-4)


@COMPILED
def test_a_rounded_copy_agrees_more_often_in_more_bits() -> None:
    rates = [generate(make("quantized_self", precision=p), max_tokens=60).acceptance_rate or 0.0 for p in ("int8", "int4")]
    assert rates[0] > 0.6
    assert rates[0] >= rates[1]


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: make("early_exit", "lean", layer=6), "has 6 layers"),
        (lambda: make("early_exit", "lean", exits=(2, 1)), "must increase"),
        (lambda: make("early_exit", "lean", exits=(1, 2), layer=2), "left out"),
        (lambda: make("layer_skip", "lean", skip=(0,)), "inner layers"),
        (lambda: make("quantized_self", "lean", precision="fp32"), "would save nothing"),
        (lambda: make("quantized_self", "lean", precision="int2"), "choose one of"),
        (lambda: make("dynamic_precision", "lean", bits=3.0), "bits"),
        (lambda: make("dynamic_precision", "lean", narrow="int8"), "more bits"),
        (lambda: make("dynamic_precision", "lean", narrow="bf16", wide="fp32", bits=40), "bits"),
        (lambda: make("sparse_kv", "lean", choose="best"), "choose one of"),
        (lambda: make("sparse_kv", "lean", choose="attended", budget=8), "under budget"),
        (lambda: make("swift", "lean", share=2.0), "share"),
        (lambda: registry.create("early_exit", {}, DrafterContext(vocab_size=9, max_context=9)), "no target"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build_it: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build_it()


@pytest.mark.parametrize("kind", ["early_exit", "layer_skip", "swift", "sparse_kv"])
def test_a_backend_that_cannot_serve_is_named_with_one_that_can(kind: str) -> None:
    context = DrafterContext(vocab_size=9, max_context=9, target=ToyRunner(random_language(9), 9))
    with pytest.raises(OptionError, match="backend = 'native'"):
        registry.create(kind, {}, context)


@COMPILED
def test_a_copy_reads_what_the_target_has_computed() -> None:
    """It has nothing to catch up with, and holds its weights only."""
    drafter = make("quantized_self", precision="int8")
    view = in_cache()
    outlook = drafter.open(view).outlook(4)
    assert (outlook.available, outlook.catch_up, outlook.together) == (4, 0, True)
    assert isinstance(drafter, CopyDrafter)
    assert 0 < drafter.memory_bytes() == drafter.runner.info.weight_bytes


@COMPILED
def test_copies_of_several_sequences_draft_in_shared_steps_as_each_alone() -> None:
    drafter = make("quantized_self", precision="int8")
    views = [in_cache() for _ in range(3)]
    alone = [all_of(drafter.open(view), k).tokens for view, k in zip(views, (4, 1, 6), strict=True)]
    jobs = [DraftJob(drafter.open(view), k, lambda _: True) for view, k in zip(views, (4, 1, 6), strict=True)]
    assert [draft.tokens for draft in drafter.propose_together(jobs)] == alone

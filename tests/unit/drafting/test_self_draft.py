"""Self-drafts on a tiny model with the compiled kernels: the target's cache serves, and comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting import registry
from paceline.drafting.base import Drafter, DrafterContext
from paceline.drafting.self_draft import EarlyExitDrafter
from paceline.engine import Engine
from paceline.errors import OptionError
from paceline.execution.base import Runner, Segment, prefill
from paceline.execution.native import build
from paceline.execution.native.runner import NativeRunner
from toys import ToyRunner, make_view, random_language
from unit.execution.toy_sources import CONFIGS, EXTRA_CONFIGS, ToySource

pytestmark = pytest.mark.skipif(isinstance(build.load_library(), str), reason=str(build.load_library()))
EXTRA_CONFIGS["self_draft"] = {**CONFIGS["llama"], "head_dim": 16, "num_hidden_layers": 6, "max_position_embeddings": 512}
PROMPT = [5, 9, 2, 7, 1, 8, 8, 3]


@lru_cache
def target() -> NativeRunner:
    return NativeRunner(ToySource("self_draft"), "fp32")


def open_self(precision: str) -> Runner:
    return NativeRunner(ToySource("self_draft"), precision)


def make(name: str, **options: object) -> Drafter:
    context = DrafterContext(vocab_size=97, max_context=512, open_self=open_self, target=target())
    return registry.create(name, dict(options), context)


def answer(drafter: Drafter | None, **params: object) -> tuple[int, ...]:
    costs = CostTable([1, 9], [1], [[1e-3, 1.2e-3]])
    engine = Engine(
        target(),
        costs=costs,
        controller=controllers.create("fixed", costs, {"num_draft": 4}),
        drafters=[] if drafter is None else [drafter],
    )
    return engine.generate(PROMPT, SamplingParams(**{"max_tokens": 30, **params})).token_ids  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["quantized_self", "early_exit", "layer_skip"])
def test_the_text_is_the_targets_own(name: str) -> None:
    assert answer(make(name)) == answer(None)
    seeded = {"temperature": 1.0, "seed": 4}
    assert answer(make(name), **seeded) == answer(None, **seeded)


@pytest.mark.parametrize("name", ["early_exit", "layer_skip"])
def test_the_targets_cache_is_given_back_as_it_was(name: str) -> None:
    run = target()
    sequence = run.open()
    prefill(run, sequence, PROMPT[:-1])
    before = run.forward([Segment(sequence, PROMPT[-1:])]).logits.clone()
    view = make_view(PROMPT)
    view.sequence = sequence
    draft = make(name).open(view).propose(5, lambda _: True)
    assert len(draft) == 5
    assert sequence.length == len(PROMPT) - 1
    assert torch.equal(run.forward([Segment(sequence, PROMPT[-1:])]).logits, before)


def test_an_exit_after_the_first_layer_drafts_what_those_layers_say() -> None:
    run = target()
    sequence = run.open()
    prefill(run, sequence, PROMPT[:-1])
    want = int(run.forward_part([Segment(sequence, PROMPT[-1:])], layers=1).logits.argmax())
    view = make_view(PROMPT)
    view.sequence = sequence
    assert make("early_exit", layer=1).open(view).propose(1, lambda _: True).tokens == (want,)


def test_a_rounded_copy_agrees_more_often_in_more_bits() -> None:
    def accepted(precision: str) -> float:
        costs = CostTable([1, 9], [1], [[1e-3, 1.2e-3]])
        controller = controllers.create("fixed", costs, {"num_draft": 4})
        engine = Engine(target(), costs=costs, controller=controller, drafters=[make("quantized_self", precision=precision)])
        return engine.generate(PROMPT, SamplingParams(max_tokens=60)).acceptance_rate or 0.0

    assert accepted("int8") > 0.6
    assert accepted("int8") >= accepted("int4")


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: make("early_exit", layer=6), "has 6 layers"),
        (lambda: make("layer_skip", skip=(0,)), "inner layers"),
        (lambda: make("quantized_self", precision="fp32"), "would save nothing"),
        (lambda: make("quantized_self", precision="int2"), "choose one of"),
        (lambda: registry.create("early_exit", {}, DrafterContext(vocab_size=9, max_context=9)), "no target"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build_it: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build_it()


def test_a_backend_that_runs_whole_models_only_is_named() -> None:
    whole = ToyRunner(random_language(9), 9)
    with pytest.raises(OptionError, match="backend = 'native'"):
        EarlyExitDrafter(whole, "early_exit", layers=1)

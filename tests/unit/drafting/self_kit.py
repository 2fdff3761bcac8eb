"""What tests of self-drafts share: a tiny model of six layers on the backends that can draft for themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product

import pytest
import scipy.stats
import torch
from hypothesis import strategies as st

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting import registry
from paceline.drafting.base import Drafter, DrafterContext, DraftSession, SequenceView
from paceline.engine import Engine
from paceline.execution.base import Runner, Segment, prefill
from paceline.execution.lean import LeanRunner
from paceline.execution.native import build
from paceline.execution.native.runner import NativeRunner
from paceline.records import Draft, GenerationResult
from toys import make_view, speculate_toy
from unit.execution.toy_sources import CONFIGS, EXTRA_CONFIGS, ToySource, stock_logits

COMPILED = pytest.mark.skipif(isinstance(build.load_library(), str), reason=str(build.load_library()))
BACKENDS = [pytest.param("native", marks=COMPILED), "lean"]
PROMPT = [5, 9, 2, 7, 1, 8, 8, 3]
SMALL = [1, 3, 0, 2, 4, 1, 3, 0]
_LAYERS = {**CONFIGS["llama"], "head_dim": 16, "num_hidden_layers": 6, "max_position_embeddings": 512}
EXTRA_CONFIGS["self_draft"] = _LAYERS
EXTRA_CONFIGS["self_draft_small"] = {**_LAYERS, "vocab_size": 5, "initializer_range": 0.15}


@lru_cache
def target(backend: str = "native", name: str = "self_draft", precision: str = "fp32") -> Runner:
    source = ToySource(name)
    return NativeRunner(source, precision, threads=1) if backend == "native" else LeanRunner(source, precision)


def make(kind: str, backend: str = "native", name: str = "self_draft", **options: object) -> Drafter:
    """A drafter as the engine makes it."""

    def open_self(precision: str) -> Runner:
        return target(backend, name, precision)

    def open_graded(narrow: str, wide: str, set_up: Callable[[Runner], str]) -> Runner:
        runner = target(backend, name, f"{narrow}+{wide}")
        set_up(runner)
        return runner

    vocab = 97 if name == "self_draft" else 5
    context = DrafterContext(
        vocab_size=vocab,
        max_context=512,
        open_self=open_self,
        open_graded=open_graded,
        target=target(backend, name),
    )
    return registry.create(kind, dict(options), context)


def generate(drafter: Drafter | None, backend: str = "native", prompt: list[int] = PROMPT, **params: object) -> GenerationResult:
    """An answer with four drafted tokens a round, or without drafts."""
    costs = CostTable([1, 9], [1], [[1e-3, 1.2e-3]])
    engine = Engine(
        target(backend),
        costs=costs,
        controller=controllers.create("fixed", costs, {"num_draft": 4}),
        drafters=[] if drafter is None else [drafter],
    )
    settings = {"max_tokens": 30, **params}
    return engine.generate(prompt, SamplingParams(**settings))  # type: ignore[arg-type,return-value]


def in_cache(backend: str = "native", tokens: list[int] = PROMPT, **settings: object) -> SequenceView:
    """A view whose tokens lie in the target's cache but for the last one."""
    view = make_view(tokens, **settings)  # type: ignore[arg-type]
    view.sequence = target(backend).open()
    prefill(target(backend), view.sequence, tokens[:-1])
    return view


def all_of(session: DraftSession, count: int) -> Draft:
    return session.propose(count, lambda _: True)


def writes_the_targets_text(drafter: Drafter, backend: str) -> None:
    """Asserts that greedy and seeded answers are those of plain decoding, and that something was drafted."""
    drafted = generate(drafter, backend)
    assert drafted.token_ids == generate(None, backend).token_ids
    assert drafted.num_drafted > 0
    seeded = {"temperature": 1.0, "seed": 4}
    assert generate(drafter, backend, **seeded).token_ids == generate(None, backend, **seeded).token_ids


def gives_the_cache_back(drafter: Drafter, backend: str) -> int:
    """Asserts that the target's cache is after a draft what it was before. Returns how many of five tokens were drafted."""
    run, view = target(backend), in_cache(backend)
    assert view.sequence is not None
    before = run.forward([Segment(view.sequence, PROMPT[-1:])]).logits.clone()
    count = len(all_of(drafter.open(view), 5))
    assert view.sequence.length == len(PROMPT) - 1
    assert torch.equal(run.forward([Segment(view.sequence, PROMPT[-1:])]).logits, before)
    return count


def keeps_the_cache_exact(data: st.DataObject, view: SequenceView, sessions: Sequence[DraftSession]) -> None:
    """Asserts that after rounds of these sessions, each kept up to any token, the target's cache equals one built afresh."""
    run, sequence = target(), view.sequence
    assert sequence is not None
    for _ in range(data.draw(st.integers(1, 5))):
        session = data.draw(st.sampled_from(sessions))
        session.outlook(4)
        draft = all_of(session, data.draw(st.integers(1, 5)))
        run.forward([Segment(sequence, (view.tokens[-1], *draft.tokens))])
        kept = data.draw(st.integers(0, len(draft)))
        run.accept(sequence, range(kept + 1))
        view.tokens += [*draft.tokens[:kept], data.draw(st.integers(0, 96))]
    for session in sessions:
        session.close()
    fresh = run.open()
    prefill(run, fresh, view.tokens[:-1])
    logits = [run.forward([Segment(cache, view.tokens[-1:])]).logits.clone() for cache in (sequence, fresh)]
    assert torch.equal(*logits)


def marginals_are_the_targets(drafter: Drafter, *, num_tokens: int = 2, samples: int = 300) -> bool:
    """Whether sampled answers of a model of five tokens follow its distribution, by enumeration of all of them."""
    sampling = SamplingParams(temperature=1.1)
    exact = {}
    for tail in product(range(5), repeat=num_tokens):
        probs = torch.softmax(stock_logits("self_draft_small", [*SMALL, *tail]) / 1.1, dim=-1)
        exact[tail] = float(torch.stack([probs[len(SMALL) - 1 + i, token] for i, token in enumerate(tail)]).prod())
    counts: Counter[tuple[int, ...]] = Counter()
    runner = target("native", "self_draft_small")
    for seed in range(samples):
        view = make_view(SMALL, sampling=sampling, seed=seed)
        counts[tuple(speculate_toy(runner, drafter, view, num_tokens, 2)[:num_tokens])] += 1
    observed = [counts[tail] for tail in exact]
    expected = [samples * prob / sum(exact.values()) for prob in exact.values()]
    return bool(scipy.stats.chisquare(observed, expected).pvalue > 1e-6)

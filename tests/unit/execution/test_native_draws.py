"""Draws by the compiled kernels: tokens are those of the readable form, in any batch, and texts those of plain decoding."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import SamplingParams, SpeculationConfig
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting.base import Drafter
from paceline.drafting.model import ModelDrafter
from paceline.drafting.ngram import NgramDrafter
from paceline.drafting.suffix import SuffixDrafter
from paceline.engine import Engine
from paceline.execution.base import Segment
from paceline.execution.draws import NUMBER_BITS, DrawLaw, Draws, draw_from, row_weights
from paceline.execution.native import binding, build
from paceline.execution.native.drawing import Drawer, DrawnRows
from paceline.execution.native.runner import NativeRunner
from paceline.records import Draft, GenerationResult
from paceline.verification.base import Rule
from paceline.verification.registry import choose_rule
from unit.execution.toy_sources import CONFIGS, EXTRA_CONFIGS, ToySource

pytestmark = pytest.mark.skipif(isinstance(build.load_library(), str), reason=str(build.load_library()))

EXTRA_CONFIGS["draws_llama"] = {**CONFIGS["llama"], "head_dim": 16, "max_position_embeddings": 512}

VOCABS = (1, 15, 16, 97, 255, 256, 257, 3000)
LAWS = st.builds(
    DrawLaw,
    temperature=st.one_of(st.sampled_from([1e-6, 0.7, 1.0, 100.0]), st.floats(0.05, 5.0)),
    top_k=st.sampled_from([0, 1, 2, 20, 256, 5000]),
    top_p=st.sampled_from([1.0, 0.999999999, 0.99, 0.9, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.001, 0.2, 1.0]),
    vocab_size=st.sampled_from([1 << 30, 90, 1]),
)


@cache
def drawer(vocab: int) -> Drawer:
    library = build.load_library()
    assert not isinstance(library, str)
    binding.declare(library)
    return Drawer(library, vocab)


def row_of(vocab: int, seed: int, steps: int = 0, masked: float = 0.0) -> torch.Tensor:
    """Normal logits; steps: rounded to so many values a unit, so that there are ties; masked: share of -inf."""
    made = torch.Generator().manual_seed(seed)
    row = 4 * torch.randn(vocab, generator=made)
    row = (row * steps).round() / steps if steps else row
    hidden = torch.rand(vocab, generator=made) < masked
    hidden[0] = False
    return row.masked_fill(hidden, -math.inf)


def drawn(row: torch.Tensor, law: DrawLaw, number: int) -> int:
    return drawer(len(row)).draw(row.data_ptr(), law, number)[0]


def check(row: torch.Tensor, law: DrawLaw, numbers: list[int]) -> None:
    """Tokens are those of the readable form, unless a number falls where two sums differ by the last bits of exp.

    Those bits may also decide whether top_p keeps tokens that hardly weigh anything.
    """
    weights = row_weights(row, law)
    unfiltered, total = row_weights(row, replace(law, top_p=1.0)), int(weights.sum())
    for number in numbers:
        got, want = drawn(row, law, number), draw_from(weights, number)
        if got == want:
            continue
        assert weights[got] > 0 or unfiltered[got] < 2e-6 * total, (got, want)
        between = sorted((got, want))
        low, high = int(weights[: between[0] + 1].sum()), int(weights[: between[1]].sum())
        place = number * total >> NUMBER_BITS
        assert low - 2e-6 * total <= place <= high + 2e-6 * total, (got, want)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(VOCABS),
    st.integers(0, 10_000),
    st.sampled_from([0, 1, 4]),
    st.sampled_from([0.0, 0.5, 0.99]),
    LAWS,
    st.lists(st.integers(0, (1 << NUMBER_BITS) - 1), min_size=1, max_size=5),
)
def test_a_draw_is_that_of_the_readable_form(
    vocab: int, seed: int, steps: int, masked: float, law: DrawLaw, numbers: list[int]
) -> None:
    check(row_of(vocab, seed, steps, masked), law, [0, *numbers, (1 << NUMBER_BITS) - 1])


@pytest.mark.parametrize("law", [DrawLaw(1.0), DrawLaw(0.8, top_k=50), DrawLaw(1.2, top_p=0.95), DrawLaw(100.0, 1000, 0.9)])
def test_a_row_of_a_large_vocabulary_too(law: DrawLaw) -> None:
    numbers = [random.Random(1).randrange(1 << NUMBER_BITS) for _ in range(20)]
    check(row_of(49_152, 5), law, numbers)


@pytest.mark.parametrize("vocab", VOCABS)
def test_rows_without_a_finite_peak_are_not_drawn(vocab: int) -> None:
    for bad in (math.nan, math.inf):
        for place in {0, vocab // 2, vocab - 1}:
            row = row_of(vocab, 1)
            row[place] = bad
            assert drawn(row, DrawLaw(1.0), 1 << 52) == -1
            assert drawn(row, DrawLaw(1.0, top_p=0.9), 1 << 52) == -1
    assert drawn(torch.full((vocab,), -math.inf), DrawLaw(1.0), 0) == -1


def test_what_lies_beyond_the_vocabulary_is_not_looked_at() -> None:
    row = row_of(300, 2)
    row[290:] = math.nan
    for number in range(0, 1 << NUMBER_BITS, 1 << 48):
        assert drawn(row, DrawLaw(1.0, vocab_size=290), number) == drawn(row[:290].clone(), DrawLaw(1.0), number)


@pytest.mark.parametrize(
    "law", [DrawLaw(1.0), DrawLaw(0.7, top_k=12), DrawLaw(1.3, top_p=0.8), DrawLaw(0.9, 30, 0.9, 0.05), DrawLaw(2.0, vocab_size=80)]
)
def test_many_draws_follow_the_law(law: DrawLaw) -> None:
    row, count, source = row_of(97, 3), 40_000, random.Random(11)
    weights = row_weights(row, law).astype(np.float64)
    seen = np.bincount([drawn(row, law, source.randrange(1 << NUMBER_BITS)) for _ in range(count)], minlength=len(weights))
    want = count * weights / weights.sum()
    assert not seen[want == 0].any()
    rare = want < 5
    seen = np.append(seen[~rare], seen[rare].sum())
    want = np.append(want[~rare], want[rare].sum())
    chi_square = float(((seen - want) ** 2 / np.maximum(want, 1e-9))[want > 0].sum())
    degrees = int((want > 0).sum()) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees) + 5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), LAWS, st.sets(st.integers(0, 96), min_size=1, max_size=40))
def test_masses_are_shares_of_the_weights(seed: int, law: DrawLaw, tokens: set[int]) -> None:
    row = row_of(97, seed)
    _, found = drawer(97).draw(row.data_ptr(), law, 1)
    weights = row_weights(row, law)
    want = sum(int(weights[token]) for token in tokens if token < len(weights)) / int(weights.sum())
    assert drawer(97).mass(row.data_ptr(), law, found, tokens) == pytest.approx(want, abs=1e-5)


# ---------- through the runner ----------


def runner() -> NativeRunner:
    return NativeRunner(ToySource("draws_llama"), "int8", threads=2)


def test_a_row_draws_the_same_token_in_any_batch_and_only_where_its_segment_asked() -> None:
    run, tokens = runner(), [5, 6, 7, 8, 9]
    draws = Draws(DrawLaw(1.5, top_p=0.95), [random.Random(3).randrange(1 << NUMBER_BITS) for _ in tokens])
    one, other = run.open(), run.open()
    alone = list(run.forward([Segment(one, tokens, draws=draws)]).drawn or ())
    assert len(alone) == 5
    both = run.forward([Segment(other, [3, 4]), Segment(one, tokens, draws=draws)])
    assert both.best is not None
    assert both.drawn is not None
    assert list(both.drawn) == [*both.best[:2], *alone]
    assert list(both.drawn[3:5]) == alone[1:3]
    assert both.drawn[-1] == alone[-1]
    assert both.mass is not None
    assert both.mass(0, [1]) is None
    assert both.mass(2, range(97)) == pytest.approx(1.0)
    assert list(run.forward([Segment(one, tokens, num_logits=2, draws=draws)]).drawn or ()) == alone[-2:]
    assert run.forward([Segment(one, tokens)]).drawn is None


def test_a_row_that_the_next_forward_has_overwritten_is_not_drawn() -> None:
    run = runner()
    sequence = run.open()
    found = run.forward([Segment(sequence, [5, 6], draws=Draws(DrawLaw(1.0), [1 << 50, 1 << 51]))]).drawn
    assert found is not None
    first = found[0]
    run.forward([Segment(sequence, [7])])
    assert found[0] == first
    with pytest.raises(RuntimeError, match="next forward"):
        found[1]


# ---------- through the engine ----------

PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5, 6, 5, 6, 5], list(range(20))]
SAMPLED = [
    SamplingParams(max_tokens=24, temperature=0.3, seed=4),
    SamplingParams(max_tokens=24, temperature=0.5, top_k=12, top_p=0.9, min_p=0.01, seed=4),
    SamplingParams(max_tokens=24, temperature=0.4, presence_penalty=0.4, seed=4),
    SamplingParams(max_tokens=24, temperature=0.4, logprobs=2, seed=4),
]


def engine_of(*drafters: Drafter, run: NativeRunner | None = None) -> Engine:
    costs = CostTable([1, 8], [64], [[1.0, 1.1]])
    controller = controllers.create("fixed", costs, {"num_draft": 4})
    return Engine(run or runner(), costs=costs, controller=controller, drafters=list(drafters), speculation=SpeculationConfig())


def made_by(kind: str) -> Drafter:
    if kind == "model":
        return ModelDrafter(runner())
    return NgramDrafter() if kind == "ngram" else SuffixDrafter(tree=True)


@pytest.mark.parametrize("params", SAMPLED)
@pytest.mark.parametrize("kind", ["model", "ngram", "suffix+tree"])
def test_a_seeded_text_is_the_same_plain_and_with_any_draft(kind: str, params: SamplingParams) -> None:
    engine = engine_of(made_by(kind))
    made = engine.generate(PROMPTS, params)
    assert sum(result.num_drafted for result in made) > 0
    for prompt, result in zip(PROMPTS, made, strict=True):
        assert result.token_ids == engine.generate(prompt, params, plain=True).token_ids


def rules_of(engine: Engine, params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the rules that judged drafts."""
    names: set[str] = set()

    def spy(name: str, params: SamplingParams, draft: Draft, seeded: bool) -> Rule:
        rule = choose_rule(name, params, draft, seeded)
        if draft.tokens:
            names.add(rule.name)
        return rule

    monkeypatch.setattr("paceline.request.choose_rule", spy)
    assert sum(result.num_drafted for result in engine.generate(PROMPTS, params)) > 0
    return names


def test_drafts_with_distributions_keep_their_ratio_test_unless_there_is_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    unseeded = SamplingParams(max_tokens=24, temperature=0.5)
    assert rules_of(engine_of(made_by("model")), unseeded, monkeypatch) == {"block"}
    assert rules_of(engine_of(made_by("suffix+tree")), unseeded, monkeypatch) == {"match"}
    both = rules_of(engine_of(made_by("ngram"), made_by("model")), unseeded, monkeypatch)
    assert both <= {"match", "block"}
    assert "block" in both or len(both) == 1


@pytest.mark.parametrize("kind", [None, "ngram", "suffix+tree"])
def test_an_unseeded_text_is_that_of_the_seed_that_it_tells(kind: str | None) -> None:
    engine = engine_of(*([made_by(kind)] if kind else []))
    first = engine.generate(PROMPTS[0], SamplingParams(max_tokens=24, temperature=0.4))
    assert isinstance(first, GenerationResult)
    again = engine.generate(PROMPTS[0], SamplingParams(max_tokens=24, temperature=0.4, seed=first.seed), plain=True)
    assert first.token_ids == again.token_ids


def test_only_rows_that_are_looked_at_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    real = Drawer.draw

    def counting(self: Drawer, row_at: int, law: DrawLaw, number: int) -> tuple[int, binding.Drawn]:
        nonlocal count
        count += 1
        return real(self, row_at, law, number)

    monkeypatch.setattr(Drawer, "draw", counting)
    for kind in ("model", "ngram", "suffix+tree"):
        count = 0
        result = engine_of(made_by(kind)).generate(PROMPTS[0], SamplingParams(max_tokens=24, temperature=0.6, seed=1))
        assert isinstance(result, GenerationResult)
        assert count == len(result.token_ids)


def test_labels_of_chosen_drafts_are_the_probabilities_that_sampling_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.7, top_p=0.9, seed=3)
    told = engine_of(made_by("suffix+tree")).generate(PROMPTS[0], params)
    monkeypatch.setattr(DrawnRows, "mass", lambda self, row, tokens: None)
    computed = engine_of(made_by("suffix+tree")).generate(PROMPTS[0], params)
    assert isinstance(told, GenerationResult)
    assert isinstance(computed, GenerationResult)
    assert told.token_ids == computed.token_ids
    labels = [label for step in told.steps for label in step.acceptance]
    assert labels == pytest.approx([label for step in computed.steps for label in step.acceptance], abs=1e-5)
    assert any(0 < label < 1 for label in labels)

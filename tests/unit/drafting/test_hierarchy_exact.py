"""Drafters for drafters are exact at every level: texts, laws by enumeration, and traps that would bias them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import SamplingParams
from paceline.drafting import hierarchy
from paceline.drafting.base import Drafter, DrafterContext
from paceline.drafting.hierarchy import CascadeDrafter, CascadeOptions
from paceline.drafting.model import ModelDrafter
from paceline.drafting.registry import create
from paceline.sampling import Purpose
from paceline.verification import block
from toys import Language, ToyRunner, make_view, random_language, speculate_toy, table_language
from unit.drafting.enumeration_kit import PROMPT, BranchRandom, law_of_text, rows_of
from unit.drafting.hierarchy_kit import SPECS, VOCAB, make
from unit.drafting.kit import always, greedy_text
from unit.verification.exact import Branch, Law, branching_draw, extend, outcomes, target_law, total_variation


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(1, 3),
    pick=st.integers(0, 3),
    num_draft=st.integers(1, 9),
    below=st.integers(1, 5),
)
def test_greedy_text_is_the_targets_at_any_depth(seed: int, depth: int, pick: int, num_draft: int, below: int) -> None:
    target = random_language(VOCAB, order=3, seed=seed)
    specs = SPECS[depth]
    drafter = make(specs[pick % len(specs)], target, num_draft=below)
    prompt = np.random.default_rng(seed).integers(0, VOCAB, 8).tolist()
    assert speculate_toy(ToyRunner(target, VOCAB), drafter, make_view(prompt), 30, num_draft) == greedy_text(target, prompt, 30)
    assert drafter.runner.open_sequences == 0  # type: ignore[attr-defined]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.integers(1, 3), pick=st.integers(0, 3), num_draft=st.integers(1, 9))
def test_seeded_text_does_not_depend_on_the_levels(seed: int, depth: int, pick: int, num_draft: int) -> None:
    target = random_language(VOCAB, order=2, seed=seed, scale=1.5)
    specs = SPECS[depth]
    sampling = SamplingParams(temperature=1.0, seed=seed)
    prompt = [0, 1, 2, 3, 0, 1]
    texts = [
        speculate_toy(
            ToyRunner(target, VOCAB),
            make(specs[pick % len(specs)], target),
            make_view(prompt, sampling=sampling, seed=seed, coupled=True),
            25,
            length,
        )
        for length in (0, num_draft)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("spec", "controller"),
    [("cascade:stand>model:0.9>model:0.4", "fixed"), ("cascade:ngram>model:1.2>model:0.9>model:0.4", "pacer")],
)
def test_sampled_text_follows_the_targets_distribution(spec: str, controller: str) -> None:
    vocab, samples = 3, 300
    target = random_language(vocab, order=2, seed=7, scale=1.0)
    drafter = make(spec, target, vocab, controller=controller)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(samples):
        view = make_view([0, 1, 2, 0, 1], sampling=SamplingParams(temperature=1.0), seed=seed)
        counts[tuple(speculate_toy(ToyRunner(target, vocab), drafter, view, 3, 3))] += 1
    exact = target_law(lambda tail: torch.softmax(torch.from_numpy(target((0, 1, *tail))), dim=-1), 3)
    observed = [counts[tail] for tail in exact]
    assert scipy.stats.chisquare(observed, [samples * p for p in exact.values()]).pvalue > 1e-6


def chain(depth: int, vocab: int, seed: int) -> tuple[Language, CascadeDrafter]:
    """A target and a hierarchy of `depth` verifying levels over a sampled model, all unlike."""
    target = random_language(vocab, order=None, seed=seed, scale=1.0)
    spec = "cascade:" + ">".join(f"model:{0.6 * (depth - i) + 0.8}" for i in range(depth + 1))
    return target, make(spec, target, vocab, num_draft=2)


@pytest.mark.usefixtures("enumerated")
@pytest.mark.parametrize(("depth", "num_draft", "length"), [(1, 2, 3), (1, 3, 2), (2, 2, 2), (3, 2, 2)])
def test_the_law_of_the_text_is_the_targets_by_enumeration(depth: int, num_draft: int, length: int) -> None:
    for seed in range(1 if num_draft > 2 else 2):
        target, drafter = chain(depth, 2, seed)
        law = law_of_text(drafter, target, length, num_draft)
        assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
        assert total_variation(law, target_law(rows_of(target), length)) < 1e-6


@pytest.mark.usefixtures("enumerated")
def test_numbers_that_return_after_a_rejection_would_bias_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = chain(1, 2, 0)
    monkeypatch.setattr(hierarchy.CascadeSession, "_renew_seed", lambda self: None)
    assert total_variation(law_of_text(drafter, target, 2, 3), target_law(rows_of(target), 2)) > 1e-4


def law_of_draft(drafter: Drafter, length: int, num_draft: int, own: Language) -> Law:
    """Law of the first `length` drafted tokens; the level's model goes on where a draft is shorter."""

    def run(branch: Branch) -> tuple[int, tuple[int, ...]]:
        BranchRandom.branch = branch
        session = drafter.open(make_view(PROMPT, sampling=SamplingParams(temperature=1.0)))
        draft = session.propose(num_draft, always)
        session.close()
        assert draft.draft_probs is not None
        for j, row in enumerate(draft.draft_probs):
            assert torch.allclose(row.double(), rows_of(own)(draft.tokens[:j]), atol=1e-6)
        return 0, draft.tokens

    return extend(outcomes(run), rows_of(own), length)


@pytest.mark.usefixtures("enumerated")
@pytest.mark.parametrize(("depth", "num_draft"), [(1, 3), (2, 2)])
def test_drafted_tokens_follow_the_upper_models_law_and_rows_by_enumeration(depth: int, num_draft: int) -> None:
    for seed in range(2):
        _, drafter = chain(depth, 3 - depth // 2, seed)
        own = drafter.runner.language  # type: ignore[attr-defined]
        assert total_variation(law_of_draft(drafter, num_draft, num_draft, own), target_law(rows_of(own), num_draft)) < 1e-6


@pytest.mark.usefixtures("enumerated")
def test_replacements_come_from_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    # drafting.md 3.3: drawn from the whole distribution instead, the law would be (.14, .28, .32, .26)
    upper, lower = [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]
    runners = [ToyRunner(table_language(dict.fromkeys(range(4), row)), 4) for row in (upper, lower)]
    drafter = CascadeDrafter(
        ModelDrafter(runners[0]), ModelDrafter(runners[1]), options=CascadeOptions(controller="fixed", num_draft=1)
    )
    one = law_of_draft(drafter, 1, 2, runners[0].language)
    assert [one[(token,)] for token in range(4)] == pytest.approx(upper, abs=1e-6)

    def from_the_whole(rest: object, mass: float, probs: torch.Tensor, random: Branch, position: int) -> int:
        return branching_draw(probs, random.uniform(position, Purpose.RESIDUAL))

    monkeypatch.setattr(block, "draw_recovered", from_the_whole)
    trapped = law_of_draft(drafter, 1, 2, runners[0].language)
    assert [trapped[(token,)] for token in range(4)] == pytest.approx([0.14, 0.28, 0.32, 0.26], abs=1e-6)


@pytest.mark.parametrize("lower", ["model:0.9", "stand"])
def test_sampling_drafters_read_the_seed_anew(lower: str) -> None:
    target = random_language(64, order=1, scale=0.1)
    context = DrafterContext(vocab_size=64, max_context=64, open_model=lambda _: ToyRunner(target, 64))
    view = make_view([1, 2, 3], sampling=SamplingParams(temperature=1.0))
    drafter = create(lower, {"min_context": 1} if lower == "stand" else {}, context)
    session = drafter.open(view)
    if drafter.wants_logits:
        view.tokens += [2]
        session.observe(None, torch.from_numpy(np.stack([target((3,))])).float())
        view.tokens[-1] = 3
    drafts = set()
    for seed in range(8):
        view.seed = seed
        drafts.add(session.propose(1, always).tokens)
    assert len(drafts) > 1

"""Chain rules leave the target's law untouched: exact enumeration of the real code."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.records import Draft
from paceline.sampling import Purpose
from paceline.verification.base import Rule
from paceline.verification.registry import create
from unit.verification.exact import (
    KINDS,
    Branch,
    branching_draw,
    chain_draft,
    chain_law,
    extend,
    mean_accepted,
    outcomes,
    random_models,
    target_law,
    target_rows,
    total_variation,
)

models = st.builds(random_models, st.integers(0, 10_000), st.sampled_from(KINDS), st.integers(3, 4))


@pytest.mark.parametrize("name", ["leviathan", "block", "match"])
@given(models=models, k=st.integers(1, 2))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_the_emitted_law_is_the_targets(name, models, k):
    target, draft = models
    law = chain_law(create(name), target, draft, k)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-12)
    assert total_variation(extend(law, target, k + 1), target_law(target, k + 1)) < 1e-12


@pytest.mark.parametrize("name", ["leviathan", "block", "match"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_emitted_law_is_the_targets_for_three_drafted_tokens(name, kind):
    target, draft = random_models(5, kind, 3)
    law = chain_law(create(name), target, draft, 3)
    assert total_variation(extend(law, target, 4), target_law(target, 4)) < 1e-12


@given(models=models, k=st.integers(1, 2))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_block_never_accepts_fewer_tokens_than_token_by_token(models, k):
    target, draft = models
    block = mean_accepted(chain_law(create("block"), target, draft, k))
    token = mean_accepted(chain_law(create("leviathan"), target, draft, k))
    assert block >= token - 1e-12
    if k == 1:
        assert block == pytest.approx(token, abs=1e-12)


@pytest.mark.parametrize("name", ["leviathan", "block", "match"])
def test_a_perfect_draft_is_always_accepted_by_ratio_rules(name):
    target, _ = random_models(3, "dense", 3)
    law = chain_law(create(name), target, target, 2)
    accepted_all = sum(probability for (accepted, _), probability in law.items() if accepted == 2)
    assert accepted_all == pytest.approx(1.0) if name != "match" else accepted_all < 0.9


def rounds_law(rule: Rule, models, length: int, key_position):
    """Law of `length` tokens from rounds of two drafted tokens, or of one (kept) where that is token 0."""
    target, draft = models

    def run(branch: Branch) -> tuple[int, ...]:
        emitted: tuple[int, ...] = ()
        while len(emitted) < length:
            start = len(emitted)
            first = draft(emitted)
            tokens = [branching_draw(first, branch.uniform(*key_position(start, 0)))]
            rows = [first]
            if tokens[0] != 0:
                rows.append(draft((*emitted, *tokens)))
                tokens.append(branching_draw(rows[1], branch.uniform(*key_position(start, 1))))
            proposal = chain_draft(tokens, rows)
            emitted += rule.verify(target_rows(proposal, target, emitted), proposal, branch, start).emitted
        return emitted[:length]

    return outcomes(run)


@pytest.mark.parametrize("name", ["leviathan", "block"])
def test_rounds_that_draft_a_position_again_do_not_reuse_its_noise(name):
    models = random_models(11, "dense", 2)
    law = rounds_law(create(name), models, 3, lambda start, j: (start, Purpose.DRAFT, j))
    assert total_variation(law, target_law(models[0], 3)) < 1e-12


def test_draft_noise_keyed_by_the_tokens_own_position_would_be_biased():
    models = random_models(11, "dense", 2)
    law = rounds_law(create("block"), models, 3, lambda start, j: (start + j, Purpose.DRAFT, 0))
    assert total_variation(law, target_law(models[0], 3)) > 1e-3


@pytest.mark.parametrize("name", ["greedy", "match", "leviathan", "block", "rrs", "traversal"])
def test_an_empty_draft_gives_one_token_of_the_target(name):
    target, draft_model = random_models(1, "dense", 3)
    empty = Draft((), draft_probs=draft_model(())[None][:0])
    rule = create(name)
    law = outcomes(lambda branch: rule.verify(target_rows(empty, target), empty, branch, 0).emitted)
    if name == "greedy":
        assert law == {(int(target(()).argmax()),): 1.0}
    else:
        assert total_variation(law, target_law(target, 1)) < 1e-12

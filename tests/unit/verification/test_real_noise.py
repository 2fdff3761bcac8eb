"""The real code with its real random numbers: chi-square against the target, repeatability, independence of drafts."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from paceline.config import SamplingParams
from paceline.records import Draft
from paceline.sampling import CounterRandom, Purpose, SampledRows, draw, to_probs
from paceline.verification.registry import choose_rule, create
from unit.verification.exact import KINDS, chain_draft, random_models, target_law, target_rows, tree_draft

SIZE = 1e-6
NUM_SAMPLES = 1000


def chi_square(counts, law):
    """p-value of Pearson's test; cells with fewer than five expected are pooled."""
    n = sum(counts.values())
    assert set(counts) <= {key for key, p in law.items() if p > 0}, "an impossible text"
    large = [key for key, p in law.items() if n * p >= 5]
    observed = [counts[key] for key in large]
    expected = [n * law[key] for key in large]
    if n - sum(expected) > 5:
        observed.append(n - sum(observed))
        expected.append(n - sum(expected))
    return stats.chisquare(observed, np.array(expected) * sum(observed) / sum(expected)).pvalue if len(observed) > 1 else 1.0


class RealNoise:
    """Lets `tree_draft` draw from CounterRandom."""

    def __init__(self, seed, start):
        self._random = CounterRandom(seed)
        self._start = start

    def uniform(self, position, purpose, index=0):
        return self._random.uniform(self._start, purpose, index)


@pytest.mark.parametrize(("name", "shape"), [("leviathan", 2), ("block", 2), ("match", 2), ("rrs", (2, 1)), ("traversal", (2, 1))])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_texts_of_several_rounds_follow_the_target(name, shape, kind, monkeypatch):
    """Three tokens, float32 rows; later rounds draft positions again that earlier ones had drafted and rejected."""
    monkeypatch.setattr("unit.verification.exact.branching_draw", draw)
    target, model = random_models(21, kind, 3)
    rule = create(name)
    counts = Counter()
    for seed in range(NUM_SAMPLES):
        text = ()
        while len(text) < 3:
            noise = RealNoise(seed, len(text))
            if isinstance(shape, int):
                tokens = []
                for j in range(shape):
                    tokens.append(draw(model((*text, *tokens)), noise.uniform(0, Purpose.DRAFT, j)))
                draft = chain_draft(tokens, [model((*text, *tokens[:j])).float() for j in range(shape)])
            else:
                draft = tree_draft(noise, lambda path, text=text: model((*text, *path)).float(), shape, True)
            rows = target_rows(draft, lambda path: target(path).float(), text)
            text += rule.verify(rows, draft, CounterRandom(seed), len(text)).emitted
        counts[text[:3]] += 1
    assert chi_square(counts, target_law(target, 3)) > SIZE


def test_the_chi_square_test_sees_a_bias_of_a_tenth():
    counts = Counter({(0,): 900, (1,): 600})
    assert chi_square(counts, {(0,): 0.5, (1,): 0.5}) < SIZE


@pytest.mark.parametrize("name", ["match", "leviathan", "block", "rrs", "traversal"])
def test_the_same_seed_and_draft_give_the_same_verdict(name):
    target, model = random_models(3, "dense", 4)
    draft = chain_draft((1, 2), [model(()), model((1,))])
    verdicts = [create(name).verify(target_rows(draft, target), draft, CounterRandom(9), 17) for _ in range(2)]
    assert verdicts[0] == verdicts[1]
    others = {create(name).verify(target_rows(draft, target), draft, CounterRandom(seed), 17).emitted for seed in range(40)}
    assert len(others) > 1


VOCAB = 6
PROMPT = [1, 4]


def logits_after(tokens):
    return torch.from_numpy(np.random.default_rng([7, *tokens[-2:]]).normal(0, 1.5, VOCAB)).float()


def plain_text(params, seed, length):
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + length:
        rows = SampledRows(logits_after(tokens)[None], params, tokens, len(PROMPT), Draft(()))
        tokens.append(draw(rows.probs(0), CounterRandom(seed).uniform(len(tokens), Purpose.TARGET)))
    return tokens


def speculative_text(params, seed, length, propose):
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + length:
        draft = propose(tokens)
        paths = [[]]
        for i, token in enumerate(draft.tokens):
            paths.append([*paths[(i - 1 if draft.parents is None else draft.parents[i]) + 1], token])
        logits = torch.stack([logits_after([*tokens, *path]) for path in paths])
        rows = SampledRows(logits, params, tokens, len(PROMPT), draft)
        rule = choose_rule("auto", params, draft, seeded=True)
        tokens += rule.verify(rows, draft, CounterRandom(seed), len(tokens)).emitted
    return tokens[: len(PROMPT) + length]


@st.composite
def drafts(draw_from):
    """A chain or tree of any tokens, with or without draft_probs."""
    size = draw_from(st.integers(0, 5))
    tokens = tuple(draw_from(st.integers(0, VOCAB - 1)) for _ in range(size))
    parents = draw_from(st.none() | st.tuples(*(st.integers(-1, i - 1) for i in range(size))))
    rows = draw_from(st.none() | st.just(torch.full((size, VOCAB), 1 / VOCAB)))
    return Draft(tokens, parents, rows)


@given(
    seed=st.integers(0, 2**63 - 1),
    proposals=st.lists(drafts(), min_size=4, max_size=4),
    options=st.sampled_from([{}, {"top_p": 0.8}, {"frequency_penalty": 1.0, "repetition_penalty": 1.2}]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_seeded_text_is_the_plain_one_whatever_is_drafted(seed, proposals, options):
    params = SamplingParams(temperature=0.9, **options)
    text = speculative_text(params, seed, 8, lambda tokens: proposals[len(tokens) % 4])
    assert text == plain_text(params, seed, 8)


@given(proposals=st.lists(drafts(), min_size=4, max_size=4), penalty=st.sampled_from([0.0, 1.0]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_greedy_text_is_the_plain_one_whatever_is_drafted(proposals, penalty):
    params = SamplingParams(presence_penalty=penalty)
    plain = list(PROMPT)
    while len(plain) < len(PROMPT) + 8:
        plain.append(SampledRows(logits_after(plain)[None], params, plain, len(PROMPT), Draft(())).argmax(0))
    assert speculative_text(params, 0, 8, lambda tokens: proposals[len(tokens) % 4]) == plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("name", ["match", "leviathan", "block", "rrs", "traversal"])
def test_extreme_random_numbers_never_emit_an_impossible_token(name, edge, kind):
    class Edge:
        def uniform(self, position, purpose, index=0):
            return edge

    target, model = random_models(13, kind, 4)
    for first in range(4):
        for second in range(4):
            draft = chain_draft((first, second), [model(()), model((first,))])
            emitted = create(name).verify(target_rows(draft, target), draft, Edge(), 0).emitted
            assert all(float(target(emitted[:j])[token]) > 0 for j, token in enumerate(emitted))


@pytest.mark.parametrize("name", ["leviathan", "block", "rrs", "traversal"])
@pytest.mark.parametrize("widths", [(3, 5), (5, 3)])
def test_models_of_different_padded_widths_are_verified_on_the_shared_part(name, widths):
    """Ids 3 and 4 are padding: impossible in the target, or unknown to the draft."""
    rows = []
    for width in widths:
        row = torch.zeros(width)
        row[:3] = to_probs(torch.tensor([0.3, 0.2, 0.1]), SamplingParams(temperature=1.0))
        rows.append(row)
    target, model = rows
    seen = set()
    for token in range(len(model)):
        draft = chain_draft((token,), [model])
        for seed in range(30):
            verdict = create(name).verify(target_rows(draft, lambda path: target), draft, CounterRandom(seed), 0)
            assert (verdict.num_accepted == 1) == (token < 3)
            seen |= set(verdict.emitted)
    assert seen == {0, 1, 2}

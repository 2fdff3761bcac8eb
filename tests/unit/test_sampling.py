"""Random numbers, logits processing, draws, and the rows of a verification pass."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from paceline import sampling
from paceline.config import SamplingParams
from paceline.errors import OptionError, PacelineError
from paceline.records import Draft
from paceline.sampling import (
    CounterRandom,
    Purpose,
    SampledRows,
    argmax_rows,
    check_token_ids,
    draw,
    process_logits,
    resolve_seed,
    to_probs,
)

NO_DRAFT = Draft(())
SAMPLED = SamplingParams(temperature=1.0)


def logits_of(*probs):
    return torch.tensor(probs, dtype=torch.float32).log()


def values(tensor):
    return pytest.approx(tensor.tolist(), abs=1e-6)


# ---------- random numbers ----------


def test_a_number_depends_on_its_key_alone():
    one, other = CounterRandom(7), CounterRandom(7)
    other.uniform(3, Purpose.DRAFT)
    assert one.uniform(5, Purpose.TARGET) == other.uniform(5, Purpose.TARGET)


def test_no_two_of_many_keys_share_a_number():
    keys = [(s, p, purpose, i) for s in (0, 1, 2**63 - 1) for p in range(40) for purpose in Purpose for i in range(16)]
    numbers = {CounterRandom(s).uniform(p, purpose, i) for s, p, purpose, i in keys}
    assert len(numbers) == len(keys)
    assert all(0.0 <= number < 1.0 for number in numbers)


@pytest.mark.parametrize("axis", ["seed", "position", "index"])
def test_numbers_along_each_axis_are_uniform_and_uncorrelated(axis):
    n = 4000
    if axis == "seed":
        numbers = np.array([CounterRandom(i).uniform(0, Purpose.TARGET) for i in range(n)])
    elif axis == "position":
        numbers = np.array([CounterRandom(0).uniform(i, Purpose.TARGET) for i in range(n)])
    else:
        numbers = np.array([CounterRandom(0).uniform(0, Purpose.ACCEPT, i) for i in range(n)])
    assert stats.kstest(numbers, "uniform").pvalue > 1e-6
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 5 / math.sqrt(n)


def test_a_seed_is_kept_and_none_draws_a_new_one():
    assert resolve_seed(0) == 0
    drawn = {resolve_seed(None) for _ in range(20)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**63 for seed in drawn)


# ---------- draws ----------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8).filter(any), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_draw_inverts_the_cumulative_law(weights, u):
    token = draw(torch.tensor(weights, dtype=torch.float32), u)
    below, total = sum(weights[:token]), sum(weights)
    assert weights[token] > 0
    assert below <= u * total + 1e-9
    assert u * total < below + weights[token] + 1e-9


@pytest.mark.parametrize("weights", [[0.0, 0.5, 0.5, 0.0], [0.0, 1e-30, 0.0], [0.0, 1.1, 0.3, 0.0, 0.0]])
def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token(weights):
    row = torch.tensor(weights)
    assert draw(row, 0.0) == 1
    assert draw(row, 1.0 - 2.0**-53) == int(row.nonzero()[-1])
    assert draw(row, 1.0) == int(row.nonzero()[-1])


@given(st.integers(0, 2**32), st.floats(0, 1, exclude_max=True), st.sampled_from([1.0, 0.1, 0.002]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_draw_from_a_whole_vocabulary_inverts_the_same_law(seed, u, share):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(3000, generator=generator) ** 8
    weights[torch.rand(3000, generator=generator) > share] = 0.0
    weights[1234] = 0.5
    token, ends = draw(weights, u), weights.double().cumsum(0) / weights.double().sum()
    assert weights[token] > 0
    assert float(ends[token]) - float(weights[token] / weights.sum()) - 1e-7 <= u <= float(ends[token]) + 1e-12
    assert weights[draw(weights, 0.0)] > 0
    last = draw(weights, 1.0 - 2.0**-53)
    assert weights[last] > 0
    assert float(ends[last]) >= 1.0 - 1e-12


# ---------- logits processing ----------


def test_nothing_is_copied_when_nothing_is_asked_for():
    logits = torch.tensor([1.0, 2.0])
    assert process_logits(logits, SamplingParams(), [0, 1], 1) is logits


def test_repetition_covers_prompt_and_output_and_the_others_only_output():
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0])
    history, num_prompt = [0, 1, 2, 2], 2
    repeated = process_logits(logits, SamplingParams(repetition_penalty=2.0), history, num_prompt)
    assert repeated.tolist() == [1.0, -4.0, 0.5, 1.0]
    frequent = process_logits(logits, SamplingParams(frequency_penalty=0.25), history, num_prompt)
    assert frequent.tolist() == [2.0, -2.0, 0.5, 1.0]
    present = process_logits(logits, SamplingParams(presence_penalty=0.25), history, num_prompt)
    assert present.tolist() == [2.0, -2.0, 0.75, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 1.0]


def test_bias_comes_before_the_repetition_penalty():
    params = SamplingParams(repetition_penalty=2.0, logit_bias={0: 3.0})
    assert process_logits(torch.tensor([1.0, 0.0]), params, [0], 1).tolist() == [2.0, 0.0]


def test_history_beyond_the_vocabulary_is_ignored():
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)
    assert process_logits(torch.tensor([1.0, 1.0]), params, [7, 9, 1], 1).tolist() == [1.0, -0.5]


def test_banned_tokens_are_impossible():
    assert process_logits(torch.tensor([1.0, 2.0]), SamplingParams(), [], 0, banned={1, 900}).tolist() == [1.0, -math.inf]
    assert process_logits(torch.tensor([1.0, 2.0]), SamplingParams(), [], 0, banned={900}).tolist() == [1.0, 2.0]


def test_a_bias_on_an_unknown_token_is_refused_by_name():
    with pytest.raises(OptionError, match=r"logit_bias: token id 9 .* 0 to 1"):
        process_logits(torch.zeros(2), SamplingParams(logit_bias={9: 1.0}), [], 0)
    with pytest.raises(OptionError, match="stop_token_ids: token id 2 "):
        check_token_ids(SamplingParams(stop_token_ids=(2,)), 2)


def test_nan_logits_count_as_impossible_and_a_row_without_any_token_is_an_error():
    row = torch.tensor([math.nan, 1.0, -math.inf])
    assert process_logits(row, SAMPLED, [], 0).tolist() == [-math.inf, 1.0, -math.inf]
    assert to_probs(process_logits(row, SAMPLED, [], 0), SAMPLED).tolist() == [0.0, 1.0, 0.0]
    assert to_probs(process_logits(torch.tensor([math.inf, 1.0]), SAMPLED, [], 0), SAMPLED).tolist() == [1.0, 0.0]
    with pytest.raises(PacelineError, match="no token can follow"):
        process_logits(torch.tensor([math.nan, -math.inf]), SAMPLED, [], 0)
    with pytest.raises(PacelineError, match="min_tokens"):
        process_logits(torch.tensor([1.0, 2.0]), SAMPLED, [], 0, banned={0, 1})


ROW = (0.4, 0.3, 0.2, 0.1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ROW),
        ({"temperature": 0.5}, (16 / 30, 9 / 30, 4 / 30, 1 / 30)),
        ({"top_k": 2}, (4 / 7, 3 / 7, 0, 0)),
        ({"top_k": 9}, ROW),
        ({"top_p": 0.69}, (4 / 7, 3 / 7, 0, 0)),
        ({"top_p": 0.71}, (4 / 9, 3 / 9, 2 / 9, 0)),
        ({"top_p": 1e-9}, (1, 0, 0, 0)),
        ({"min_p": 0.49}, (4 / 9, 3 / 9, 2 / 9, 0)),
        ({"top_k": 2, "top_p": 0.55}, (1, 0, 0, 0)),  # top-p sees the law after top-k: .571 is enough
        ({"temperature": 0.5, "top_p": 0.6}, (16 / 25, 9 / 25, 0, 0)),  # and after temperature
        ({"temperature": 1e-30}, (1, 0, 0, 0)),
        ({"temperature": 0.0}, (1, 0, 0, 0)),
    ],
)
def test_filters(options, expected):
    params = SamplingParams(**{"temperature": 1.0, **options})
    assert to_probs(logits_of(*ROW), params).tolist() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.6}])
def test_tokens_that_tie_with_the_last_kept_one_are_kept(options):
    probs = to_probs(logits_of(0.4, 0.2, 0.2, 0.2), SamplingParams(temperature=1.0, **options))
    assert probs.tolist() == values(torch.tensor([0.4, 0.2, 0.2, 0.2]))


@given(st.integers(0, 1000), st.floats(0.01, 0.999), st.floats(0.3, 3.0))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(seed, top_p, scale):
    """2000 tokens: the search starts with the 256 largest and widens."""
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, scale, 2000)).float()
    full = torch.softmax(logits.double(), dim=0).sort(descending=True)
    size = int((full.values.cumsum(0) < top_p).sum()) + 1
    kept = to_probs(logits, SamplingParams(temperature=1.0, top_p=top_p)).nonzero()[:, 0]
    assert len(kept) == size
    assert set(kept.tolist()) == set(full.indices[: len(kept)].tolist())


def test_filters_agree_with_transformers():
    logits_process = pytest.importorskip("transformers").generation.logits_process
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (1, 500))).float()
    history = torch.tensor([[3, 3, 77, 200]])
    ours = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    theirs = logits
    for step in (
        logits_process.RepetitionPenaltyLogitsProcessor(1.3),
        logits_process.TemperatureLogitsWarper(0.7),
        logits_process.TopKLogitsWarper(40),
        logits_process.TopPLogitsWarper(0.9),
        logits_process.MinPLogitsWarper(0.02),
    ):
        theirs = step(history, theirs)
    expected = torch.softmax(theirs[0], dim=-1)
    assert 2 < int((expected > 0).sum()) < 40
    assert to_probs(process_logits(logits[0], ours, history[0], 2), ours).tolist() == values(expected)


# ---------- argmax ----------


def test_the_lowest_of_equal_logits_wins_and_rows_without_a_finite_one_are_marked():
    rows = torch.tensor([[1.0, 3.0, 3.0], [math.nan, 1.0, 2.0], [-math.inf] * 3, [0.0, math.inf, 0.0]])
    assert argmax_rows(rows) == [1, -1, -1, -1]


# ---------- rows ----------


def test_greedy_rows_compute_one_argmax_and_nothing_else(monkeypatch):
    calls = []
    monkeypatch.setattr(sampling, "argmax_rows", lambda rows: calls.append(rows.shape) or argmax_rows(rows))
    monkeypatch.setattr(sampling, "process_logits", None)
    monkeypatch.setattr(sampling, "to_probs", None)
    rows = SampledRows(torch.eye(3), SamplingParams(), [5], 1, Draft((0, 1)))
    assert [rows.argmax(i) for i in (0, 1, 2)] == [0, 1, 2]
    assert calls == [(3, 3)]


def test_argmaxes_of_the_batch_can_be_handed_in():
    rows = SampledRows(torch.zeros(2, 3), SamplingParams(), [5], 1, Draft((0,)), argmaxes=[2, 1])
    assert [rows.argmax(0), rows.argmax(1)] == [2, 1]


def test_a_row_count_that_does_not_fit_the_draft_is_refused():
    with pytest.raises(ValueError, match="2 rows"):
        SampledRows(torch.zeros(2, 3), SAMPLED, [5], 1, Draft((0, 1)))


def test_penalties_of_a_row_see_its_own_path():
    """A tree: 1 and 2 below the pending token, 1 below 2. The same logits in every row."""
    draft = Draft((1, 2, 1), (-1, -1, 1))
    params = SamplingParams(temperature=1.0, frequency_penalty=1.0)
    rows = SampledRows(torch.zeros(4, 4), params, [0, 3], 1, draft)
    assert [rows.logits(i).tolist() for i in range(4)] == [[0, 0, 0, -1], [0, -1, 0, -1], [0, 0, -1, -1], [0, -1, -1, -1]]
    chain = SampledRows(torch.zeros(3, 4), params, [0, 3], 1, Draft((1, 1)))
    assert chain.logits(2).tolist() == [0, -2, 0, -1]


def test_penalised_greedy_rows_choose_after_the_penalty():
    logits = torch.tensor([[0.0, 1.0, 0.5]]).repeat(2, 1)
    rows = SampledRows(logits, SamplingParams(presence_penalty=0.8), [0], 1, Draft((1,)))
    assert [rows.argmax(0), rows.argmax(1)] == [1, 2]


@pytest.mark.parametrize("params", [SamplingParams(min_tokens=2), SamplingParams(min_tokens=2, temperature=1.0)])
def test_end_tokens_are_banned_until_enough_was_emitted_at_that_row(params):
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(3, 1)
    rows = SampledRows(logits, params, [0, 0], 1, Draft((0, 0)), end_ids={2})
    assert [float(rows.probs(i)[2]) > 0 for i in range(3)] == [False, True, True]
    assert [rows.argmax(i) for i in range(3)] == [1, 2, 2]


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED])
def test_padding_of_the_vocabulary_never_appears(params):
    logits = torch.tensor([[0.0, 1.0, 9.0, 9.0]])
    rows = SampledRows(logits, params, [0], 1, NO_DRAFT, vocab_size=2)
    assert rows.argmax(0) == 1
    assert rows.probs(0).shape == (2,)


def test_a_row_with_nan_still_has_an_argmax():
    rows = SampledRows(torch.tensor([[math.nan, 1.0, 2.0]]), SamplingParams(), [0], 1, NO_DRAFT)
    assert rows.argmax(0) == 2


def test_logprobs_are_those_of_the_processed_law():
    params = SamplingParams(temperature=1.0, top_k=2)
    rows = SampledRows(logits_of(*ROW)[None], params, [0], 1, NO_DRAFT)
    entry = rows.logprob(0, 1, top=3)
    assert (entry.token_id, entry.logprob) == (1, pytest.approx(math.log(3 / 7)))
    assert [token for token, _ in entry.top] == [0, 1]  # the third has probability 0
    assert entry.top[0][1] == pytest.approx(math.log(4 / 7))


def test_greedy_logprobs_are_those_of_temperature_one():
    rows = SampledRows(logits_of(*ROW)[None], SamplingParams(), [0], 1, NO_DRAFT)
    entry = rows.logprob(0, 0, top=2)
    assert entry.logprob == pytest.approx(math.log(0.4))
    assert entry.top == (pytest.approx((0, math.log(0.4))), pytest.approx((1, math.log(0.3))))
    assert rows.logprob(0, 3).top == ()


def test_the_probability_of_tokens_is_asked_of_the_runner_where_it_tells_it() -> None:
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.8)
    told = SampledRows(logits, params, [1], 1, Draft((3,)), mass=lambda row, tokens: 0.25 if row else None)
    computed = SampledRows(logits, params, [1], 1, Draft((3,)))
    assert told.mass(1, {2, 5}) == 0.25
    assert told.mass(0, {2, 5}) == computed.mass(0, {2, 5}) == pytest.approx(float(computed.probs(0)[[2, 5]].sum()))
    assert computed.mass(0, range(20)) == pytest.approx(1.0)

"""Draws by whole numbers: their law is that of sampling, and what kernels must equal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import SamplingParams
from paceline.execution.draws import NUMBER_BITS, UNIT, DrawLaw, Draws, draw_from, draw_rows, row_weights
from paceline.sampling import CounterRandom, Purpose, draw, to_probs

LAWS = [
    DrawLaw(1.0),
    DrawLaw(0.7, top_k=20),
    DrawLaw(1.3, top_p=0.8),
    DrawLaw(0.9, min_p=0.05),
    DrawLaw(1.1, top_k=50, top_p=0.9, min_p=0.01),
    DrawLaw(0.3, top_k=1),
]


def logits_of(seed: int, vocab: int = 300) -> torch.Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def params_of(law: DrawLaw) -> SamplingParams:
    return SamplingParams(temperature=law.temperature, top_k=law.top_k, top_p=law.top_p, min_p=law.min_p)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seed", range(4))
def test_the_law_is_that_of_sampling(law: DrawLaw, seed: int) -> None:
    logits = logits_of(seed)
    weights = row_weights(logits, law)
    probs = to_probs(logits, params_of(law))
    assert weights.max() == 1 << UNIT
    assert np.allclose(weights / weights.sum(), probs.numpy(), atol=1e-6)
    assert ((weights > 0) == (probs > 1e-12).numpy()).all()


@pytest.mark.parametrize("law", LAWS)
def test_tokens_are_those_that_sampling_draws_with_the_same_number(law: DrawLaw) -> None:
    random = CounterRandom(7)
    for position in range(200):
        logits = logits_of(position % 10)
        number = random.bits(position, Purpose.TARGET)
        assert draw_from(row_weights(logits, law), number) == draw(
            to_probs(logits, params_of(law)), random.uniform(position, Purpose.TARGET)
        )


@given(st.lists(st.integers(0, 1 << UNIT), min_size=1, max_size=30), st.integers(0, (1 << NUMBER_BITS) - 1))
@settings(max_examples=100, deadline=None)
def test_a_token_of_weight_zero_is_never_drawn(weights: list[int], number: int) -> None:
    table = np.array([*weights, 1 << UNIT], np.int64)
    for n in (0, number, (1 << NUMBER_BITS) - 1):
        assert table[draw_from(table, n)] > 0


def test_ties_with_the_last_token_that_a_filter_keeps_are_kept() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0])
    assert (row_weights(logits, DrawLaw(1.0, top_k=2)) > 0).tolist() == [True, True, True, False]
    assert (row_weights(logits, DrawLaw(1.0, top_p=0.6)) > 0).tolist() == [True, True, True, False]


def test_padding_of_a_head_is_cut_off() -> None:
    weights = row_weights(torch.tensor([0.0, 1.0, 9.0]), DrawLaw(1.0, vocab_size=2))
    assert len(weights) == 2
    assert weights.max() == weights[1]


def test_rows_are_drawn_with_their_own_numbers_and_rows_without_a_finite_peak_are_not() -> None:
    rows = torch.stack([logits_of(1), logits_of(2), torch.full((300,), math.nan), torch.full((300,), -math.inf)])
    numbers = [5 << 40, 7 << 49, 3, 3]
    want = [draw_from(row_weights(row, LAWS[0]), number) for row, number in zip(rows[:2], numbers[:2], strict=True)]
    assert draw_rows(rows, Draws(LAWS[0], numbers), 4) == [*want, -1, -1]
    assert draw_rows(rows[1:2], Draws(LAWS[0], numbers[:2]), 1) == want[1:]

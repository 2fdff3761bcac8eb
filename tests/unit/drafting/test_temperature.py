"""The draft's temperature: fixed, tuned, and lossless either way."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch

from paceline.config import SamplingParams
from paceline.drafting.model import ModelDrafter, ModelOptions
from paceline.drafting.temperature import DraftTemperature, TemperatureTuner
from paceline.errors import OptionError
from toys import Language, ToyRunner, make_view, random_language, speculate_toy

VOCAB = 12
SAMPLED = SamplingParams(temperature=1.0)


def sharper(language: Language, by: float) -> Language:
    """A draft that is too sure of itself: right temperature factor `by`."""
    return lambda tokens: by * language(tokens)


def exact_acceptance(sharpness: float, factor: float, rng: np.random.Generator) -> float:
    """sum min(p, q) at a random position, for a draft with `sharpness` times the target's logits."""
    logits = torch.from_numpy(2.0 * rng.standard_normal(VOCAB))
    target, draft = torch.softmax(logits, 0), torch.softmax(sharpness * logits / factor, 0)
    return float(torch.minimum(target, draft).sum())


def tune(tuner: TemperatureTuner, label: Callable[[float], float], rounds: int = 1500) -> float:
    """The mean factor over the last quarter of some rounds with 4 positions each."""
    late = []
    for i in range(rounds):
        trial = tuner.next()
        tuner.learn(trial, [label(trial.factor) for _ in range(4)])
        if i >= 3 * rounds // 4:
            late.append(math.log(tuner.factor))
    return math.exp(sum(late) / len(late))


@pytest.mark.parametrize("sharpness", [1.6, 1.0, 0.7])
def test_tuning_finds_the_factor_that_makes_the_draft_as_sharp_as_the_target(sharpness: float) -> None:
    rng = np.random.default_rng(0)
    found = tune(TemperatureTuner(), lambda factor: exact_acceptance(sharpness, factor, rng))
    assert found == pytest.approx(sharpness, rel=0.2)


def test_tuning_follows_outcomes_where_the_rule_gives_no_probabilities() -> None:
    rng = np.random.default_rng(1)
    found = tune(TemperatureTuner(), lambda factor: float(rng.random() < exact_acceptance(1.8, factor, rng)), rounds=4000)
    assert 1.4 < found < 2.3


def test_acceptance_that_does_not_depend_on_temperature_moves_it_little() -> None:
    rng = np.random.default_rng(2)
    assert 0.7 < tune(TemperatureTuner(), lambda _: rng.uniform(0.5, 1.0)) < 1.4


def test_looking_aside_costs_less_and_less() -> None:
    tuner = TemperatureTuner()
    distances = []
    for _ in range(3):
        trial = tuner.next()
        distances.append(abs(math.log(trial.factor / tuner.factor)))
        tuner.learn(trial, [0.5] * 100_000)
    assert distances[0] == pytest.approx(0.1)
    assert distances[1:] == pytest.approx([0.03, 0.03])


def test_factor_stays_within_reach_and_rounds_alternate_about_it() -> None:
    tuner = TemperatureTuner(width=0.1, rate=1.0, reach=2.0)
    first, second = tuner.next(), tuner.next()
    assert sorted([first.factor, second.factor]) == pytest.approx([math.exp(-0.1), math.exp(0.1)])
    for _ in range(20):
        trial = tuner.next()
        tuner.learn(trial, [1.0 if trial.side > 0 else 0.0])
    assert tuner.factor == pytest.approx(2.0)


def test_option_takes_nothing_a_number_or_auto() -> None:
    assert DraftTemperature(None).sampling_of(SAMPLED) is SAMPLED
    assert DraftTemperature(0.5).sampling_of(SAMPLED).temperature == 0.5
    assert DraftTemperature(0).sampling_of(SamplingParams(temperature=1.0, top_k=3)).greedy
    for wrong in ("warm", -1.0, True, float("nan")):
        with pytest.raises(OptionError, match="temperature = "):
            ModelOptions(temperature=wrong)


def test_tuning_is_off_for_greedy_requests_and_fixed_temperatures() -> None:
    assert DraftTemperature("auto").tuner(SamplingParams()) is None
    assert DraftTemperature(0.7).tuner(SAMPLED) is None
    assert DraftTemperature(None).tuner(SAMPLED) is None


def test_requests_of_one_temperature_share_a_tuner_and_the_store_is_bounded() -> None:
    temperature = DraftTemperature("auto")
    shared = temperature.tuner(SAMPLED)
    assert shared is not None
    assert temperature.tuner(SamplingParams(temperature=1.0, top_k=5)) is shared
    for i in range(200):
        assert temperature.tuner(SamplingParams(temperature=2.0 + i / 100)) is not None
    assert len(temperature._tuners) <= 64
    assert temperature.tuner(SamplingParams(temperature=1.0001)) is shared


def accepted_share(target: Language, draft: Language, option: float | str | None, tokens: int) -> float:
    """Emitted tokens a round over the last two thirds of a text."""
    drafter = ModelDrafter(ToyRunner(draft, VOCAB), options=ModelOptions(temperature=option))
    speculate_toy(ToyRunner(target, VOCAB), drafter, make_view([1, 2], sampling=SAMPLED, seed=1), tokens // 3, 4)
    counter = ToyRunner(target, VOCAB)
    speculate_toy(counter, drafter, make_view([1, 2], sampling=SAMPLED, seed=2), tokens, 4)
    return tokens / counter.forwards


def test_a_tuned_draft_is_accepted_more_often_than_one_at_the_targets_temperature() -> None:
    target = random_language(VOCAB, order=2, scale=1.5)
    draft = sharper(target, 2.2)
    tuned, same = accepted_share(target, draft, "auto", 900), accepted_share(target, draft, None, 900)
    assert tuned > 1.08 * same


def test_the_rows_of_a_round_have_the_temperature_that_was_settled_before_it() -> None:
    language = random_language(VOCAB, order=None)
    drafter = ModelDrafter(ToyRunner(language, VOCAB), options=ModelOptions(temperature="auto"))
    tuner = drafter.temperature.tuner(SAMPLED)
    assert tuner is not None
    session = drafter.open(make_view([1, 2, 3], sampling=SAMPLED))
    for side in (-1, 1):
        draft = session.propose(3, lambda _: True)
        assert draft.draft_probs is not None
        path = [1, 2, 3]
        for token, row in zip(draft.tokens, draft.draft_probs, strict=True):
            logits = torch.from_numpy(language(tuple(path))).float()
            assert torch.allclose(row, torch.softmax(logits / math.exp(0.1 * side), 0), atol=1e-6)
            path.append(token)


def test_marginals_stay_the_targets_while_the_temperature_is_tuned() -> None:
    """Two-token texts of one drafter whose factor moves all the time, against exact enumeration."""
    language = random_language(4, order=None, seed=3, scale=1.2)
    drafter = ModelDrafter(ToyRunner(sharper(language, 1.9), 4), options=ModelOptions(temperature="auto"))
    drafter.temperature._tuners[1.0] = tuner = TemperatureTuner(width=0.3, rate=0.02)
    counts = np.zeros((4, 4))
    for seed in range(2000):
        first, second, _ = speculate_toy(ToyRunner(language, 4), drafter, make_view([1, 2], sampling=SAMPLED, seed=seed), 3, 2)
        counts[first, second] += 1
    probs = {path: torch.softmax(torch.from_numpy(language(path)), 0).numpy() for path in [(1, 2), *((1, 2, a) for a in range(4))]}
    expected = np.array([probs[1, 2][a] * probs[1, 2, a][b] for a, b in product(range(4), repeat=2)])
    assert tuner.factor > 1.3
    assert scipy.stats.chisquare(counts.ravel(), 2000 * expected).pvalue > 1e-4

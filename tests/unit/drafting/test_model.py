from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
import torch

from paceline.config import SamplingParams
from paceline.drafting.base import DrafterContext, DraftSession, SequenceView
from paceline.drafting.model import ModelDrafter, ModelOptions, ModelSession
from paceline.drafting.registry import create
from paceline.errors import OptionError
from paceline.records import Draft, DraftFeatures
from paceline.sampling import CounterRandom, Purpose, draw, process_logits, to_probs
from toys import Language, ToyRunner, make_view, next_token_language, noisy_language, random_language
from unit.drafting.kit import always, greedy_text

VOCAB = 12


def open_session(language: Language, view: SequenceView, **settings: int) -> tuple[ToyRunner, ModelSession]:
    runner = ToyRunner(language, VOCAB, **settings)
    return runner, ModelDrafter(runner, "model:toy").open(view)


def test_cache_lengths_follow_the_worked_example() -> None:
    # drafting.md section 1: draft length 4, prompt of 5, accepted 2, 1, 4, 0
    language = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 1) % VOCAB)
    view = make_view([0, 1, 2, 3, 4])
    runner, session = open_session(language, view)
    session.propose(1, always)  # the prompt enters the draft's cache
    rows = []
    for accepted in (2, 1, 4, 0):
        length = len(view.tokens)
        runner.fed.clear()
        draft = session.propose(4, always)
        view.tokens += [*draft.tokens[:accepted], 7]
        session.observe(None, None)
        next_feed = session.outlook(4).catch_up + 1
        rows.append((length, len(runner.fed[0]), accepted, len(view.tokens), session.cached_tokens, next_feed))
    assert rows == [(5, 1, 2, 8, 7, 1), (8, 1, 1, 10, 9, 1), (10, 1, 4, 15, 13, 2), (15, 2, 0, 16, 15, 1)]


def test_drafts_equal_the_draft_models_own_greedy_text_after_any_acceptance() -> None:
    # A language of the whole prefix: any token that is missing from, or stale in, the cache changes the draft.
    language = random_language(VOCAB, order=None, seed=3)
    rng = np.random.default_rng(0)
    view = make_view([1, 2, 3])
    _, session = open_session(language, view)
    for _ in range(60):
        kind = rng.integers(4)
        if kind == 0:  # a round in which another drafter, or none, ran
            view.tokens += rng.integers(0, VOCAB, int(rng.integers(1, 6))).tolist()
            session.observe(None, None)
            continue
        num_tokens = int(rng.integers(1, 6))
        draft = session.propose(num_tokens, always)
        assert list(draft.tokens) == greedy_text(language, view.tokens, num_tokens)
        accepted = num_tokens if kind == 1 else int(rng.integers(0, num_tokens + 1))
        view.tokens += [*draft.tokens[:accepted], int(rng.integers(VOCAB))]


def test_rounds_of_others_are_caught_up_in_one_pass() -> None:
    language = random_language(VOCAB, order=None)
    view = make_view([1, 2, 3])
    runner, session = open_session(language, view)
    session.propose(2, always)
    view.tokens += [5, 6, 7, 8]
    forwards = runner.forwards
    outlook = session.outlook(3)
    # the prompt is known; 5..7 are missing besides the pending 8 (whether 5 was drafted decides on one of them)
    assert outlook.catch_up in (2, 3)
    session.propose(1, always)
    assert runner.forwards == forwards + 1
    assert len(runner.fed[-1]) == outlook.catch_up + 1


def test_a_long_catch_up_is_fed_in_chunks() -> None:
    language = random_language(VOCAB, order=None)
    view = make_view(np.random.default_rng(0).integers(0, VOCAB, 1200).tolist())
    runner, session = open_session(language, view)
    assert session.outlook(4).catch_up == 1199
    draft = session.propose(2, always)
    assert [len(fed) for fed in runner.fed] == [512, 512, 175, 1, 1]
    assert list(draft.tokens) == greedy_text(language, view.tokens, 2)


def test_a_draft_asked_for_twice_is_the_same() -> None:
    view = make_view([1, 2, 3])
    _, session = open_session(random_language(VOCAB, order=None), view)
    assert session.propose(4, always) == session.propose(4, always)


def test_features_describe_the_kept_token_and_stop_the_draft() -> None:
    language = random_language(VOCAB, seed=5)
    view = make_view([1, 2, 3])
    _, session = open_session(language, view)
    seen: list[DraftFeatures] = []

    def keep(features: DraftFeatures) -> bool:
        seen.append(features)
        return len(seen) < 3

    draft = session.propose(8, keep)
    assert len(draft) == 3
    text = list(view.tokens)
    for position, (token, features) in enumerate(zip(draft.tokens, seen, strict=True), start=1):
        logits = language(tuple(text))
        probs = np.exp(logits) / np.exp(logits).sum()
        ordered = np.sort(probs)
        assert features.position == position
        assert features.token_prob == features.max_prob == pytest.approx(ordered[-1], abs=1e-6)
        assert features.margin == pytest.approx(ordered[-1] - ordered[-2], abs=1e-6)
        assert features.entropy == pytest.approx(-(probs * np.log(probs)).sum(), abs=1e-5)
        text.append(token)
    assert draft.confidences == tuple(f.max_prob for f in seen)


def test_nothing_follows_an_end_token() -> None:
    language = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 1) % VOCAB)
    _, session = open_session(language, make_view([1, 2, 3], end_ids=[6]))
    assert session.propose(8, always).tokens == (4, 5, 6)


def test_drafting_ends_with_the_drafts_own_context() -> None:
    language = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 1) % VOCAB)
    view = make_view(list(range(6)))
    _, session = open_session(language, view, max_context=8)
    assert session.outlook(8).available == 3
    assert len(session.propose(8, always)) == 3
    view.tokens += [1, 1, 1]
    assert session.outlook(8).available == 0
    assert session.outlook(8).catch_up == 0
    assert session.propose(8, always) == Draft((), drafter="model:toy")


def test_padding_of_the_drafts_vocabulary_is_never_drafted() -> None:
    language = next_token_language(VOCAB, lambda tokens: VOCAB - 1)
    drafter = ModelDrafter(ToyRunner(language, VOCAB), vocab_size=VOCAB - 2)
    draft = drafter.open(make_view([1, 2])).propose(3, always)
    assert all(token < VOCAB - 2 for token in draft.tokens)


def test_closing_gives_the_cache_back() -> None:
    runner, session = open_session(random_language(VOCAB), make_view([1, 2]))
    assert runner.open_sequences == 1
    session.close()
    assert runner.open_sequences == 0


def test_a_near_draft_agrees_more_often_than_a_far_one() -> None:
    target = random_language(VOCAB, seed=0)

    def agreement(noise: float) -> int:
        view = make_view([1, 2, 3])
        _, session = open_session(noisy_language(target, noise), view)
        hits = 0
        for _ in range(50):
            (token,) = session.propose(1, always).tokens
            wanted = int(np.argmax(target(tuple(view.tokens))))
            hits += token == wanted
            view.tokens.append(wanted)
        return hits

    assert agreement(0.0) == 50
    assert 50 > agreement(1.0) > agreement(20.0)


def test_the_registry_loads_the_model_that_is_named() -> None:
    asked: list[str] = []

    def open_model(path: str) -> ToyRunner:
        asked.append(path)
        return ToyRunner(random_language(VOCAB), VOCAB)

    context = DrafterContext(vocab_size=VOCAB, max_context=64, open_model=open_model)
    drafter = create("model:some/folder", {"temperature": 0.5}, context)
    assert asked == ["some/folder"]
    assert drafter.name == "model:some/folder"
    with pytest.raises(OptionError, match="cannot be loaded here"):
        create("model:x", {}, DrafterContext(vocab_size=VOCAB, max_context=64))


def test_draft_temperature_zero_is_greedy_for_any_sampling() -> None:
    drafter = ModelDrafter(ToyRunner(random_language(VOCAB), VOCAB), options=ModelOptions(temperature=0.0))
    assert drafter.sampling_of(SamplingParams(temperature=1.0, top_k=5, top_p=0.9, n=2)).greedy
    assert drafter.sampling_of(SamplingParams(temperature=0.0)).greedy


def processed_row(language: Language, tokens: Sequence[int], sampling: SamplingParams, num_prompt: int) -> torch.Tensor:
    logits = torch.from_numpy(language(tuple(tokens))).float()
    return to_probs(process_logits(logits, sampling, tokens, num_prompt), sampling)


def test_sampled_drafts_carry_the_rows_that_they_were_drawn_from() -> None:
    language = random_language(VOCAB, order=None, seed=2)
    sampling = SamplingParams(temperature=0.8, top_k=4, repetition_penalty=1.3, presence_penalty=0.5)
    view = make_view([1, 2, 3], sampling=sampling, seed=5)
    _, session = open_session(language, view)
    seen: list[DraftFeatures] = []
    draft = session.propose(6, lambda features: seen.append(features) is None)
    assert draft.draft_probs is not None
    assert draft.draft_probs.shape == (6, VOCAB)
    text = list(view.tokens)
    assert len(seen) == 5  # nobody is asked after the last token
    for token, row, features in zip(draft.tokens, draft.draft_probs, seen, strict=False):
        assert torch.equal(row, processed_row(language, text, sampling, 3))
        assert features.token_prob == pytest.approx(float(row[token]))
        assert row[token] > 0
        text.append(token)


def test_drawn_tokens_follow_the_draft_distribution() -> None:
    language = random_language(4, seed=1, scale=1.0)
    sampling = SamplingParams(temperature=1.0)
    drafter = ModelDrafter(ToyRunner(language, 4))
    counts = np.zeros((4, 4))
    for seed in range(4000):
        first, second = drafter.open(make_view([1, 2], sampling=sampling, seed=seed)).propose(2, always).tokens
        counts[first, second] += 1
    expected = np.array(
        [
            [
                float(processed_row(language, [1, 2], sampling, 2)[a] * processed_row(language, [1, 2, a], sampling, 2)[b])
                for b in range(4)
            ]
            for a in range(4)
        ]
    )
    assert scipy.stats.chisquare(counts.ravel(), 4000 * expected.ravel() / expected.sum()).pvalue > 1e-6


def test_a_rejected_draw_is_not_repeated_in_the_next_round() -> None:
    language = random_language(64, order=1, scale=0.0)
    view = make_view([1, 2], sampling=SamplingParams(temperature=1.0), seed=3)
    session = ModelDrafter(ToyRunner(language, 64)).open(view)
    old = session.propose(6, always).tokens
    view.tokens.append(9)
    assert old[1:] != session.propose(5, always).tokens


def test_coupled_drafts_of_the_target_itself_equal_its_seeded_text() -> None:
    language = random_language(VOCAB, order=None, seed=4)
    sampling = SamplingParams(temperature=1.0, seed=11)
    view = make_view([1, 2, 3], sampling=sampling, seed=11, coupled=True)
    _, session = open_session(language, view)
    text = list(view.tokens)
    random = CounterRandom(11)
    for _ in range(8):
        row = processed_row(language, text, sampling, 3)
        text.append(draw(row, random.uniform(len(text), Purpose.TARGET)))
    draft = session.propose(8, always)
    assert list(draft.tokens) == text[3:]
    assert draft.draft_probs is not None


def test_a_narrower_draft_vocabulary_is_padded_with_impossible_tokens() -> None:
    drafter = ModelDrafter(ToyRunner(random_language(8), 8), vocab_size=VOCAB)
    sampling = SamplingParams(temperature=1.0, logit_bias={10: 100.0})
    draft = drafter.open(make_view([1, 2], sampling=sampling)).propose(3, always)
    assert draft.draft_probs is not None
    assert draft.draft_probs.shape == (3, VOCAB)
    assert float(draft.draft_probs[:, 8:].sum()) == 0.0


def test_end_tokens_are_not_drafted_before_min_tokens() -> None:
    language = next_token_language(VOCAB, lambda tokens: 6)
    view = make_view([1, 2], end_ids=[6], sampling=SamplingParams(min_tokens=3))
    _, session = open_session(language, view)
    draft = session.propose(8, always)
    assert len(draft) == 4
    assert 6 not in draft.tokens[:3]
    assert draft.tokens[3] == 6


def test_draft_temperature_changes_the_row_and_zero_removes_it() -> None:
    language = random_language(VOCAB, order=None)
    view = make_view([1, 2, 3], sampling=SamplingParams(temperature=1.0))
    sharp = ModelDrafter(ToyRunner(language, VOCAB), options=ModelOptions(temperature=0.5)).open(view).propose(1, always)
    assert sharp.draft_probs is not None
    assert torch.allclose(sharp.draft_probs[0], processed_row(language, [1, 2, 3], SamplingParams(temperature=0.5), 3))
    greedy = ModelDrafter(ToyRunner(language, VOCAB), options=ModelOptions(temperature=0.0)).open(view).propose(4, always)
    assert greedy.draft_probs is None
    assert list(greedy.tokens) == greedy_text(language, view.tokens, 4)


def tree_session(language: Language, view: SequenceView, **options: float) -> tuple[ToyRunner, DraftSession]:
    runner = ToyRunner(language, VOCAB)
    drafter = ModelDrafter(runner, options=ModelOptions(**options), tree=True)  # type: ignore[arg-type]
    return runner, drafter.open(view)


def test_trees_hold_the_most_probable_paths_of_the_model() -> None:
    language = random_language(VOCAB, order=None, seed=8)
    view = make_view([1, 2, 3])
    runner, session = tree_session(language, view, tree_width=3, tree_levels=3)
    draft = session.propose(8, always)
    assert draft.parents is not None
    assert len(draft) == 8
    assert draft.draft_probs is None
    assert runner.forwards <= 3
    paths: list[tuple[int, ...]] = []
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        before = paths[parent] if parent >= 0 else ()
        logits = language((1, 2, 3, *before))
        assert draft.confidences[i] == pytest.approx(np.exp(logits[token]) / np.exp(logits).sum(), rel=1e-4)
        paths.append((*before, token))
    greedy = greedy_text(language, view.tokens, 1)
    assert (greedy[0],) in paths


def test_tree_rounds_are_caught_up_like_others() -> None:
    language = random_language(VOCAB, order=None, seed=8)
    view = make_view([1, 2, 3])
    _, session = tree_session(language, view)
    for accepted in (0, 1, 3, 2):
        fresh = tree_session(language, make_view(view.tokens))[1]
        assert session.propose(6, always) == fresh.propose(6, always)
        view.tokens += list(range(accepted + 1))
        session.observe(None, None)


def test_a_level_must_pay_under_opt_tree_growth() -> None:
    language = random_language(VOCAB, order=1, scale=0.0)  # nothing is likely
    runner, session = tree_session(language, make_view([1, 2]), tree_gain=0.5, tree_levels=5)
    session.propose(8, always)
    assert runner.forwards <= 2

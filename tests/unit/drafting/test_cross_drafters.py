"""Drafts of models with another tokenizer: exact, whatever the two vocabularies, with caches that follow the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable, DraftCost
from paceline.drafting.base import DrafterContext, SequenceView
from paceline.drafting.cross_vocab import base
from paceline.drafting.cross_vocab.base import TranslatedDrafter
from paceline.drafting.cross_vocab.strings import spread
from paceline.drafting.registry import create
from paceline.engine import Engine
from paceline.errors import OptionError
from paceline.models.tokenizer import FastTokenizer
from paceline.records import Draft, DraftFeatures
from paceline.sampling import Purpose
from tiny_models import byte_level_tokenizer
from toys import Language, ToyRunner, make_view, random_language, speculate_toy, table_language
from unit.drafting.cross_toys import draft_letters, merging, target_letters
from unit.drafting.enumeration_kit import CountedSeeds, law_of_text, rows_of
from unit.drafting.kit import always, greedy_text
from unit.verification.exact import target_law, total_variation

KINDS = ("uag", "slem", "tli")


def make(
    kind: str,
    language: Language,
    draft: FastTokenizer | None = None,
    target: FastTokenizer | None = None,
    *,
    max_context: int = 512,
    **options: object,
) -> TranslatedDrafter:
    """A drafter over a toy model of the draft's letters, made as the engine makes it."""
    target, draft = target or target_letters(), draft or draft_letters()
    runner = ToyRunner(language, draft.vocab_size, max_context=max_context)
    context = DrafterContext(
        vocab_size=target.vocab_size, max_context=512, open_foreign=lambda _: (runner, draft), tokenizer=target
    )
    made = create(f"{kind}:other", options, context)
    assert isinstance(made, TranslatedDrafter)
    return made


def toy_runner(drafter: TranslatedDrafter) -> ToyRunner:
    assert isinstance(drafter.runner, ToyRunner)
    return drafter.runner


def spelling(tokenizer: FastTokenizer, text: str) -> Language:
    """A model that repeats a text for ever in its own tokens, as the text so far asks for them."""
    ids = [
        tokenizer.backend.token_to_id(entry)
        for entry in ("abc", "ab", "bc", "a", "b", "c")
        if entry in tokenizer.backend.get_vocab()
    ]

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        said = len(tokenizer.decode(tokens).replace(" ", ""))
        coming = (text * 3)[said % len(text) :]
        values = np.zeros(tokenizer.vocab_size)
        values[next(i for i in ids if coming.startswith(tokenizer.backend.id_to_token(i)))] = 30.0
        return values

    return logits


def always_the_same(row: Sequence[float]) -> Language:
    return table_language(dict.fromkeys(range(len(row)), row))


# ---------- exactness ----------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), num_draft=st.integers(1, 9))
def test_greedy_text_equals_plain_decoding(seed: int, kind: str, num_draft: int) -> None:
    target = random_language(4, order=3, seed=seed)
    drafter = make(kind, random_language(6, order=2, seed=seed + 1))
    prompt = np.random.default_rng(seed).integers(0, 4, 8).tolist()
    assert speculate_toy(ToyRunner(target, 4), drafter, make_view(prompt), 30, num_draft) == greedy_text(target, prompt, 30)
    assert toy_runner(drafter).open_sequences == 0


@pytest.mark.parametrize("kind", KINDS)
def test_seeded_text_does_not_depend_on_the_draft(kind: str) -> None:
    target = random_language(4, order=2, seed=3, scale=1.5)
    sampling = SamplingParams(temperature=1.0, seed=5)
    texts = set()
    for num_draft in (0, 1, 4, 9):
        view = make_view([0, 1, 2, 3], sampling=sampling, seed=5, coupled=True)
        drafter = make(kind, random_language(6, order=2, seed=4))
        texts.add(tuple(speculate_toy(ToyRunner(target, 4), drafter, view, 40, num_draft)))
    assert len(texts) == 1


@pytest.mark.usefixtures("enumerated")
@pytest.mark.parametrize(("kind", "num_draft", "length"), [("tli", 2, 2), ("tli", 1, 3), ("slem", 2, 2), ("uag", 3, 3)])
def test_the_law_of_the_text_is_the_targets_by_enumeration(kind: str, num_draft: int, length: int) -> None:
    own, other = merging(("a", "b", "ab"), ("a", "b")), merging(("b", "ba", "a"), ("b", "a"))
    target = random_language(3, order=None, seed=num_draft, scale=1.0)
    drafter = make(kind, random_language(3, order=None, seed=9, scale=1.0), other, own)
    law = law_of_text(drafter, target, length, num_draft)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-5)
    assert total_variation(law, target_law(rows_of(target), length)) < 1e-5


@pytest.mark.usefixtures("enumerated")
def test_numbers_that_return_after_a_rejection_would_bias_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    # b and ba are one id each: keyed by the length of the transcript, a second round would draw with the number of the first.
    class OneSeed(CountedSeeds):
        def uniform(self, position: int, purpose: Purpose) -> float:
            return 0.5

    own, other = merging(("a", "b", "ab"), ("a", "b")), merging(("b", "ba", "a"), ("b", "a"))
    target = random_language(3, order=None, seed=1, scale=1.0)
    drafter = make("tli", random_language(3, order=None, seed=9, scale=1.0), other, own)
    monkeypatch.setattr(base, "CounterRandom", OneSeed)
    assert total_variation(law_of_text(drafter, target, 3, 1), target_law(rows_of(target), 3)) > 1e-4


def test_the_shared_part_of_the_drafts_distribution_is_the_worked_example() -> None:
    # drafting.md section 7
    drafter = make("tli", always_the_same([0.1, 0.2, 0.1, 0.1, 0.2, 0.3]))
    view = make_view([0], sampling=SamplingParams(temperature=1.0))
    draft = drafter.open(view).propose(1, always)
    assert draft.draft_probs is not None
    assert draft.draft_probs[0].tolist() == pytest.approx([0.6, 0.2, 0.0, 0.2])
    target = torch.tensor([0.4, 0.2, 0.3, 0.1])
    assert float(torch.minimum(target, draft.draft_probs[0]).sum()) == pytest.approx(0.7)
    residual = (target - draft.draft_probs[0]).clamp_min(0)
    assert (residual / residual.sum()).tolist() == pytest.approx([0, 0, 1, 0], abs=1e-6)


@pytest.mark.parametrize("controller", ["pacer", "fixed"])
def test_a_batch_in_the_engine_keeps_the_targets_text_with_all_three_to_choose_from(controller: str) -> None:
    language = random_language(4, order=2, seed=6)
    drafters = [make(kind, random_language(6, order=2, seed=i)) for i, kind in enumerate(KINDS)]
    for drafter, kind in zip(drafters, KINDS, strict=True):
        drafter.name = kind
    costs = CostTable([1, 2, 17], [1], [[1e-3, 1.05e-3, 1.5e-3]], drafters={kind: DraftCost(per_token=1e-6) for kind in KINDS})
    engine = Engine(ToyRunner(language, 4), costs=costs, controller=controllers.create(controller, costs, {}), drafters=drafters)
    prompts = [[0, 1, 2], [3, 3], [2, 0, 1, 1]]
    results = engine.generate(prompts, SamplingParams(max_tokens=25))
    assert [list(result.token_ids) for result in results] == [greedy_text(language, prompt, 25) for prompt in prompts]
    assert sum(result.num_drafted for result in results) > 0
    assert [toy_runner(drafter).open_sequences for drafter in drafters] == [0, 0, 0]


# ---------- what is drafted ----------


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_that_knows_the_text_is_accepted(kind: str) -> None:
    text = "abc" if kind != "tli" else "ccab"  # of abc the target says "ab", which the draft has not
    drafter = make(kind, spelling(draft_letters(), text))
    target = ToyRunner(spelling(target_letters(), text), 4)
    prompt = target_letters().encode(text * 2)
    emitted = speculate_toy(target, drafter, make_view(prompt), 40, 6)
    assert target_letters().decode(emitted).replace(" ", "").startswith(text * 8)
    assert target.forwards < (20 if kind != "tli" else 36)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_equal_those_of_a_fresh_session_after_any_acceptance(kind: str) -> None:
    # A language of the whole prefix: an id that is missing from, or stale in, the cache changes the draft.
    drafter = make(kind, random_language(6, order=None, seed=2))
    rng = np.random.default_rng(0)
    view = make_view([3, 0])
    session = drafter.open(view)
    for _ in range(50):
        if rng.integers(4) == 0:  # a round in which another drafter, or none, ran
            view.tokens += rng.integers(0, 4, int(rng.integers(1, 6))).tolist()
            session.observe(None, None)
            continue
        num_tokens = int(rng.integers(1, 6))
        draft = session.propose(num_tokens, always)
        fresh = drafter.open(view)
        fresh.outlook(4)
        again = fresh.propose(num_tokens, always)
        if kind == "tli":  # strings are as long as the text so far makes tokens, which is learnt from one round to the next
            assert draft.tokens == again.tokens
        shorter = min(len(draft), len(again)) - 1
        assert draft.tokens[:shorter] == again.tokens[:shorter]
        fresh.close()
        accepted = int(rng.integers(0, len(draft) + 1))
        view.tokens += [*draft.tokens[:accepted], int(rng.integers(4))]
        session.observe(None, None)
    session.close()
    assert toy_runner(drafter).open_sequences == 0


def test_accepted_drafts_are_not_fed_again() -> None:
    drafter = make("slem", spelling(draft_letters(), "cca"))
    view = make_view(target_letters().encode("ccaccacca"))
    session = drafter.open(view)
    draft = session.propose(3, always)
    assert target_letters().decode(draft.tokens).replace(" ", "") == "cca"
    runner = toy_runner(drafter)
    runner.fed.clear()
    view.tokens += [*draft.tokens, 3]
    assert session.outlook(2).catch_up == 1
    session.propose(2, always)
    assert runner.fed[0] == draft_letters().encode("a")[-1:] + draft_letters().encode("c")  # the last drafted token and the bonus


def test_sessions_do_not_disturb_each_other() -> None:
    target = random_language(4, order=3, seed=8)
    drafter = make("tli", random_language(6, order=None, seed=1))
    views = [make_view([0, 1]), make_view([3, 3, 2])]
    sessions = [drafter.open(view) for view in views]
    for _ in range(10):
        drafts = [session.propose(3, always) for session in sessions]
        for view, session, draft in zip(views, sessions, drafts, strict=True):
            alone = drafter.open(view)
            assert alone.propose(3, always).tokens == draft.tokens
            view.tokens += greedy_text(target, view.tokens, 2)
            session.observe(None, None)


def test_the_controller_is_asked_about_tokens_of_the_target_and_can_stop() -> None:
    drafter = make("uag", spelling(draft_letters(), "abc"))
    view = make_view(target_letters().encode("abcabcabc"))
    session = drafter.open(view)
    session.propose(1, always)
    seen: list[int] = []

    def keep(features: DraftFeatures) -> bool:
        seen.append(features.position)
        return len(seen) < 2

    draft = session.propose(8, keep)
    assert seen == [2, 4]  # half as many ids as tokens
    assert target_letters().decode(draft.tokens).replace(" ", "") == "abcabc"
    assert len(draft.confidences) == len(draft) == 4


def test_confidence_goes_to_the_token_in_which_it_begins() -> None:
    assert spread([0.5, 0.8, 0.9], [3, 1, 1], [1, 2, 2]) == (0.5, 1.0, pytest.approx(0.72))
    assert spread([0.5], [2], [1, 1]) == (0.5, 1.0)
    assert spread([], [], []) == ()


def test_the_drafts_end_becomes_the_targets() -> None:
    for kind in KINDS:
        drafter = make(kind, always_the_same([0, 0, 0, 0, 0, 0, 1]), draft_letters("<stop>"), target_letters("<end>"))
        assert drafter.open(make_view([0, 1], end_ids=[4])).propose(5, always).tokens == (4,)


def test_a_special_token_that_the_target_lacks_ends_the_draft() -> None:
    drafter = make("uag", always_the_same([0, 0, 0, 0, 0, 0, 1]), draft_letters("<stop>"))
    assert drafter.open(make_view([0, 1])).propose(5, always) == Draft((), drafter="uag:other")


def test_nothing_is_drafted_within_a_character() -> None:
    target = byte_level_tokenizer()
    drafter = make("slem", random_language(6), target=target)
    ids = target.encode("aé")
    view = make_view(ids[:2])
    session = drafter.open(view)
    assert session.outlook(4).available == 0
    assert session.propose(4, always).tokens == ()
    view.tokens += ids[2:]
    assert session.outlook(4).available == 4


def test_drafting_ends_with_the_drafts_own_context() -> None:
    drafter = make("tli", random_language(6, seed=1), max_context=8)
    view = make_view([3] * 6)
    session = drafter.open(view)
    session.propose(1, always)
    assert session.outlook(8).available == 3
    assert len(session.propose(8, always)) == 3
    view.tokens += [3] * 4
    assert session.outlook(8).available == 0
    assert session.propose(8, always).tokens == ()


def test_rows_and_ids_beyond_the_targets_are_never_drafted() -> None:
    drafter = make("uag", spelling(draft_letters(), "abc"))
    drafter.vocab_size = 3  # the target's model has no row for c
    tokens = drafter.open(make_view([2, 3])).propose(6, always).tokens
    assert tokens == (2,)


# ---------- making ----------


def test_vocabularies_that_share_nothing_are_refused_with_a_remedy() -> None:
    with pytest.raises(OptionError, match="draft = 'tli:other': the two vocabularies share no token; use uag or slem"):
        make("tli", random_language(2), merging(("x", "y")))


@pytest.mark.parametrize("kind", KINDS)
def test_without_second_models_they_are_refused(kind: str) -> None:
    with pytest.raises(OptionError, match=f"draft = '{kind}:other': a second model cannot be loaded here"):
        create(f"{kind}:other", {}, DrafterContext(vocab_size=4, max_context=64))


def test_the_temperature_of_the_draft_can_be_set_where_it_draws() -> None:
    view = make_view([0], sampling=SamplingParams(temperature=1.0))
    drawn = make("tli", random_language(6), temperature=0.5).open(view).propose(2, always)
    assert drawn.draft_probs is not None
    assert make("tli", random_language(6), temperature=0).open(view).propose(2, always).draft_probs is None
    with pytest.raises(OptionError, match="temperature = -1"):
        make("slem", random_language(6), temperature=-1)
    with pytest.raises(OptionError, match="unknown option 'temperature'"):
        make("uag", random_language(6), temperature=1.0)


def test_seeded_requests_get_the_most_probable_shared_tokens() -> None:
    view: SequenceView = make_view([0], sampling=SamplingParams(temperature=1.0, seed=1), coupled=True)
    assert make("tli", random_language(6)).open(view).propose(2, always).draft_probs is None

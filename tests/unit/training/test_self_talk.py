"""A model's conversations with itself, over toy languages."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from paceline.errors import OptionError
from paceline.training.answers import CONTEXT
from paceline.training.self_talk import ANSWER_TOKENS, OPENINGS, TURN_TOKENS, TalkOptions, converse
from tiny_models import END
from toys import next_token_language
from unit.training.talkers import LETTERS, VOCABULARY, Listening, chatty_language, likeliest_after, make_talker

BEFORE = "<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"


def talk(engine: Listening, conversations: int = 30, seed: int = 0) -> list[tuple[object, ...]]:
    return [astuple(answer) for answer in converse(engine, TalkOptions(conversations=conversations, seed=seed))]


def test_users_turns_begin_with_the_template_and_nine_times_in_ten_with_an_opening() -> None:
    engine = make_talker()
    talk(engine)
    (opened, params), (bare, _) = engine.asked[:2]
    assert bare == [BEFORE]
    assert all(prompt.startswith(BEFORE) for prompt in opened)
    beginnings = {prompt.removeprefix(BEFORE) for prompt in opened}
    assert len(beginnings) == 9
    assert beginnings <= set(OPENINGS)
    for _, asked in engine.asked[:2]:
        assert (asked.n, asked.max_tokens, asked.top_k, asked.logprobs) == (3, TURN_TOKENS, 200, None)
        assert asked.temperature == params.temperature


def test_texts_that_could_become_the_same_do_not_share_a_seed() -> None:
    engine = make_talker()
    talk(engine, 90)
    users = [asked for asked in engine.asked if asked[1].n > 1]
    assert len({params.seed for _, params in users}) == len(users) == 6
    for prompts, _ in users:
        assert not any(a.startswith(b) for a in prompts for b in prompts if a != b)


def test_answers_follow_the_turns_greedily_or_at_their_temperature() -> None:
    engine = make_talker()
    talk(engine)
    (_, said), _, (greedy, plain), (sampled, warm) = engine.asked
    assert len(greedy) + len(sampled) == 30
    assert len(greedy) > len(sampled) > 0
    assert plain.greedy
    assert plain.max_tokens == warm.max_tokens == ANSWER_TOKENS
    assert warm.temperature == said.temperature
    assert warm.seed != said.seed
    for prompt in greedy + sampled:
        assert prompt.startswith(BEFORE)
        assert prompt.endswith(AFTER)
        assert prompt.count(AFTER) == 1


def test_temperatures_differ_from_batch_to_batch_within_their_range() -> None:
    engine = make_talker()
    talk(engine, 90)
    warmth = [params.temperature for _, params in engine.asked if params.n > 1]
    assert len(set(warmth)) == 3
    assert all(0.7 <= temperature <= 1.05 for temperature in warmth)


@pytest.mark.parametrize("conversations", [1, 4, 10, 13, 25, 41])
def test_as_many_answers_as_conversations_were_asked_for(conversations: int) -> None:
    assert len(talk(make_talker(), conversations)) == conversations


def test_an_answer_is_the_end_of_its_prompt_and_what_was_written_up_to_the_end_token() -> None:
    engine = make_talker()
    before = engine.tokenizer.encode(AFTER, add_special=False)[-CONTEXT:]
    for answer in converse(engine, TalkOptions(conversations=30)):
        written = answer.tokens[answer.first :]
        assert list(answer.tokens[: answer.first]) == before
        assert written[-1] == END or len(written) == ANSWER_TOKENS
        assert END not in written[:-1]


def test_sampled_answers_carry_the_most_probable_tokens_and_greedy_ones_are_made_of_them() -> None:
    language = chatty_language()
    sampled = 0
    for answer in converse(make_talker(language), TalkOptions(conversations=30)):
        best = [likeliest_after(language, answer.tokens[:at]) for at in range(answer.first, len(answer.tokens))]
        assert list(answer.tokens[answer.first :] if answer.likeliest is None else answer.likeliest) == best
        sampled += answer.likeliest is not None and list(answer.tokens[answer.first :]) != best
    assert sampled


def test_a_seed_makes_conversations_repeat_with_and_without_drafts() -> None:
    first = talk(make_talker(), seed=3)
    assert talk(make_talker(), seed=3) == first
    assert talk(make_talker(draft="suffix+tree"), seed=3) == first
    assert talk(make_talker(), seed=4) != first


def test_an_empty_turn_is_not_answered() -> None:
    engine = make_talker(next_token_language(len(VOCABULARY), lambda _: END))
    assert len(talk(engine, 10)) == 9
    assert all(prompt.removeprefix(BEFORE).removesuffix(AFTER) in OPENINGS for prompts, _ in engine.asked[2:] for prompt in prompts)


def test_turns_that_leave_no_room_for_an_answer_are_left_out() -> None:
    def endless(tokens: tuple[int, ...]) -> np.ndarray:
        values = np.zeros(len(VOCABULARY))
        values[LETTERS[0]] = 50.0
        return values

    assert talk(make_talker(endless, max_context=120), 10) == []


def test_a_turn_that_ends_with_plain_text_ends_there() -> None:
    text = "ab[/INST]"
    spelt = [VOCABULARY.index(character) for character in text]

    def parrot(tokens: tuple[int, ...]) -> int:
        return spelt[(spelt.index(tokens[-1]) + 1) % len(spelt)] if tokens[-1] in spelt else spelt[0]

    template = "[INST]{{ messages[0]['content'] }}[/INST]"
    engine = make_talker(next_token_language(len(VOCABULARY), parrot), template=template)
    talk(engine, 10)
    assert all(prompt.count("[/INST]") == 1 for prompts, _ in engine.asked[2:] for prompt in prompts)


@pytest.mark.parametrize(("template", "words"), [(None, "no chat template"), ("{{ messages|length }}", "shows no user's turn")])
def test_a_model_that_cannot_talk_to_itself_is_refused_before_the_first_answer(template: str | None, words: str) -> None:
    with pytest.raises(OptionError, match=f"{words}.*--answers"):
        converse(make_talker(template=template), TalkOptions())


@pytest.mark.parametrize(("option", "value"), [("conversations", 0), ("seed", -1)])
def test_options_out_of_range_are_refused_by_name(option: str, value: int) -> None:
    with pytest.raises(OptionError, match=f"{option} = "):
        TalkOptions(**{option: value})


def test_openings_are_about_sixty_different_ones() -> None:
    assert len(set(OPENINGS)) == len(OPENINGS) >= 60
    assert all(opening == opening.strip() for opening in OPENINGS)

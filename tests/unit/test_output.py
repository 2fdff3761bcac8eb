"""Token-exact ends: each symptom of peers (methods/serving.md, section 4) and the streaming rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import SamplingParams
from paceline.errors import OptionError
from paceline.output import OutputAssembler, StopMatcher
from tiny_models import END, byte_fallback_tokenizer, byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
FALLBACK = byte_fallback_tokenizer()


def assembler(*, max_new: int = 100, tokenizer=TOKENIZER, end_ids=(END,), **params) -> OutputAssembler:
    return OutputAssembler(tokenizer, SamplingParams(max_tokens=1000, **params), 7, max_new, end_ids)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def test_stop_text_inside_an_accepted_block_cuts_text_and_ids_at_the_same_token() -> None:
    output = assembler(stop=("STOP",))
    tokens = ids("hello STOP the rest")
    pushed = output.push(tokens)
    completing = len(ids("hello STOP"))
    assert (pushed.text, pushed.finished, pushed.stop_reason) == ("hello ", "stop", "STOP")
    assert pushed.accepted == completing
    assert output.token_ids == tokens[:completing]
    assert output.length == 7 + completing


def test_the_stop_text_completed_first_wins_whatever_the_order() -> None:
    for stops in (("the end", "he"), ("he", "the end")):
        pushed = assembler(stop=stops).push(ids("see the end"))
        assert (pushed.text, pushed.stop_reason) == ("see t", "he")


def test_of_stop_texts_completed_together_the_longest_counts() -> None:
    for stops in (("ab", "b"), ("b", "ab")):
        assert assembler(stop=stops).push(ids("xab")).text == "x"


@pytest.mark.parametrize("block", [1, 2, 3, 5, 50])
def test_stop_text_is_seen_across_tokens_and_blocks_of_any_size(block: int) -> None:
    tokens = ids("one two S-T-O-P three")
    output = assembler(stop=("S-T-O-P",))
    shown = ""
    for start in range(0, len(tokens), block):
        pushed = output.push(tokens[start : start + block])
        shown += pushed.text
        assert "S" not in shown  # a possible stop text is never shown
    assert shown == output.text == "one two "
    assert output.token_ids == tokens[: len(ids("one two S-T-O-P"))]


def test_end_token_inside_a_block_ends_there_and_has_no_text() -> None:
    output = assembler()
    tokens = [*ids("hello"), END, *ids(" more")]
    pushed = output.push(tokens)
    assert (pushed.text, pushed.finished, pushed.stop_reason) == ("hello", "stop", None)
    assert output.token_ids == [*ids("hello"), END]


def test_ignore_eos_goes_past_the_end_token() -> None:
    pushed = assembler(ignore_eos=True).push([*ids("hello"), END, *ids(" w")])
    assert (pushed.text, pushed.finished) == ("hello w", None)


def test_stop_token_id_ends_even_with_ignore_eos_and_has_no_text() -> None:
    newline = ids("\n")[0]
    output = assembler(ignore_eos=True, stop_token_ids=(newline,))
    pushed = output.push(ids("ab\ncd"))
    assert (pushed.text, pushed.finished, pushed.stop_reason) == ("ab", "stop", newline)
    assert output.token_ids == ids("ab\n")


def test_max_tokens_delivers_exactly_that_many_from_one_block() -> None:
    output = assembler(max_new=3)
    pushed = output.push(ids("abcdef"))
    assert (pushed.accepted, pushed.text, pushed.finished) == (3, "abc", "length")
    assert len(output.token_ids) == 3


def test_an_end_token_as_the_last_allowed_one_is_a_stop() -> None:
    assert assembler(max_new=2).push([*ids("a"), END]).finished == "stop"


def test_no_room_is_finished_before_anything_is_pushed() -> None:
    output = assembler(max_new=0)
    assert output.finished == "length"
    assert output.push(ids("a")).accepted == 0
    assert output.token_ids == []


def test_nothing_is_taken_after_the_end() -> None:
    output = assembler(max_new=1)
    output.push(ids("a"))
    assert output.push(ids("b")).accepted == 0
    assert (output.text, output.flush(), output.token_ids) == ("a", "", ids("a"))


@pytest.mark.parametrize(("min_tokens", "accepted"), [(0, 3), (2, 3), (3, 5), (4, 5), (5, 7), (6, 7)])
def test_end_tokens_before_min_tokens_do_not_end(min_tokens: int, accepted: int) -> None:
    tokens = [*ids("ab"), END, *ids("c"), END, *ids("d"), END]
    assert assembler(min_tokens=min_tokens).push(tokens).accepted == accepted


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (2, "a"), (3, "a#b"), (4, "a#b"), (5, "a#b#c")])
def test_stop_texts_completed_before_min_tokens_do_not_end(min_tokens: int, text: str) -> None:
    pushed = assembler(min_tokens=min_tokens, stop=("#", "#?")).push([*ids("a#b#c"), END])
    assert pushed.text == text


def test_text_cut_by_max_tokens_shows_what_was_held_for_a_stop_text() -> None:
    pushed = assembler(max_new=2, stop=("a#!",)).push(ids("a#x"))
    assert (pushed.text, pushed.finished) == ("a#", "length")


def test_an_unfinished_character_is_held_and_becomes_a_replacement_at_the_end() -> None:
    tokens = ids("é")
    output = assembler()
    assert [output.push([token]).text for token in tokens] == ["", "é"]
    broken = assembler()
    assert broken.push(tokens[:1]).text == ""
    assert broken.flush() == "\ufffd"
    assert broken.flush() == ""


def test_bytes_behind_a_stop_text_do_not_leak_at_the_end() -> None:
    output = assembler(stop=("x",))
    output.push([*ids("ax"), ids("é")[0]])
    assert output.flush() == ""
    assert output.text == "a"


def test_a_stop_text_in_what_the_decoder_still_held_is_found_at_the_end() -> None:
    letter = FALLBACK.encode("a")[-1:]
    newline = [FALLBACK.backend.token_to_id("<0x0A>")]
    output = assembler(tokenizer=FALLBACK, max_new=2, stop=("\n",))
    pushed = output.push(letter + newline)
    assert (pushed.text, pushed.finished, pushed.stop_reason) == ("a", "stop", "\n")


def test_pieces_belong_to_their_tokens() -> None:
    pushed = assembler().push(ids("hello the"))
    assert pushed.pieces == ("hello", " the")
    assert len(pushed.pieces) == pushed.accepted


def test_ids_alone_work_without_a_tokenizer() -> None:
    output = assembler(tokenizer=None, stop_token_ids=(9,))
    pushed = output.push([4, 5, 9, 6])
    assert (pushed.accepted, pushed.text, pushed.stop_reason) == (3, "", 9)


def test_stop_texts_need_a_tokenizer() -> None:
    with pytest.raises(OptionError, match=r"stop = .*needs a tokenizer; use stop_token_ids"):
        assembler(tokenizer=None, stop=("x",))


def naive_text(tokens: list[int], stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Character by character over the whole text: the reference for StopMatcher."""
    text = TOKENIZER.decode(tokens)
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="ab é", max_size=30),
    stops=st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
def test_any_blocks_give_the_text_of_the_character_by_character_rule(text: str, stops: list[str], cuts: list[int]) -> None:
    tokens, output, streamed, start = ids(text), assembler(stop=tuple(stops)), "", 0
    for i in range(len(tokens)):
        size = cuts[i % len(cuts)]
        streamed += output.push(tokens[start : start + size]).text
        start += size
    streamed += output.flush()
    assert (streamed, output.stop_reason) == naive_text(tokens, tuple(stops))
    assert streamed == output.text


def test_stop_texts_seen_while_stopping_was_off_stay_text() -> None:
    matcher = StopMatcher(("b", "bc"))
    assert matcher.push("ab", may_stop=False) == ("a", None)
    assert matcher.push("x") == ("bx", None)
    assert matcher.push("ab") == ("a", "b")

"""Pieces of the streamed answer and the closing line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from command_line import Run
from fake_engine import FakeEngine
from paceline.cli import output
from paceline.cli.output import drafters_used, split_by_origin
from paceline.records import StepRecord


def test_text_is_cut_at_its_tokens() -> None:
    assert list(split_by_origin("the cat sat", ["the", " cat", " sat"], [True, True, False])) == [
        ("the", True),
        (" cat", True),
        (" sat", False),
    ]


def test_space_that_a_lone_token_lacks_stays_with_the_token() -> None:
    assert list(split_by_origin(" cat sat", ["cat", "sat"], [False, True])) == [(" cat", False), (" sat", True)]


def test_half_characters_join_the_next_piece() -> None:
    assert list(split_by_origin("é!", ["\ufffd", "\ufffd", "!"], [True, True, False])) == [("é!", False)]


@given(st.text(max_size=20), st.lists(st.tuples(st.text(max_size=4), st.booleans()), max_size=6))
def test_pieces_add_up_to_the_text(text: str, tokens: list[tuple[str, bool]]) -> None:
    pieces = split_by_origin(text, [t for t, _ in tokens], [d for _, d in tokens])
    assert "".join(piece for piece, _ in pieces) == text


def test_busiest_drafter_is_named_first() -> None:
    def step(drafter: str | None, drafted: int) -> StepRecord:
        return StepRecord(0, drafter, drafted, drafted, 0, 1, 10)

    assert drafters_used([step("a", 1), step("b", 5), step(None, 0)]) == "b,a"
    assert drafters_used([step(None, 0)]) == "none"


def test_drafted_tokens_are_coloured_on_a_terminal_only(
    run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    echoed: list[str] = []
    monkeypatch.setattr(output.typer, "echo", lambda text, nl: echoed.append(text))
    (event,) = engine.stream("ab", engine_params())
    output.echo_event(engine, event)  # type: ignore[arg-type]
    assert "\x1b[" in echoed[0]
    assert echoed[0].replace("\x1b[32m", "").replace("\x1b[0m", "") == "A"
    assert echoed[1] == "B"


def engine_params():  # type: ignore[no-untyped-def]
    from paceline.config import SamplingParams

    return SamplingParams()

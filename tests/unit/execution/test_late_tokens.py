"""A draft's last token is late: what decoding leaves, what forwards take, and that nobody waits before the target has work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting.base import DraftJob, SequenceView
from paceline.drafting.model import ModelDrafter
from paceline.engine import Engine
from paceline.errors import OptionError
from paceline.execution.base import Decoding, ForwardOutput, Segment, known
from paceline.execution.cuda.capture import check
from paceline.execution.cuda.stepping import InLine, Line, Stepping, decode, placed, prepared
from paceline.records import UNKNOWN, DecodedToken, Draft, LateToken
from toys import Language, ToyRunner, ToySequence, noisy_language, random_language
from unit.execution.ahead_toys import VOCAB, AheadToy

LANGUAGE = random_language(VOCAB, order=2, seed=3, scale=1.5)
NEAR = noisy_language(LANGUAGE, 0.3, seed=5)
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5, 6], list(range(20))]
PARAMS = (SamplingParams(max_tokens=30), SamplingParams(max_tokens=30, temperature=0.8, seed=4))


def token_of(token: int, largest: float = 0.5) -> DecodedToken:
    return DecodedToken(token, largest, 1.0, 0.1, largest)


def line_of(*tokens: int) -> Line:
    return Line(lambda: [token_of(token) for token in tokens], torch.tensor(tokens, dtype=torch.int32))


# ---------- decoding ----------


def scripted(*steps: Sequence[int]) -> tuple[Stepping, list[str]]:
    """Steps of given tokens, and what was asked of them."""
    asked: list[str] = []
    lines = iter([line_of(*tokens) for tokens in steps])

    def read() -> list[DecodedToken]:
        asked.append("read")
        return next(lines).tokens()

    def leave() -> Sequence[LateToken]:
        asked.append("leave")
        line = next(lines)
        return [InLine(line, place) for place in range(len(steps[0]))]

    return Stepping(lambda: asked.append("issue"), read, leave), asked


def job_of(most: int, keep_on: Callable[[DecodedToken], bool] = lambda _: True) -> Decoding:
    return Decoding(ToySequence(), [1], most, keep_on)


def test_the_token_under_way_at_a_stop_is_left_unread() -> None:
    stepping, asked = scripted([7], [8], [9])
    (found,) = decode([job_of(9, lambda token: token.token != 8)], 9, stepping)
    assert asked == ["issue", "read", "issue", "read", "leave"]
    assert [token.token for token in found.tokens] == [7, 8]
    assert [token.token for token in found.settled()] == [7, 8, 9]


def test_the_last_token_that_was_asked_for_is_left_unread_and_nobody_is_asked_about_it() -> None:
    stepping, asked = scripted([7], [8])
    questions: list[int] = []
    (found,) = decode([job_of(2, lambda token: questions.append(token.token) or True)], 2, stepping)
    assert asked == ["issue", "read", "leave"]
    assert questions == [7]
    assert [token.token for token in found.settled()] == [7, 8]
    stepping, asked = scripted([7])
    (found,) = decode([job_of(1)], 1, stepping)
    assert (asked, found.tokens) == (["leave"], [])


def test_of_a_batch_only_the_longest_drafts_have_late_tokens() -> None:
    stepping, asked = scripted([1, 2, 3], [4, 5, 6], [7, 8, 9])
    jobs = [job_of(3), job_of(3, lambda token: token.token != 2), job_of(3)]
    decoded = decode(jobs, 3, stepping)
    assert asked == ["issue", "read", "issue", "read", "leave"]
    assert [found.late is None for found in decoded] == [False, True, False]
    assert [[token.token for token in found.settled()] for found in decoded] == [[1, 4, 7], [2, 5], [3, 6, 9]]


def test_a_sequence_whose_logits_are_not_finite_has_no_late_token() -> None:
    stepping, _ = scripted([1, 2], [3, -1], [5, 6])
    decoded = decode([job_of(3), job_of(3)], 3, stepping)
    assert [[token.token for token in found.settled()] for found in decoded] == [[1, 3, 5], [2]]
    assert decoded[1].late is None


def test_a_late_token_that_comes_to_nothing_is_left_out() -> None:
    stepping, _ = scripted([1], [-1])
    (found,) = decode([job_of(2)], 2, stepping)
    assert found.late is not None
    assert [token.token for token in found.settled()] == [1]
    draft = Draft((1, UNKNOWN), confidences=(0.5,), late=found.late)
    assert draft.settled() == Draft((1,), confidences=(0.5,))


# ---------- forwards ----------


def test_sequences_that_read_long_texts_share_forwards_of_64_rows() -> None:
    lengths = (70, 3, 200, 41, 1, 130)
    texts = [[(7 * i + k) % VOCAB for k in range(length)] for i, length in enumerate(lengths)]
    toys = [AheadToy(LANGUAGE) for _ in range(2)]
    left = []
    for toy, packed in zip(toys, (True, False), strict=True):
        jobs = [Decoding(toy.open(), text, 4, lambda _: True) for text in texts]
        feeds, most = prepared(toy, jobs, 4096, packed=packed)
        assert most == 4
        left.append(feeds)
        for job, text, feed in zip(jobs, texts, feeds, strict=True):
            sequence = job.sequence
            assert isinstance(sequence, ToySequence)
            assert [*sequence.committed, *feed] == text
    assert left[0] == left[1]
    read = sum(lengths) - sum(map(len, left[0]))
    assert read > 300
    assert toys[0].forwards == -(-read // 64)


def test_late_tokens_of_one_line_are_fetched_and_others_waited_for() -> None:
    cpu, first, other, read = torch.device("cpu"), line_of(4, 5, 6), line_of(7), line_of(8)
    read.tokens()
    late = [InLine(first, 2), InLine(other, 0), InLine(read, 0), InLine(first, 0)]
    segments = [Segment(ToySequence(), (3, UNKNOWN), late=token) for token in late] + [Segment(ToySequence(), (1,))]
    found, line = placed(segments, cpu)
    assert [tuple(segment.tokens) for segment in found] == [(3, -3), (3, 7), (3, 8), (3, -1), (1,)]
    assert line is first
    assert (first.is_known, other.is_known) == (False, True)
    assert all(segment.late is None for segment in found)


@pytest.mark.parametrize(("count", "device"), [(65, "cpu"), (2, "meta")])
def test_a_late_token_is_waited_for_where_it_cannot_be_fetched(count: int, device: str) -> None:
    segment = Segment(ToySequence(), (*[1] * (count - 1), UNKNOWN), late=InLine(line_of(4), 0))
    (found,), line = placed([segment], torch.device(device))
    assert (found.tokens[-1], line) == (4, None)


def test_a_token_that_came_to_nothing_is_any_token_in_a_forward() -> None:
    segment = known(Segment(ToySequence(), (3, UNKNOWN), late=InLine(line_of(-1), 0)))
    assert 0 <= segment.tokens[-1] < VOCAB


def test_only_a_late_token_may_be_unknown() -> None:
    line = line_of(4)
    check([Segment(ToySequence(), (3, UNKNOWN), late=InLine(line, 0))], VOCAB)
    check([Segment(ToySequence(), (UNKNOWN,), late=InLine(line, 0))], VOCAB)
    assert not line.is_known
    for tokens, late in (((3, UNKNOWN), None), ((UNKNOWN, UNKNOWN), InLine(line, 0))):
        with pytest.raises(OptionError, match="outside the vocabulary"):
            check([Segment(ToySequence(), tokens, late=late)], VOCAB)


# ---------- rounds ----------


_WAIT = 0.02


class Watched(LateToken):
    """A late token that tells when it is waited for, and makes one wait."""

    def __init__(self, inner: LateToken, happened: list[str]) -> None:
        self._inner, self._happened = inner, happened
        self.waited = _WAIT

    def wait(self) -> DecodedToken:
        if self._happened[-1] != "wait":  # those of one step are there together
            time.sleep(_WAIT)
        self._happened.append("wait")
        return self._inner.wait()


class WatchedDraft(AheadToy):
    def __init__(self, language: Language, happened: list[str]) -> None:
        super().__init__(language)
        self._happened = happened

    def stepping(self, jobs: Sequence[Decoding], feeds: Sequence[Sequence[int]]) -> Stepping:
        steps = super().stepping(jobs, feeds)

        def leave() -> list[LateToken]:
            self._happened.append("leave")
            return [Watched(token, self._happened) for token in steps.leave()]

        return steps._replace(leave=leave)


class WatchedTarget(AheadToy):
    def __init__(self, happened: list[str], *, takes_late: bool) -> None:
        super().__init__(LANGUAGE)
        self._happened, self.takes_late = happened, takes_late

    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        self._happened.append("forward")
        return super().forward(segments, want_hidden=want_hidden)


def engine_of(target: ToyRunner, draft: AheadToy, num_draft: int = 4, **options: Any) -> Engine:
    costs = CostTable([1, 8], [64], [[1.0, 1.1]])
    controller = controllers.create("fixed", costs, {"num_draft": num_draft, **options})
    return Engine(target, costs=costs, controller=controller, drafters=[ModelDrafter(draft)])


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("takes_late", [True, False])
def test_nobody_waits_between_a_draft_and_a_forward_that_takes_late_tokens(
    params: SamplingParams, num_prompts: int, takes_late: bool
) -> None:
    happened: list[str] = []
    engine = engine_of(WatchedTarget(happened, takes_late=takes_late), WatchedDraft(NEAR, happened))
    made = engine.generate(PROMPTS[:num_prompts], params)
    drafted = [happened[i + 1] for i, what in enumerate(happened) if what == "leave"]
    assert drafted.count("forward" if takes_late else "wait") == len(drafted) > 5
    for prompt, result in zip(PROMPTS, made, strict=False):
        assert result.num_accepted > 0
        assert all(step.draft_seconds > _WAIT for step in result.steps if step.num_drafted)
        assert min(step.verify_seconds for step in result.steps if step.num_drafted) < _WAIT
        assert result.token_ids == engine.generate(prompt, params, plain=True).token_ids


@pytest.mark.parametrize("num_draft", [1, 2, 5])
def test_every_token_of_a_draft_that_is_the_target_itself_is_accepted(num_draft: int) -> None:
    result = engine_of(AheadToy(LANGUAGE), AheadToy(LANGUAGE), num_draft).generate([1, 2], SamplingParams(max_tokens=31))
    assert result.num_accepted == result.num_drafted > 10
    assert max(step.num_drafted for step in result.steps) == num_draft
    assert all(len(step.confidences) == step.num_drafted for step in result.steps)


def test_where_a_late_token_comes_to_nothing_the_draft_is_shorter_and_the_text_the_same() -> None:
    def broken(tokens: tuple[int, ...]) -> np.ndarray:
        return np.full(VOCAB, np.nan) if len(tokens) % 7 == 0 else LANGUAGE(tokens)

    for num_draft in (1, 3, 4):
        engine = engine_of(AheadToy(LANGUAGE), AheadToy(broken), num_draft)
        made = engine.generate(PROMPTS, PARAMS[0])
        assert any(step.num_drafted < step.num_planned for result in made for step in result.steps)
        for prompt, result in zip(PROMPTS, made, strict=True):
            assert result.num_accepted == result.num_drafted
            assert result.token_ids == engine.generate(prompt, PARAMS[0], plain=True).token_ids


def session_drafts(end_ids: frozenset[int] = frozenset()) -> tuple[Draft, Draft]:
    """A draft made with others, and the same one proposed alone."""
    drafter = ModelDrafter(AheadToy(LANGUAGE))
    together, alone = (drafter.open(SequenceView(i, [1, 2], 2, SamplingParams(), 1, end_ids)) for i in range(2))
    (draft,) = drafter.propose_together([DraftJob(together, 4, lambda _: True)])
    return draft, alone.propose(4, lambda _: True)


def test_a_draft_that_is_proposed_alone_has_no_late_token() -> None:
    draft, alone = session_drafts()
    assert draft.late is not None
    assert draft.tokens[-1] == UNKNOWN
    assert len(draft) == len(alone) == 4
    assert alone == draft.settled()
    assert alone.late is None


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_late_token_behind_the_end_of_the_text_is_left_out_and_a_late_end_stays(place: int) -> None:
    _, whole = session_drafts()
    assert len(set(whole.tokens)) == 4
    draft, alone = session_drafts(frozenset(whole.tokens[place : place + 1]))
    assert (draft.late is None) == (place < 3)
    assert draft.settled().tokens == alone.tokens == whole.tokens[: place + 1]


def test_what_was_fed_before_a_late_token_is_not_fed_again() -> None:
    drafter = ModelDrafter(AheadToy(LANGUAGE))
    view = SequenceView(1, [1, 2], 2, SamplingParams(), 1)
    session = drafter.open(view)
    (draft,) = drafter.propose_together([DraftJob(session, 4, lambda _: True)])
    assert session.cached_tokens == 5
    view.tokens += [*draft.settled().tokens, 9]
    assert session.outlook(4).catch_up == 1  # the late token itself

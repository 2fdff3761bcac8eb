"""Late tokens on a GPU: taken where a draft's step left them, in the order of the stream. Need a GPU; skipped elsewhere."""

from __future__ import annotations

import pytest
import torch

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting.model import ModelDrafter
from paceline.engine import Engine
from paceline.execution.base import Decoded, Decoding, Segment
from paceline.execution.cuda.driver import missing_reason
from paceline.execution.cuda.runner import CudaRunner
from paceline.execution.cuda.stepping import InLine, Line, Steps
from paceline.execution.draws import DrawLaw, Draws
from paceline.records import UNKNOWN, DecodedToken
from paceline.sampling import CounterRandom, Purpose
from unit.execution.cuda_toys import check_texts, commit, runner
from unit.execution.toy_sources import ToySource, random_tokens

_ABSENT = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0) or missing_reason() is not None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_ABSENT, reason="needs a GPU of compute capability 9.0 and cuda-bindings")]

STOPS = (2, 3, 3, 1, 3)
"""Tokens after which each of five sequences is to stop: three of them have the token of the last step under way."""


def models() -> tuple[CudaRunner, CudaRunner]:
    """Target and draft."""
    return runner("cuda_llama", "bf16", "cuda"), runner("cuda_llama", "int8", "cuda")


def drafted(draft: CudaRunner, stops: tuple[int, ...] = STOPS, law: DrawLaw | None = None) -> list[Decoded]:
    """Drafts of several sequences, decoded together."""
    jobs = []
    for i, stop in enumerate(stops):
        sequence = draft.open()
        commit(draft, sequence, random_tokens(60 + 13 * i, i))
        answers = iter([True] * (stop - 1) + [False])
        numbers = [CounterRandom(i).bits(k, Purpose.TARGET) for k in range(9)] if law is not None else []
        jobs.append(Decoding(sequence, [i + 3], 9, lambda _, answers=answers: next(answers), law, numbers))
    found = draft.decode_ahead(jobs)
    for job in jobs:
        draft.close(job.sequence)
    return found


def segments_of(target: CudaRunner, drafts: list[Decoded], law: DrawLaw | None = None) -> list[Segment]:
    """What verifies them, with what is late."""
    segments = []
    for i, draft in enumerate(drafts):
        sequence = target.open()
        commit(target, sequence, random_tokens(60 + 13 * i, i))
        tokens = (i + 3, *(token.token for token in draft.tokens), *([UNKNOWN] if draft.late is not None else ()))
        draws = Draws(law, [CounterRandom(i).bits(k, Purpose.TARGET) for k in range(len(tokens))]) if law is not None else None
        segments.append(Segment(sequence, tokens, draws=draws, late=draft.late))
    return segments


def settled(segments: list[Segment], drafts: list[Decoded]) -> list[Segment]:
    return [
        Segment(segment.sequence, (segment.tokens[0], *(token.token for token in draft.settled())), draws=segment.draws)
        for segment, draft in zip(segments, drafts, strict=True)
    ]


@pytest.mark.parametrize("law", [None, DrawLaw(0.9, top_k=30)])
@pytest.mark.parametrize("count", [1, 5])
def test_a_forward_over_late_tokens_is_that_over_known_ones(count: int, law: DrawLaw | None) -> None:
    target, draft = models()
    for _ in range(20):
        drafts = drafted(draft, STOPS[-count:], law)
        assert [found.late is not None for found in drafts] == [stop == 3 for stop in STOPS[-count:]]
        segments = segments_of(target, drafts, law)
        got = target.forward(segments)
        logits = got.logits.clone()
        want = target.forward(settled(segments, drafts))
        assert torch.equal(logits, want.logits)
        assert (got.best, got.drawn) == (want.best, want.drawn)
        for segment in segments:
            target.close(segment.sequence)


def test_late_tokens_of_an_earlier_draft_and_of_another_model_are_right_too() -> None:
    target, draft = models()
    other = runner("cuda_llama", "int4", "cuda")
    drafts = [drafted(draft, (2,))[0], drafted(other, (3, 3))[1], drafted(draft, (3, 4))[1]]
    late = [found.late for found in drafts]
    assert all(isinstance(token, InLine) for token in late)
    assert [token.line.is_known for token in late if isinstance(token, InLine)] == [True, False, False]
    segments = segments_of(target, drafts)
    logits = target.forward(segments).logits.clone()
    assert torch.equal(logits, target.forward(settled(segments, drafts)).logits)


def test_a_late_token_is_right_in_several_passes_and_in_a_chain_that_the_library_runs() -> None:
    target, draft = models()
    drafts = drafted(draft, (3, 3))
    segments = segments_of(target, drafts)
    long = Segment(target.open(), (*random_tokens(62, 2), UNKNOWN), late=segments[1].late)
    for later in (Segment(target.open(), random_tokens(64, 3)), Segment(target.open(), random_tokens(700, 3))):
        parts = [segments[0], long, later]
        logits = target.forward(parts).logits.clone()
        last = drafts[1].settled()[-1].token
        known = [settled(segments, drafts)[0], Segment(long.sequence, (*long.tokens[:-1], last)), later]
        assert torch.equal(logits, target.forward(known).logits)


def test_a_late_token_that_comes_to_nothing_does_no_harm() -> None:
    target, draft = models()[0], CudaRunner(ToySource("cuda_llama"), "int8", "cuda", memory_bytes=4 << 30)
    want = drafted(draft, (3,))[0].settled()
    sequence, seen = draft.open(), list[int]()
    commit(draft, sequence, random_tokens(60, 0))

    def keep_on(token: DecodedToken) -> bool:
        seen.append(token.token)
        if len(seen) == 2:  # the third one is under way, and the fourth one follows from it
            with torch.inference_mode():
                draft._decoder.embedding[want[2].token] = float("nan")
        return len(seen) < 3

    drafts = draft.decode_ahead([Decoding(sequence, [3], 9, keep_on)])
    assert drafts[0].late is not None
    segments = segments_of(target, drafts)
    logits = target.forward(segments).logits[:4].clone()
    assert drafts[0].late.wait().token == -1
    assert drafts[0].settled() == want[:3]
    assert torch.equal(logits, target.forward(settled(segments, drafts)).logits)


def test_a_draft_whose_weights_leave_while_it_decodes_is_right() -> None:
    target, draft = models()
    want = [token.token for token in drafted(draft, (3,))[0].settled()]
    drafts = drafted(draft, (3,))
    draft.offload()
    segments = segments_of(target, drafts)
    logits = target.forward(segments).logits.clone()
    assert [token.token for token in drafts[0].settled()] == want
    assert torch.equal(logits, target.forward(settled(segments, drafts)).logits)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("num_prompts", [1, 5])
@pytest.mark.parametrize("params", [SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=0.8, seed=4)])
def test_nothing_is_waited_for_between_the_last_answer_and_the_issue_of_the_verification(
    params: SamplingParams, num_prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = models()
    costs = CostTable([1, 8], [64], [[1.0, 1.1]])
    controller = controllers.create("fixed", costs, {"num_draft": 4})
    engine = Engine(target, costs=costs, controller=controller, drafters=[ModelDrafter(draft)])
    prompts = [random_tokens(20 + 9 * i, i) for i in range(num_prompts)]
    engine.generate(prompts, params)  # captures

    assert target._forwards is not None
    assert draft._forwards is not None
    again, leave, wait = target._forwards.graphs.again, Steps.leave, torch.cuda.Event.synchronize
    lines = {id(event) for event in draft._forwards._steps._written}
    layouts = (target._layout, draft._layout, draft._forwards._steps.layout)
    inputs = {id(event) for layout in layouts for event in layout._copied}
    happened: list[str] = []

    def left(steps: Steps) -> Line:
        happened.append("left")
        torch.cuda.set_sync_debug_mode("error")
        return leave(steps)

    def waited(event: torch.cuda.Event) -> None:
        if id(event) in lines:
            passed = event.query() and happened[-1] == "left"  # of a step that was begun behind a verification, and one too many
            happened.append("read" if passed else "waited")
        elif id(event) in inputs:
            assert event.query(), "inputs of forwards long past are ready"
        wait(event)

    def issued(key: object) -> None:
        again(key)
        torch.cuda.set_sync_debug_mode("default")
        happened.append("issued")

    monkeypatch.setattr(Steps, "leave", left)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", waited)
    monkeypatch.setattr(target._forwards.graphs, "again", issued)
    try:
        made = engine.generate(prompts, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    happened = [what for what in happened if what != "read"]
    behind = [happened[i + 1] for i, what in enumerate(happened) if what == "left"]
    assert behind == ["issued"] * len(behind)
    assert len(behind) > 5
    assert happened.count("waited") > len(behind)
    assert sum(result.num_accepted for result in made) > 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("law", [None, DrawLaw(0.9, top_k=30), DrawLaw(1.1, min_p=0.02)])
@pytest.mark.parametrize("counts", [(5,), (40, 40, 3), (64, 1, 64, 20)])
def test_all_passes_of_a_forward_are_begun_before_one_is_waited_for(counts: tuple[int, ...], law: DrawLaw | None) -> None:
    target, _ = models()

    every = []
    for i, count in enumerate(counts):
        sequence = target.open()
        commit(target, sequence, random_tokens(60 + 13 * i, i))
        draws = Draws(law, [CounterRandom(i).bits(k, Purpose.TARGET) for k in range(count)]) if law is not None else None
        every.append(Segment(sequence, random_tokens(count, 7 + i), draws=draws if i != 1 else None))
    rows = [(one.logits.cpu(), one.best, one.drawn) for one in (target.forward([segment]) for segment in every)]
    target.begin_forward(every)()  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = target.begin_forward(every)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    got = result()
    assert torch.equal(got.logits.cpu(), torch.cat([logits for logits, _, _ in rows]))
    assert got.best == [token for _, best, _ in rows for token in best or []]
    drawn = [token for _, best, drawn in rows for token in drawn or best or []]
    assert got.drawn == (drawn if law is not None else None)
    for segment in every:
        target.close(segment.sequence)


def test_tokens_of_a_pass_stay_when_the_next_forward_overwrites_them() -> None:
    target, _ = models()
    sequences = [target.open() for _ in range(2)]
    segments = [Segment(sequence, random_tokens(9, i)) for i, sequence in enumerate(sequences)]
    want = [target.forward([segment]).best for segment in segments]
    results = [target.begin_forward([segment]) for segment in segments]
    assert [result().best for result in results] == want
    for sequence in sequences:
        target.close(sequence)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_with_tokens_that_end_them_are_those_of_plain_decoding(temperature: float) -> None:
    target, draft = models()
    for num_draft in (2, 3):
        params = SamplingParams(max_tokens=40, temperature=temperature, seed=4, stop_token_ids=(5, 17, 40))
        check_texts(target, draft, params, num_draft)

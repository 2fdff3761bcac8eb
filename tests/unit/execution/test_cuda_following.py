"""A draft's forward that begins before the host knows what was accepted. Needs a GPU; skipped elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable
from paceline.drafting.model import ModelDrafter
from paceline.engine import Engine
from paceline.execution.cuda.driver import missing_reason
from paceline.execution.cuda.following import Verification, accepted
from paceline.execution.cuda.linears import MAX_ROWS
from paceline.execution.cuda.runner import CudaRunner
from paceline.execution.cuda.stepping import RING
from paceline.execution.draws import AHEAD, NUMBER_BITS
from paceline.records import DraftFeatures, GenerationResult, Plan
from unit.execution.cuda_toys import runner
from unit.execution.toy_sources import random_tokens

_ABSENT = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0) or missing_reason() is not None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_ABSENT, reason="needs a GPU of compute capability 9.0 and cuda-bindings")]

COSTS = CostTable([1, 8], [64], [[1.0, 1.1]])
PARAMS = [SamplingParams(max_tokens=150), SamplingParams(max_tokens=150, temperature=0.8, seed=4)]


def models() -> tuple[CudaRunner, CudaRunner]:
    """Target and draft."""
    return runner("cuda_llama", "bf16", "cuda"), runner("cuda_llama", "int8", "cuda")


def engine_of(controller: Controller) -> Engine:
    target, draft = models()
    return Engine(target, costs=COSTS, controller=controller, drafters=[ModelDrafter(draft)])


class Fickle(Controller):
    """Plans other lengths in every round, for some sequences none, and ends some drafts early."""

    def plan(self, context: RoundContext) -> Plan:
        wanted = (context.request_id + context.context_length // 3) % 6
        wanted = min(wanted, context.max_draft, context.outlooks[0].available)
        return Plan(context.outlooks[0].drafter, wanted) if wanted else Plan(None, 0)

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool:
        return (request_id + features.position) % 4 > 0


def told(results: Sequence[GenerationResult]) -> list[object]:
    """Texts, and of each round what was drafted, with the probability of each token, and accepted."""
    return [(r.token_ids, [(s.num_drafted, s.num_accepted, s.confidences) for s in r.steps]) for r in results]


def test_the_device_accepts_as_the_readable_form_does() -> None:
    _, draft = models()
    assert draft._forwards is not None
    layout, steps, generator = draft._layout, draft._forwards._steps, torch.Generator().manual_seed(3)
    counts = [1, 2, 5, 9, 1, 30, 8]
    rows, firsts = sum(counts), [sum(counts[:i]) for i in range(len(counts))]
    with torch.inference_mode():
        for turn in range(20):
            tokens, chosen, late = (torch.randint(0, 2, (64,), generator=generator, dtype=torch.int32) for _ in range(3))
            chosen[rows - 1] = -1
            sent = tokens.clone()
            for i in (2, 3):  # the last one is late
                sent[firsts[i] + counts[i] - 1] = -1 - i
                tokens[firsts[i] + counts[i] - 1] = late[i]
            layout.clear()
            layout.sources[: 2 * len(counts)] = torch.tensor([n for place in zip(firsts, counts, strict=True) for n in place])
            layout.lengths[:] = 100
            numbers = [[1000 * i + j for j in range(count + AHEAD - 1)] for i, count in enumerate(counts)] if turn % 2 else [[]] * 7
            told = torch.zeros(64, 2, dtype=torch.int32, pin_memory=True)
            steps.accept(Verification((), sent.cuda(), late.cuda(), chosen.cuda()), layout, told, numbers, AHEAD)
            torch.cuda.synchronize()
            for i, (first, count) in enumerate(zip(firsts, counts, strict=True)):
                want = accepted(tokens[first : first + count].tolist(), chosen[first : first + count].tolist())
                fed, length = layout.tokens[2 * i : 2 * i + 2].tolist(), layout.lengths[2 * i : 2 * i + 2].tolist()
                assert (*told[i].tolist(), *fed) == (want[0], want[2], want[1], want[2])
                assert (*length, int(steps.layout.lengths[i])) == (100 + want[0], 100 + want[0], 102 + want[0])
                if numbers[i]:
                    line = int(steps._line)
                    got = steps.make_drawer().numbers[[(line + j) % RING for j in range(AHEAD)], i].cpu() >> (64 - NUMBER_BITS)
                    assert [number & ((1 << NUMBER_BITS) - 1) for number in got.tolist()] == numbers[i][want[0] : want[0] + AHEAD]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("num_prompts", [1, 5, 16])
def test_drafts_are_those_of_forwards_that_the_host_begins(
    num_prompts: int, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, across pages, and almost all of them are taken."""
    _, draft = models()
    prompts = [random_tokens(20 + 9 * i, i) for i in range(num_prompts)]
    for num_draft in (1, 3, 5):
        engine = engine_of(controllers.create("fixed", COSTS, {"num_draft": num_draft}))
        before = draft.followed
        got = engine.generate(prompts, params)
        rounds = max(len(result.steps) for result in got)
        if num_prompts * (num_draft + 1) <= MAX_ROWS:  # else no single forward verifies them
            assert draft.followed - before > 0.8 * rounds
        monkeypatch.setattr(CudaRunner, "follows", False)
        before = draft.followed
        assert told(engine.generate(prompts, params)) == told(got)
        assert draft.followed == before
        monkeypatch.undo()


@pytest.mark.parametrize("params", PARAMS)
def test_texts_are_those_of_plain_decoding_whatever_is_planned(params: SamplingParams) -> None:
    _, draft = models()
    prompts = [random_tokens(20 + 9 * i, i) for i in range(9)]
    engine = engine_of(Fickle())
    plain = [result.token_ids for result in engine.generate(prompts, params, plain=True)]
    before = draft.followed
    for _ in range(3):
        made = engine.generate(prompts, params)
        assert [result.token_ids for result in made] == plain
    assert sum(result.num_drafted for result in made) > 0
    for prompt, text in zip(prompts[:3], plain, strict=False):
        assert engine.generate(prompt, params).token_ids == text
    assert draft.followed > before


def test_a_model_that_drafts_for_itself_is_read_before_anything_follows() -> None:
    target, _ = models()
    controller = controllers.create("fixed", COSTS, {"num_draft": 3})
    engine = Engine(target, costs=COSTS, controller=controller, drafters=[ModelDrafter(target)])
    result = engine.generate(random_tokens(40, 1), PARAMS[0])
    assert result.token_ids == engine.generate(random_tokens(40, 1), PARAMS[0], plain=True).token_ids
    assert all(step.num_accepted == step.num_drafted for step in result.steps[:-1])

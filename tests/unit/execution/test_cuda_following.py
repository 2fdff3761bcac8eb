"""A draft's forward that begins before the host knows what was accepted. Needs a GPU; skipped elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting.model import ModelDrafter
from paceline.engine import Engine
from paceline.execution.cuda.driver import missing_reason
from paceline.execution.cuda.following import accepted
from paceline.execution.cuda.runner import CudaRunner
from paceline.records import GenerationResult
from unit.execution.cuda_toys import runner
from unit.execution.toy_sources import random_tokens

_ABSENT = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0) or missing_reason() is not None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_ABSENT, reason="needs a GPU of compute capability 9.0 and cuda-bindings")]

PARAMS = [SamplingParams(max_tokens=150), SamplingParams(max_tokens=150, temperature=0.8, seed=4)]


def models() -> tuple[CudaRunner, CudaRunner]:
    """Target and draft."""
    return runner("cuda_llama", "bf16", "cuda"), runner("cuda_llama", "int8", "cuda")


def engine_of(num_draft: int) -> Engine:
    target, draft = models()
    costs = CostTable([1, 8], [64], [[1.0, 1.1]])
    controller = controllers.create("fixed", costs, {"num_draft": num_draft})
    return Engine(target, costs=costs, controller=controller, drafters=[ModelDrafter(draft)])


def told(results: Sequence[GenerationResult]) -> list[object]:
    """Texts, and of each round what was drafted, with the probability of each token, and accepted."""
    return [(r.token_ids, [(s.num_drafted, s.num_accepted, s.confidences) for s in r.steps]) for r in results]


def test_the_device_accepts_as_the_readable_form_does() -> None:
    from paceline.execution.cuda.fused import accept

    _, draft = models()
    layout, generator = draft._layout, torch.Generator().manual_seed(3)
    counts, vocab = [1, 2, 5, 9, 1, 30, 8], 4
    rows = sum(counts)
    with torch.inference_mode():
        for _ in range(20):
            tokens = torch.randint(0, 2, (64,), generator=generator, dtype=torch.int32)
            chosen = torch.randint(0, 2, (64,), generator=generator, dtype=torch.int32)
            chosen[rows - 1] = -1
            late = torch.randint(0, 2, (64,), generator=generator, dtype=torch.int32)
            firsts = [sum(counts[:i]) for i in range(len(counts))]
            sent = tokens.clone()
            for i in (2, 3):  # the last one is late
                sent[firsts[i] + counts[i] - 1] = -1 - i
                tokens[firsts[i] + counts[i] - 1] = late[i]
            layout.clear()
            layout.sources[: 2 * len(counts)] = torch.tensor([n for place in zip(firsts, counts, strict=True) for n in place])
            layout.lengths[:] = 100
            out = torch.zeros(64, 2, dtype=torch.int32, pin_memory=True)
            accept(sent.cuda(), late.cuda(), chosen.cuda(), layout, out, len(counts), vocab)
            torch.cuda.synchronize()
            for i, (first, count) in enumerate(zip(firsts, counts, strict=True)):
                want = accepted(tokens[first : first + count].tolist(), chosen[first : first + count].tolist())
                fed, length = layout.tokens[2 * i : 2 * i + 2].tolist(), layout.lengths[2 * i : 2 * i + 2].tolist()
                assert (*out[i].tolist(), *fed) == (want[0], want[2], want[1], want[2])
                assert length == [100 + want[0]] * 2


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("num_prompts", [1, 5, 16])
def test_drafts_are_those_of_forwards_that_the_host_begins(
    num_prompts: int, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, across pages, and almost all of them are taken."""
    _, draft = models()
    prompts = [random_tokens(20 + 9 * i, i) for i in range(num_prompts)]
    for num_draft in (1, 3):
        engine = engine_of(num_draft)
        before = draft.followed
        got = engine.generate(prompts, params)
        rounds = max(len(result.steps) for result in got)
        assert draft.followed - before > 0.8 * rounds
        monkeypatch.setattr(CudaRunner, "follows", False)
        before = draft.followed
        assert told(engine.generate(prompts, params)) == told(got)
        assert draft.followed == before
        monkeypatch.undo()


@pytest.mark.parametrize("params", PARAMS)
def test_texts_are_those_of_plain_decoding(params: SamplingParams) -> None:
    """With a controller that ends drafts, so that only some have a token under way, and leaves some sequences out."""
    target, draft = models()
    costs = CostTable([1, 64, 65, 128], [64], [[1.0, 1.2, 2.0, 2.2]])
    engine = Engine(target, costs=costs, controller=controllers.create("pacer", costs), drafters=[ModelDrafter(draft)])
    prompts = [random_tokens(20 + 9 * i, i) for i in range(9)]
    plain = [result.token_ids for result in engine.generate(prompts, params, plain=True)]
    for _ in range(3):
        assert [result.token_ids for result in engine.generate(prompts, params)] == plain
    assert sum(s.num_drafted for result in engine.generate(prompts, params) for s in result.steps) > 0


def test_a_model_that_drafts_for_itself_is_read_before_anything_follows() -> None:
    target, _ = models()
    costs = CostTable([1, 8], [64], [[1.0, 1.1]])
    controller = controllers.create("fixed", costs, {"num_draft": 3})
    engine = Engine(target, costs=costs, controller=controller, drafters=[ModelDrafter(target)])
    result = engine.generate(random_tokens(40, 1), PARAMS[0])
    assert result.token_ids == engine.generate(random_tokens(40, 1), PARAMS[0], plain=True).token_ids
    assert all(step.num_accepted == step.num_drafted for step in result.steps[:-1])

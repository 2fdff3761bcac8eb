"""Self-drafts of the default model: real weights, the target's own text."""

from __future__ import annotations

from functools import lru_cache

import pytest

from paceline.config import RunnerConfig, SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting import registry
from paceline.drafting.base import DrafterContext
from paceline.engine import Engine
from paceline.execution.base import Runner
from paceline.execution.factory import create_graded, create_runner
from paceline.models.resolve import open_model

PROMPTS = ("Name three colours of the rainbow.", "Write a Python function that adds two numbers.")
ANSWER = SamplingParams(max_tokens=24, ignore_eos=True)
IN_INT4 = ["early_exit", "layer_skip", "swift", "sparse_kv"]
COPIES = [("quantized_self", "bf16"), ("quantized_self", "int8"), ("quantized_self", "fp32"), ("dynamic_precision", "bf16")]
OPTIONS = {
    "early_exit": {"exits": (10, 25), "threshold": 0.2},
    "swift": {"ratio": 0.1, "window": 8, "share": 0.5},
    "sparse_kv": {"choose": "attended", "budget": 16, "queries": 8, "least_context": 8},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield open_model("default")


@lru_cache
def target(source, precision: str) -> Runner:
    return create_runner(source, RunnerConfig(precision=precision, device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [*((kind, "int4") for kind in IN_INT4), *COPIES])
def test_greedy_text_is_that_of_plain_decoding(source, kind: str, precision: str) -> None:
    runner = target(source, precision)

    def open_graded(narrow, wide, set_up):
        graded = create_graded(source, RunnerConfig(device="cpu"), narrow, wide)
        set_up(graded)
        return graded

    context = DrafterContext(
        vocab_size=source.tokenizer.vocab_size,
        max_context=runner.info.max_context,
        open_self=lambda p: target(source, p),
        open_graded=open_graded,
        target=runner,
        tokenizer=source.tokenizer,
    )
    drafter = registry.create(kind, dict(OPTIONS.get(kind, {})), context)
    costs = CostTable([1, 9], [1], [[1e-3, 1.2e-3]])
    engine = Engine(
        runner,
        costs=costs,
        controller=controllers.create("fixed", costs, {"num_draft": 4}),
        drafters=[drafter],
        tokenizer=source.tokenizer,
    )
    for prompt in PROMPTS:
        drafted = engine.generate(prompt, ANSWER)
        assert drafted.token_ids == engine.generate(prompt, ANSWER, plain=True).token_ids
        assert drafted.num_drafted > 0
        if (kind, precision) in COPIES:
            assert drafted.block_efficiency is not None
            assert drafted.block_efficiency > 2

"""Small models whose sizes the CUDA kernels accept, shared by the tests of that backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting.model import ModelDrafter
from paceline.engine import Engine
from paceline.execution.base import Segment, SequenceHandle
from paceline.execution.cuda.runner import CudaRunner
from unit.execution.toy_sources import CONFIGS, EXTRA_CONFIGS, ToySource, random_tokens

_SMALL = {"initializer_range": 0.1, "max_position_embeddings": 1024, "tie_word_embeddings": False}
_GROUP_OF_3 = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64}

EXTRA_CONFIGS["cuda_llama"] = {**CONFIGS["llama"], **_SMALL, **_GROUP_OF_3}
EXTRA_CONFIGS["cuda_qwen2"] = {**CONFIGS["qwen2"], **_SMALL, "hidden_size": 128, "head_dim": 128}
EXTRA_CONFIGS["cuda_gemma"] = {**CONFIGS["gemma"], **_SMALL, "hidden_size": 128, "num_attention_heads": 2, "head_dim": 256} | {
    "num_key_value_heads": 1
}
EXTRA_CONFIGS["cuda_mistral"] = {**CONFIGS["mistral"], **_SMALL, **_GROUP_OF_3, "sliding_window": 100}
MODELS = ("cuda_llama", "cuda_qwen2", "cuda_gemma", "cuda_mistral")
"""Heads of 64, 128 and 256; groups of 1 to 3; biases; a sliding window."""


@lru_cache
def runner(name: str, precision: str = "bf16", device: str = "cpu") -> CudaRunner:
    return CudaRunner(ToySource(name), precision, device, memory_bytes=4 << 30)


def logits_after(
    run: CudaRunner, prefix: Sequence[int], tokens: Sequence[int], parents: Sequence[int] | None = None
) -> torch.Tensor:
    """Rows of a segment behind a committed prefix, on the CPU."""
    sequence = run.open()
    commit(run, sequence, prefix)
    rows = run.forward([Segment(sequence, tokens, parents)]).logits.cpu().clone()
    run.close(sequence)
    return rows


def commit(run: CudaRunner, sequence: SequenceHandle, tokens: Sequence[int]) -> None:
    """Feed and commit a chain, without logits."""
    if tokens:
        run.forward([Segment(sequence, tokens, num_logits=0)])
        run.accept(sequence, range(len(tokens)))


def check_texts(target: CudaRunner, draft: CudaRunner, params: SamplingParams, num_draft: int) -> None:
    """A batch with a draft, and each sequence alone with one, must say what it says alone without one."""
    costs = CostTable([1, 8], [64], [[1.0, 1.1]])
    controller = controllers.create("fixed", costs, {"num_draft": num_draft})
    engine = Engine(target, costs=costs, controller=controller, drafters=[ModelDrafter(draft)])
    prompts = [random_tokens(20 + 9 * i, i) for i in range(5)]
    made = engine.generate(prompts, params)
    assert sum(result.num_accepted for result in made) > 0
    for prompt, result in zip(prompts, made, strict=True):
        plain, drafted = engine.generate(prompt, params, plain=True), engine.generate(prompt, params)
        assert plain.num_drafted == 0
        assert result.token_ids == drafted.token_ids == plain.token_ids


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())

"""The lean block gives the logits of transformers' definition, for every structure that it claims."""

import pytest
import torch

from paceline.errors import ModelError
from paceline.execution.base import Segment
from paceline.execution.hf import HFRunner
from paceline.execution.lean import LeanRunner
from unit.execution.toy_sources import CONFIGS, ToySource, feed, random_tokens, stock_logits

CLAIMED = sorted(set(CONFIGS) - {"phi", "gpt_neox"})
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TREE = (-1, 0, 0, 1, 1, 2, 3)


@pytest.mark.parametrize("name", CLAIMED)
def test_chain_tree_and_rollback_equal_the_hf_definition(name):
    """One ragged forward with a chain and a tree, then an accepted branch, then a batch again."""
    lean, reference = LeanRunner(ToySource(name)), HFRunner(ToySource(name))
    outs = []
    for runner in (lean, reference):
        first, second = runner.open(), runner.open()
        logits = [feed(runner, first, random_tokens(9)).logits, feed(runner, second, random_tokens(4, seed=1)).logits]
        nodes = random_tokens(len(TREE), seed=2)
        segments = [Segment(first, nodes, parents=TREE), Segment(second, nodes[:3], num_logits=1)]
        logits.append(runner.forward(segments).logits.clone())
        runner.accept(first, [0, 1, 3])
        runner.accept(second, [0, 1])
        logits.append(runner.forward([Segment(second, [3, 4]), Segment(first, [5])]).logits.clone())
        outs.append(torch.cat(logits))
    torch.testing.assert_close(outs[0], outs[1], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_hidden_states_equal_the_hf_definition(name):
    tokens = random_tokens(6)
    hidden = []
    for runner in (LeanRunner(ToySource(name)), HFRunner(ToySource(name))):
        hidden.append(runner.forward([Segment(runner.open(), tokens, num_logits=3)], want_hidden=True).hidden)
    torch.testing.assert_close(hidden[0], hidden[1], **CLOSE)


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.05), ("int8", 0.1), ("int4", 0.5)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_coarser_precisions_stay_near(name, precision, error):
    tokens = random_tokens(12)
    runner = LeanRunner(ToySource(name), precision)
    logits = feed(runner, runner.open(), tokens).logits
    expected = stock_logits(name, tokens)
    assert (logits - expected).norm() < error * expected.norm()
    assert logits.dtype == torch.float32


def test_report_names_paths_and_bytes():
    info = LeanRunner(ToySource("llama"), "fp32", max_context=50).info
    assert (info.backend, info.precision, info.max_context) == ("lean", "fp32", 50)
    per_layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64
    assert info.weight_bytes == 4 * (2 * per_layer + 97 * 32)
    assert info.fast_paths == ("plain",)


def test_other_structures_are_refused_with_the_way_out():
    with pytest.raises(ModelError, match=r"gpt_neox.*backend = 'hf'"):
        LeanRunner(ToySource("gpt_neox"))
    assert "fp8" in LeanRunner.unsupported_reason(ToySource("llama"), "fp8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_on_cuda_as_on_cpu(precision):
    tokens, nodes = random_tokens(9), random_tokens(len(TREE), seed=2)
    outs = []
    for device in ("cpu", "cuda"):
        runner = LeanRunner(ToySource("gemma3"), precision, device)
        sequence = runner.open()
        feed(runner, sequence, tokens)
        outs.append(runner.forward([Segment(sequence, nodes, parents=TREE)]).logits.cpu().clone())
    error = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.05, "int4": 0.1}[precision]
    assert (outs[0] - outs[1]).norm() < error * outs[0].norm()

"""transformers' definitions with our cache and attention give the logits of the model's own forward."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paceline.errors import ModelError, OptionError, ResourceError
from paceline.execution.base import Segment, prefill
from paceline.execution.hf import HFRunner, unsupported_reason
from unit.execution.toy_sources import CONFIGS, ToySource, feed, random_tokens, stock_logits, stock_model

EXACT = {"rtol": 1e-4, "atol": 5e-5}
"""Sums over other numbers of rows go in another order, which shows more where vectors are narrow."""
TREE = (-1, 0, 0, 1, 1, 2, 3)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def runner(name):
    return HFRunner(ToySource(name))


def paths(parents):
    for node in range(len(parents)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        yield node, path


def test_chain_in_pieces_equals_stock_forward(runner, name):
    tokens = random_tokens(23)
    sequence = runner.open()
    pieces = [feed(runner, sequence, part).logits for part in (tokens[:9], tokens[9:10], tokens[10:14], tokens[14:])]
    torch.testing.assert_close(torch.cat(pieces), stock_logits(name, tokens), **EXACT)


def test_tree_logits_equal_sequential_logits_of_each_path(runner, name):
    prompt, nodes = random_tokens(9), random_tokens(len(TREE), seed=1)
    sequence = runner.open()
    feed(runner, sequence, prompt)
    tree = runner.forward([Segment(sequence, nodes, parents=TREE)]).logits
    for node, path in paths(TREE):
        expected = stock_logits(name, prompt + [nodes[i] for i in path])[-1]
        torch.testing.assert_close(tree[node], expected, **EXACT)


def test_ragged_batch_equals_single_sequences(runner):
    prompts = [random_tokens(n, seed=n) for n in (11, 3, 7)]
    nodes = random_tokens(len(TREE), seed=5)
    sequences = [runner.open() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        prefill(runner, sequence, prompt, chunk=4)

    def segments():
        return [
            Segment(sequences[0], nodes, parents=TREE),
            Segment(sequences[1], nodes[:1]),
            Segment(sequences[2], nodes[:4], num_logits=2),
        ]

    singles = [runner.forward([s]).logits.clone() for s in segments()]
    together = runner.forward(segments()).logits
    assert together.shape[0] == len(TREE) + 1 + 2
    torch.testing.assert_close(together, torch.cat(singles), **EXACT)


def test_continuing_after_a_rollback_equals_a_fresh_run(runner, name):
    prompt, nodes, rest = random_tokens(8), random_tokens(len(TREE), seed=2), random_tokens(4, seed=3)
    sequence = runner.open()
    feed(runner, sequence, prompt)
    runner.forward([Segment(sequence, nodes, parents=TREE)])
    runner.accept(sequence, [0, 2, 5])
    runner.truncate(sequence, len(prompt) + 2)
    continued = feed(runner, sequence, rest).logits
    expected = stock_logits(name, [*prompt, nodes[0], nodes[2], *rest])
    torch.testing.assert_close(continued, expected[-len(rest) :], **EXACT)


def test_hidden_states_are_those_before_the_head():
    runner = HFRunner(ToySource("llama"))
    tokens = random_tokens(5)
    out = runner.forward([Segment(runner.open(), tokens, num_logits=2)], want_hidden=True)
    assert out.hidden.shape == (2, 32)
    torch.testing.assert_close(out.hidden @ stock_model("llama").lm_head.weight.detach().T, out.logits, **EXACT)


def test_no_logits_are_computed_when_none_are_asked_for():
    runner = HFRunner(ToySource("llama"))
    assert runner.forward([Segment(runner.open(), random_tokens(5), num_logits=0)]).logits.shape == (0, 97)


def test_bf16_stays_near_fp32():
    tokens = random_tokens(12)
    runner = HFRunner(ToySource("llama"), "bf16")
    logits = runner.forward([Segment(runner.open(), tokens)]).logits
    expected = stock_logits("llama", tokens)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_fork_continues_without_touching_its_origin():
    runner = HFRunner(ToySource("mistral"))
    tokens = random_tokens(10)
    sequence = runner.open()
    feed(runner, sequence, tokens)
    copy = runner.fork(sequence)
    feed(runner, copy, [5, 6, 7])
    torch.testing.assert_close(feed(runner, sequence, [9]).logits[-1], stock_logits("mistral", [*tokens, 9])[-1], **EXACT)
    torch.testing.assert_close(feed(runner, copy, [8]).logits[-1], stock_logits("mistral", [*tokens, 5, 6, 7, 8])[-1], **EXACT)


def test_context_limit_is_a_resource_error_that_names_both_lengths():
    runner = HFRunner(ToySource("llama"), max_context=10)
    sequence = runner.open()
    feed(runner, sequence, random_tokens(8))
    with pytest.raises(ResourceError, match=r"8 \+ 3 new tokens: the limit is 10"):
        runner.forward([Segment(sequence, [1, 2, 3])])
    assert feed(runner, sequence, [1, 2]).logits.shape[0] == 2


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"tokens": []}, "at least one token"),
        ({"tokens": [1, 97]}, "97 is outside the vocabulary"),
        ({"tokens": [1, -1]}, "-1 is outside the vocabulary"),
        ({"tokens": [1, 2], "parents": [-1]}, "1 given for 2"),
        ({"tokens": [1, 2], "parents": [-1, 1]}, r"parents\[1\] = 1"),
        ({"tokens": [1, 2], "num_logits": 3}, "num_logits = 3"),
    ],
)
def test_malformed_segments_are_refused(segment, message):
    runner = HFRunner(ToySource("llama"))
    with pytest.raises(OptionError, match=message):
        runner.forward([Segment(runner.open(), **segment)])


def test_a_sequence_twice_in_a_forward_and_a_closed_one_are_refused():
    runner = HFRunner(ToySource("llama"))
    sequence = runner.open()
    with pytest.raises(OptionError, match="only once"):
        runner.forward([Segment(sequence, [1]), Segment(sequence, [2])])
    runner.close(sequence)
    with pytest.raises(OptionError, match="closed"):
        runner.forward([Segment(sequence, [1])])


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 97}, "attention interface"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 97}, "linear_attention"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(kind, settings, reason):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    assert reason in unsupported_reason(model)


def test_a_model_whose_attention_has_sinks_is_refused():
    class WithSinks(ToySource):
        def hf_model(self, dtype, device):
            model = super().hf_model(dtype, device)
            attention = model.model.layers[0].self_attn
            forward = attention.forward
            attention.forward = lambda *a, **k: forward(*a, s_aux=torch.zeros(4), **k)
            return model

    with pytest.raises(ModelError, match="s_aux"):
        HFRunner(WithSinks("llama"))


def test_precision_without_a_torch_type_is_refused():
    with pytest.raises(ModelError, match="int8"):
        HFRunner(ToySource("llama"), "int8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_on_cuda_as_on_cpu(name):
    runner = HFRunner(ToySource(name), device="cuda")
    prompt, nodes = random_tokens(9), random_tokens(len(TREE), seed=1)
    sequence = runner.open()
    feed(runner, sequence, prompt)
    tree = runner.forward([Segment(sequence, nodes, parents=TREE)]).logits.cpu()
    for node, path in paths(TREE):
        torch.testing.assert_close(tree[node], stock_logits(name, prompt + [nodes[i] for i in path])[-1], rtol=1e-3, atol=1e-3)

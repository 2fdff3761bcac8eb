"""The compiled kernels against the stock model, and against themselves in other batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import compiled
from paceline.errors import OptionError, ResourceError
from paceline.execution.base import ForwardOutput, Segment, prefill
from paceline.execution.native import binding, build
from paceline.execution.native.pack import gate_up_order, pack_blocks, pack_float, quantise, unpack
from paceline.execution.native.runner import MAX_ROWS, NativeRunner
from unit.execution.toy_sources import CONFIGS, EXTRA_CONFIGS, ToySource, stock_model

ARCHITECTURES = ("llama", "llama_linear", "qwen2", "qwen2_sliding", "qwen3", "mistral", "gemma", "gemma3")
PRECISIONS = ("fp32", "bf16", "int8", "int4")
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.08, "int4": 0.9}
"""Relative to the norm of the logits; random weights of large scale make rounding look worse than trained ones do."""

WIDE = {"llama_64": 64, "qwen2_sliding_32": 32, "qwen3_160": 160}
"""Heads of a multiple of 32, which go through the matrix unit where the processor has one, and their dimensions."""

for _name in ARCHITECTURES:  # the kernels want heads of a multiple of 16
    EXTRA_CONFIGS[f"native_{_name}"] = {**CONFIGS[_name], "head_dim": 16, "max_position_embeddings": 4 * MAX_ROWS}
for _name, _dim in WIDE.items():
    EXTRA_CONFIGS[f"native_{_name}"] = {**EXTRA_CONFIGS[f"native_{_name.rpartition('_')[0]}"], "head_dim": _dim}

pytestmark = pytest.mark.skipif(isinstance(build.load_library(), str), reason=str(build.load_library()))


@lru_cache
def runner(name: str, precision: str = "fp32", threads: int = 2) -> NativeRunner:
    return NativeRunner(ToySource(f"native_{name}"), precision, threads=threads)


def ids(count: int, seed: int = 1) -> list[int]:
    return [random.Random(seed + i).randrange(97) for i in range(count)]


def logits_of(run: NativeRunner, tokens: list[int]) -> torch.Tensor:
    sequence = run.open()
    out = run.forward([Segment(sequence, tokens)]).logits.clone()
    run.close(sequence)
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [*ARCHITECTURES, *WIDE])
def test_logits_are_those_of_the_stock_model(name: str, precision: str) -> None:
    tokens = ids(40)
    with torch.no_grad():
        want = stock_model(f"native_{name}")(torch.tensor([tokens])).logits[0]
    got = logits_of(runner(name, precision), tokens)
    assert (got - want).norm() / want.norm() < TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", *WIDE])
def test_a_row_has_the_same_bits_alone_in_a_chain_and_in_a_tree(name: str, precision: str) -> None:
    run, tokens = runner(name, precision), ids(30)
    whole = logits_of(run, tokens)
    alone, sequence = [], run.open()
    for token in tokens:
        alone.append(run.forward([Segment(sequence, [token])]).logits[0].clone())
        run.accept(sequence, [0])
    assert torch.equal(torch.stack(alone), whole)

    tree = run.open()
    prefill(run, tree, tokens[:20])
    left, right = tokens[20:25], [3, 5, 8]
    mixed = [left[0], left[1], right[0], left[2], right[1], left[3], right[2], left[4]]
    out = run.forward([Segment(tree, mixed, parents=[-1, 0, 0, 1, 2, 3, 4, 5])]).logits
    assert torch.equal(out[[0, 1, 3, 5, 7]], whole[20:25])
    run.accept(tree, [0, 1, 3, 5, 7])
    assert torch.equal(run.forward([Segment(tree, tokens[25:])]).logits, whole[25:])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "qwen2_sliding", *WIDE])
@pytest.mark.parametrize("prefix", [90, 119, 126, 127, 128, 255])
def test_a_tree_across_a_chunk_of_the_cache_has_the_bits_of_its_paths(name: str, precision: str, prefix: int) -> None:
    run, tokens = runner(name, precision), ids(prefix + 12)
    other = [*tokens[: prefix + 1], *ids(11, seed=50)]
    paths = [logits_of(run, path)[prefix:] for path in (tokens, other)]
    tree = run.open()
    prefill(run, tree, tokens[:prefix])
    mixed, parents = [tokens[prefix]], [-1]
    for depth in range(1, 12):  # branches take turns: the left one lies in rows 0, 1, 3, 5, ..., the right one in 0, 2, 4, ...
        mixed += [tokens[prefix + depth], other[prefix + depth]]
        parents += [max(0, 2 * depth - 3), max(0, 2 * depth - 2)]
    out = run.forward([Segment(tree, mixed, parents=parents)]).logits
    assert torch.equal(out[[0, *range(1, 23, 2)]], paths[0])
    assert torch.equal(out[[0, *range(2, 23, 2)]], paths[1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_end_of_a_prompt_goes_in_small_passes_where_rows_save_no_time_together(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tokens, passes = runner("llama", precision), ids(101), []
    forward = run.forward

    def counting(segments: Sequence[Segment]) -> ForwardOutput:
        passes.append(len(segments[0].tokens))
        return forward(segments)

    monkeypatch.setattr(run, "forward", counting)
    sequence = run.open()
    prefill(run, sequence, tokens[:-1])
    assert passes == ([52, *[8] * 6] if precision in ("int4", "int8") else [100])
    last = forward([Segment(sequence, tokens[-1:])]).logits[0].clone()
    assert torch.equal(last, logits_of(run, tokens)[-1])


@pytest.mark.parametrize("name", ["llama", "llama_64"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_many_sequences_of_several_chunks_have_the_bits_that_each_has_alone(name: str, precision: str) -> None:
    """Few queries share their chunks out among the threads; many do not."""
    run, segments, want = runner(name, precision), [], []
    for i in range(12):
        tokens = ids(100 + 40 * i, seed=1000 * i)
        want.append(logits_of(run, tokens)[-3:])
        sequence = run.open()
        prefill(run, sequence, tokens[:-3])
        alone = run.forward([Segment(sequence, tokens[-3:])]).logits.clone()
        assert torch.equal(alone, want[-1])
        segments.append(Segment(sequence, tokens[-3:]))
    assert torch.equal(run.forward(segments).logits, torch.cat(want))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=4),
    st.sampled_from([("llama", "fp32"), ("llama", "int4"), ("llama_64", "int4")]),
)
def test_a_ragged_batch_gives_each_row_the_bits_it_has_alone(shapes: list[tuple[int, int]], model: tuple[str, str]) -> None:
    run = runner(*model)
    segments, want = [], []
    for i, (prefix, new) in enumerate(shapes):
        tokens = ids(prefix + new, seed=100 * i)
        want.append(logits_of(run, tokens)[prefix:])
        sequence = run.open()
        prefill(run, sequence, tokens[:prefix])
        segments.append(Segment(sequence, tokens[prefix:]))
    assert torch.equal(run.forward(segments).logits, torch.cat(want))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_after_any_history_the_next_logits_equal_those_of_a_fresh_cache(data: st.DataObject) -> None:
    run = runner("qwen3", "int8")
    sequence, kept = run.open(), []
    for step in range(data.draw(st.integers(1, 6))):
        size = data.draw(st.integers(1, 8))
        parents = [-1] + [data.draw(st.integers(0, i - 1)) for i in range(1, size)]
        tokens = ids(size, seed=7 * step)
        run.forward([Segment(sequence, tokens, parents=parents)])
        node, path = data.draw(st.integers(0, size - 1)), []
        while node >= 0:
            path.append(node)
            node = parents[node]
        run.accept(sequence, path[::-1])
        kept += [tokens[i] for i in path[::-1]]
        if data.draw(st.booleans()):
            kept = kept[: data.draw(st.integers(0, len(kept)))]
            run.truncate(sequence, len(kept))
    out = run.forward([Segment(sequence, [11, 12])]).logits.clone()
    assert torch.equal(out, logits_of(run, [*kept, 11, 12])[-2:])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits_while_their_shares_shift(name: str, threads: int) -> None:
    """Shares follow the speed of each thread from pass to pass; few rows and many are prepared in different ways."""
    alone, shared = runner(name, "int4", 1), runner(name, "int4", threads)
    for rows in (1, 2, 8, 9, 50) * 3:
        assert torch.equal(logits_of(alone, ids(rows)), logits_of(shared, ids(rows)))


@pytest.mark.parametrize("length", [1, 440, 449, 1000])
def test_caches_have_room_for_whole_blocks_that_the_matrix_unit_reads(length: int) -> None:
    run = runner("llama_64", "bf16")
    sequence = run.open()
    prefill(run, sequence, ids(length))
    assert sequence.capacity % 32 == 0
    assert run.gather(sequence, torch.arange(length)).capacity % 32 == 0


def test_a_prompt_longer_than_one_call_equals_its_pieces() -> None:
    run = runner("llama", "int8")
    tokens = ids(MAX_ROWS + 37)
    sequence, pieces = run.open(), []
    for start in range(0, len(tokens), 100):
        part = tokens[start : start + 100]
        pieces.append(run.forward([Segment(sequence, part)]).logits.clone())
        run.accept(sequence, range(len(part)))
    assert torch.equal(logits_of(run, tokens), torch.cat(pieces))


def test_only_the_rows_asked_for_come_back() -> None:
    run, tokens = runner("llama"), ids(10)
    first, second = run.open(), run.open()
    segments = [Segment(first, tokens, num_logits=2), Segment(second, tokens, num_logits=0)]
    out = run.forward(segments, want_hidden=True)
    assert torch.equal(out.logits, logits_of(run, tokens)[-2:])
    assert out.hidden is not None
    assert out.hidden.shape == (2, 32)
    assert torch.allclose(out.hidden @ stock_model("native_llama").model.embed_tokens.weight.T, out.logits, atol=1e-4)


def test_leaving_after_a_layer_equals_a_model_of_that_many_layers() -> None:
    run, tokens = runner("llama"), ids(12)
    sequence = run.open()
    early = run.forward_part([Segment(sequence, tokens)], layers=1).logits.clone()
    model = stock_model("native_llama")
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[1][0]
        want = model.lm_head(model.model.norm(states))
    assert torch.allclose(early, want, atol=1e-4)


def test_the_best_token_of_each_row_is_the_lowest_of_its_largest_logits() -> None:
    for threads in (1, 2, 5):
        run = runner("qwen2", "bf16", threads)
        out = run.forward([Segment(run.open(), ids(30))])
        assert out.best == out.logits.argmax(-1).tolist()


def test_a_row_that_is_not_finite_has_no_best_token() -> None:
    source = ToySource("native_mistral")
    broken = dict(source.tensors())
    broken["model.norm.weight"] = torch.full_like(broken["model.norm.weight"], float("nan"))
    source.tensors = lambda: broken  # type: ignore[method-assign]
    run = NativeRunner(source, "fp32")
    assert run.forward([Segment(run.open(), [3, 4])]).best == [-1, -1]


def test_a_fork_goes_its_own_way() -> None:
    run, tokens = runner("llama"), ids(20)
    sequence = run.open()
    prefill(run, sequence, tokens)
    copy = run.fork(sequence)
    run.forward([Segment(sequence, [1, 2, 3])])
    run.accept(sequence, [0, 1, 2])
    assert torch.equal(run.forward([Segment(copy, [9])]).logits, logits_of(run, [*tokens, 9])[-1:])


def test_a_sequence_beyond_the_context_is_refused() -> None:
    run = NativeRunner(ToySource("native_llama"), "fp32", max_context=32)
    sequence = run.open()
    with pytest.raises(ResourceError, match="max_context = 32"):
        prefill(run, sequence, ids(200))


def test_a_tree_over_64_tokens_is_refused() -> None:
    run = runner("llama")
    with pytest.raises(OptionError, match="at most 64"):
        run.forward([Segment(run.open(), ids(65), parents=[-1, *range(64)])])


@pytest.mark.parametrize("kind", [binding.FP32, binding.BF16, binding.Q8, binding.Q4])
def test_packing_loses_nothing_but_the_stated_rounding(kind: int) -> None:
    weight = torch.randn(37, 96)
    if kind == binding.FP32:
        assert torch.equal(unpack(pack_float(weight, kind)), weight)
    elif kind == binding.BF16:
        assert torch.equal(unpack(pack_float(weight, kind)), weight.bfloat16().float())
    else:
        blocks = quantise(weight, 4 if kind == binding.Q4 else 8)
        exact = blocks.scales[..., None] * blocks.quants.reshape(37, 3, 32) + blocks.offsets[..., None]
        assert np.allclose(unpack(pack_blocks(blocks)).numpy(), exact.reshape(37, 96), atol=1e-6)
        assert (unpack(pack_blocks(blocks)) - weight).abs().max() < (0.25 if kind == binding.Q4 else 0.02)


def test_gate_and_up_rows_lie_side_by_side_in_groups() -> None:
    order = gate_up_order(64).tolist()
    assert order == [*range(32), *range(64, 96), *range(32, 64), *range(96, 128)]


def test_structures_that_the_kernels_lack_are_named() -> None:
    assert "phi" in str(NativeRunner.unsupported_reason(ToySource("phi"), "fp32"))
    assert "bias" in str(NativeRunner.unsupported_reason(ToySource("llama3"), "fp32"))
    assert NativeRunner.unsupported_reason(ToySource("native_llama"), "int4") is None


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find_compiler", lambda: None)
    build.load_library.cache_clear()
    try:
        assert "install gcc" in str(build.load_library())
    finally:
        monkeypatch.undo()
        build.load_library.cache_clear()


def test_a_compiler_that_fails_is_reported_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "find_compiler", lambda: ["false"])
    build.load_library.cache_clear()
    try:
        assert "false refused the kernels" in str(build.load_library())
    finally:
        monkeypatch.undo()
        build.load_library.cache_clear()

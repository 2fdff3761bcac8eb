"""Copies that hold a part of the cache, against the stock model with the other rows masked."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import OptionError
from paceline.execution.base import Runner, Segment, prefill
from paceline.execution.hf import HFRunner
from paceline.execution.lean import LeanRunner
from paceline.execution.native import build
from paceline.execution.native.runner import NativeRunner
from unit.execution.toy_sources import CONFIGS, EXTRA_CONFIGS, ToySource, random_tokens, stock_model

NAMES = ("llama", "qwen3", "gemma3", "qwen2_sliding")
for _name in NAMES:
    EXTRA_CONFIGS[f"gather_{_name}"] = {**CONFIGS[_name], "head_dim": 16}
COMPILED = pytest.mark.skipif(isinstance(build.load_library(), str), reason=str(build.load_library()))
MAKERS: dict[str, Callable[[ToySource], Runner]] = {
    "hf": HFRunner,
    "lean": LeanRunner,
    "native": lambda source: NativeRunner(source, "fp32", threads=1),
}
BACKENDS = ["hf", "lean", pytest.param("native", marks=COMPILED)]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PROMPT, NEW = random_tokens(24), random_tokens(5, seed=3)
LENGTH = len(PROMPT)


@lru_cache
def runner(backend: str, name: str) -> Runner:
    return MAKERS[backend](ToySource(f"gather_{name}"))


def windows_of(name: str) -> list[int | None]:
    config = stock_model(f"gather_{name}").config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def masked_logits(name: str, rows: torch.Tensor) -> torch.Tensor:
    """[len(NEW), V] of the stock model whose new tokens see only these prompt rows ([K], or [kv heads, K] in every layer)."""
    total = LENGTH + len(NEW)
    model = stock_model(f"gather_{name}")
    heads = model.config.num_attention_heads
    per_head = rows.expand(2, -1).repeat_interleave(heads // 2, dim=0)
    causal = torch.ones(total, total, dtype=torch.bool).tril()

    def mask(chosen: torch.Tensor, window: int | None) -> torch.Tensor:
        seen = causal.repeat(heads, 1, 1)
        for head in range(heads):
            dropped = torch.ones(LENGTH, dtype=torch.bool)
            dropped[chosen[head]] = False
            seen[head, LENGTH:, :LENGTH] &= ~dropped
        if window is not None:
            seen &= causal.triu(1 - window)
        return torch.zeros(1, heads, total, total).masked_fill(~seen, torch.finfo(torch.float32).min)

    last = torch.arange(LENGTH - rows.shape[-1], LENGTH).expand(heads, -1)
    windows = windows_of(name)
    window = next((w for w in windows if w is not None), None)
    masks = {"full_attention": mask(per_head, None), "sliding_attention": mask(last, window)}
    with torch.no_grad():
        given_mask = masks if window is not None else masks["full_attention"]
        return model(torch.tensor([[*PROMPT, *NEW]]), attention_mask=given_mask, use_cache=False).logits[0, LENGTH:]


def prompted(run: Runner):
    sequence = run.open()
    prefill(run, sequence, PROMPT)
    return sequence


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_of_some_rows_equals_the_model_with_the_others_masked(backend: str, name: str) -> None:
    run, rows = runner(backend, name), torch.tensor([0, 1, 5, 6, 11, 12, 19, 22, 23])
    copy = run.gather(prompted(run), rows)
    assert copy.length == len(rows)
    out = run.forward([Segment(copy, NEW[:2])]).logits.clone()
    run.accept(copy, [0, 1])
    out = torch.cat([out, run.forward([Segment(copy, NEW[2:])]).logits])
    torch.testing.assert_close(out, masked_logits(name, rows), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2_sliding"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_head_may_keep_rows_of_its_own(backend: str, name: str) -> None:
    run, rows = runner(backend, name), torch.tensor([[0, 2, 3, 9, 23], [1, 2, 14, 15, 22]])
    copy = run.gather(prompted(run), rows.expand(run.info.num_layers, -1, -1))
    torch.testing.assert_close(run.forward([Segment(copy, NEW)]).logits, masked_logits(name, rows), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_that_follows_equals_one_gathered_later(backend: str, name: str) -> None:
    run, kept = runner(backend, name), torch.tensor([0, 3, 4, 21, 22, 23])
    whole = prompted(run)
    copy = run.gather(whole, kept)
    run.forward([Segment(copy, [9, 9, 9])])  # a draft, part of it kept for a while
    run.accept(copy, [0, 1])
    run.truncate(copy, len(kept))
    run.forward([Segment(whole, NEW[:3])])
    run.accept(whole, [0, 1, 2])
    run.follow(copy, whole)
    later = run.gather(whole, torch.cat([kept, torch.arange(LENGTH, LENGTH + 3)]))
    # Rows that a window no longer shows may differ between both, what is seen of them does not.
    logits = [run.forward([Segment(c, NEW[3:])]).logits.clone() for c in (copy, later)]
    assert copy.length == later.length == len(kept) + 3
    assert torch.equal(*logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_of_a_copy_and_a_tree_in_it_keep_their_positions(backend: str) -> None:
    run = runner(backend, "llama")
    whole = prompted(run)
    nested = run.gather(run.gather(whole, torch.arange(2, LENGTH)), torch.tensor([0, 4, 10, 21]))
    direct = run.gather(whole, torch.tensor([2, 6, 12, 23]))
    logits = [run.forward([Segment(copy, NEW, parents=[-1, 0, 0, 1, 2])]).logits.clone() for copy in (nested, direct)]
    assert torch.equal(*logits)
    chain = run.forward([Segment(direct, [NEW[0], NEW[2], NEW[4]])]).logits
    torch.testing.assert_close(logits[0][[0, 2, 4]], chain, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_mass_is_that_of_the_stock_model(backend: str, name: str) -> None:
    run, queries = runner(backend, name), 7
    sequence = prompted(run)
    before = run.forward([Segment(sequence, NEW)]).logits.clone()
    mass = run.attention_mass(sequence, PROMPT[-queries:])
    with torch.no_grad():
        layers = stock_model(f"gather_{name}")(torch.tensor([PROMPT]), use_cache=False, output_attentions=True).attentions
    expected = torch.stack([a[0, :, -queries:].sum(1).unflatten(0, (2, -1)).sum(1) for a in layers])
    torch.testing.assert_close(mass, expected, rtol=1e-3, atol=1e-4)
    assert sequence.length == LENGTH
    assert torch.equal(run.forward([Segment(sequence, NEW)]).logits, before)


@COMPILED
def test_mass_does_not_depend_on_the_number_of_threads() -> None:
    mass = []
    for threads in (1, 2):
        run = NativeRunner(ToySource("gather_llama"), "int8", threads=threads)
        mass.append(run.attention_mass(prompted(run), PROMPT[-9:]))
    assert torch.equal(*mass)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_are_the_same_in_every_backend(backend: str) -> None:
    want = runner("hf", "qwen3")
    got = runner(backend, "qwen3")
    keys = [run.read_keys(prompted(run), 1) for run in (want, got)]
    assert keys[0].shape == (2, LENGTH, 16)
    torch.testing.assert_close(keys[0], keys[1], **CLOSE)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, LENGTH - 1), min_size=1))
def test_any_selection_equals_the_masked_model(chosen: set[int]) -> None:
    rows = torch.tensor(sorted(chosen))
    run = runner("lean", "llama")
    copy = run.gather(prompted(run), rows)
    torch.testing.assert_close(run.forward([Segment(copy, NEW)]).logits, masked_logits("llama", rows), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([3, 3]), "must increase"),
        (torch.tensor([0, LENGTH]), "0 .. 23"),
        (torch.tensor([-1, 0]), "0 .. 23"),
        (torch.zeros(3, 2, 1, dtype=torch.int64), "shape"),
        (torch.tensor([0.0]), "int64"),
    ],
)
def test_rows_that_are_not_there_are_refused(backend: str, rows: torch.Tensor, message: str) -> None:
    run = runner(backend, "llama")
    with pytest.raises(OptionError, match=message):
        run.gather(prompted(run), rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_ahead_of_its_origin_is_refused(backend: str) -> None:
    run = runner(backend, "llama")
    sequence = prompted(run)
    copy = run.gather(sequence, torch.tensor([0, 1]))
    run.forward([Segment(copy, [1])])
    run.accept(copy, [0])
    with pytest.raises(OptionError, match="truncate the copy"):
        run.follow(copy, sequence)

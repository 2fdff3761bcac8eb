"""The kernels as other processors compile them: AVX2, and vector extensions alone, the readable reference of the others."""

from __future__ import annotations

import ctypes
import random
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from paceline import compiled
from paceline.execution.base import Segment, prefill
from paceline.execution.draws import NUMBER_BITS, DrawLaw
from paceline.execution.native import binding, build
from paceline.execution.native import runner as native_runner
from paceline.execution.native.drawing import Drawer
from paceline.execution.native.runner import VECTORS, NativeRunner
from paceline.study.environment import machine
from unit.execution import test_native_draws
from unit.execution.test_native import ids, logits_of, runner
from unit.execution.toy_sources import ToySource

PROCESSORS = {"x86-64": 4, "x86-64-v3": 8}
"""What to compile for, and the lanes of its vectors."""
DISTANCE = {"fp32": 1e-5, "bf16": 0.01, "int8": 0.01, "int4": 0.01}
"""Between the logits of two processors, relative: sums have another order, and a rounded activation may fall to its neighbour."""

pytestmark = [
    pytest.mark.skipif(isinstance(build.load_library(), str), reason=str(build.load_library())),
    pytest.mark.skipif("avx2" not in machine()["instruction_sets"], reason="needs a processor with AVX2"),
]


@lru_cache
def compiled_for(processor: str) -> ctypes.CDLL:
    flags = tuple(f"-march={processor}" if flag.startswith("-march=") else flag for flag in build.KERNELS.flags)
    library = compiled.load(replace(build.KERNELS, flags=flags))
    assert not isinstance(library, str), library
    binding.declare(library)
    return library


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setattr(native_runner, "load_library", lambda: compiled_for(name))
    return name


@pytest.mark.parametrize("precision", DISTANCE)
@pytest.mark.parametrize("name", ["llama_64", "gemma3"])
def test_kernels_of_every_width_agree(processor: str, name: str, precision: str) -> None:
    run, tokens = NativeRunner(ToySource(f"native_{name}"), precision, threads=2), ids(150)
    assert VECTORS[PROCESSORS[processor]] in run.info.fast_paths
    got, want = logits_of(run, tokens), logits_of(runner(name, precision), tokens)
    assert (got - want).norm() / want.norm() < DISTANCE[precision]


@pytest.mark.parametrize("precision", DISTANCE)
def test_a_row_of_every_width_has_the_same_bits_alone_in_a_chain_and_in_a_tree(processor: str, precision: str) -> None:
    run, tokens = NativeRunner(ToySource("native_llama_64"), precision, threads=2), ids(135)
    whole, tree = logits_of(run, tokens), run.open()
    prefill(run, tree, tokens[:124])
    parents = [-1, 0, 0, 1, 2, 3, 4, 5, 6]  # two branches that take turns
    mixed = [tokens[124], *(token for pair in zip(tokens[125:129], ids(4, seed=50), strict=True) for token in pair)]
    out = run.forward([Segment(tree, mixed, parents=parents)]).logits
    assert torch.equal(out[[0, 1, 3, 5, 7]], whole[124:129])
    run.accept(tree, [0, 1, 3, 5, 7])
    alone = []
    for token in tokens[129:]:
        alone.append(run.forward([Segment(tree, [token])]).logits[0].clone())
        run.accept(tree, [0])
    assert torch.equal(torch.stack(alone), whole[129:])


@pytest.mark.parametrize("law", [DrawLaw(1.0), DrawLaw(0.8, top_k=50), DrawLaw(1.2, top_p=0.95), DrawLaw(1.0, min_p=0.05)])
def test_draws_of_every_width_are_those_of_the_readable_form(processor: str, law: DrawLaw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_native_draws, "drawer", lambda vocab: Drawer(compiled_for(processor), vocab))
    numbers = [random.Random(1).randrange(1 << NUMBER_BITS) for _ in range(20)]
    for vocab in (7, 97, 4_099):
        test_native_draws.check(test_native_draws.row_of(vocab, 5, 0, 0.1), law, numbers)

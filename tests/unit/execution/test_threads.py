"""Torch's threads while rounds run: as few as the target's kernels ask for, and the caller's own between rounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.engine import Engine
from paceline.execution.threads import torch_threads
from toys import ToyRunner, random_language


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_are_given_back_even_after_an_error() -> None:
    inside = []

    def fail() -> None:
        with torch_threads(1):
            inside.append(torch.get_num_threads())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert inside == [1]
    assert torch.get_num_threads() == 2
    with torch_threads(None):
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_round_runs_with_the_threads_that_its_runner_asks_for_and_the_caller_keeps_its_own() -> None:
    seen: list[int] = []

    class Watched(ToyRunner):
        host_threads = 1

        def accept(self, sequence, rows):  # type: ignore[no-untyped-def]
            seen.append(torch.get_num_threads())
            super().accept(sequence, rows)

    costs = CostTable(rows=[1, 8], contexts=[8], verify=[[1.0, 1.0]])
    engine = Engine(Watched(random_language(8), 8), costs=costs, controller=controllers.create("fixed", costs))
    for event in engine.stream([1, 2, 3], SamplingParams(max_tokens=8)):
        assert torch.get_num_threads() == 2, event
    assert seen[-1] == 1

"""Contestants of one comparison: they share a target and read each prompt once.

`hold` answers all prompts by all contestants, in rotating order, as often as wished; each repeat begins anew, so that nothing
which a drafter or a controller remembers from an earlier repeat helps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from paceline.config import SamplingParams
from paceline.control.base import Controller
from paceline.drafting.base import Drafter
from paceline.engine import Engine
from paceline.execution.base import Runner, SequenceHandle, prefill
from paceline.records import GenerationResult
from paceline.study.bench import Sample, run
from paceline.study.prompts import BenchPrompt

_WARM_UP_TOKENS = 16


class ReadOnce:
    """A runner whose sequences begin with a prompt that was read before: a fork of it, instead of one more pass.

    For an engine's own sequences only: drafters keep the runner itself.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._prompt: list[int] = []
        self._sequence: SequenceHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def read(self, prompt_ids: Sequence[int]) -> None:
        """Sequences opened from now on hold this prompt but for its last token."""
        prompt = list(prompt_ids)
        if self._sequence is not None and prompt == self._prompt:
            return
        if self._sequence is not None:
            self._runner.close(self._sequence)
        self._prompt, self._sequence = prompt, self._runner.open()
        prefill(self._runner, self._sequence, prompt[:-1])

    def open(self) -> SequenceHandle:
        return self._runner.open() if self._sequence is None else self._runner.fork(self._sequence)


@dataclass(slots=True)
class Contestant:
    """One way to decide or to draft; a bench method."""

    name: str
    engine: Engine
    controller: Controller
    shared: ReadOnce
    plain: bool = False

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, task: str) -> GenerationResult:
        """Answer one prompt with this contestant's controller and the engine's drafters."""
        self.engine.controller = self.controller
        with self._prompt_read(prompt_ids):
            return self.engine.generate(list(prompt_ids), params, plain=self.plain, task=task)

    @contextmanager
    def _prompt_read(self, prompt_ids: Sequence[int]) -> Iterator[None]:
        """Heads must see the target's states of the prompt, so their engines read it themselves."""
        if any(drafter.wants_hidden for drafter in self.engine.drafters):
            yield
            return
        runner: Any = self.engine.runner
        self.shared.read(prompt_ids)
        self.engine.runner = self.shared  # type: ignore[assignment]
        try:
            yield
        finally:
            self.engine.runner = runner


def remembers(drafter: Drafter) -> bool:
    """Whether a drafter keeps texts of earlier requests."""
    return type(drafter).finish_request is not Drafter.finish_request


def hold(
    make: Callable[[], Sequence[Contestant]],
    prompts: Sequence[tuple[BenchPrompt, Sequence[int]]],
    params: SamplingParams,
    *,
    warm_up: Sequence[int],
    repeats: int,
    label: str,
    keep: Callable[[Sample], None],
) -> None:
    """Answer every prompt by every contestant, `repeats` times, with fresh contestants each time; `keep` gets each answer.

    warm_up: token ids that each contestant answers shortly before; none of the prompts, for drafters that remember would know it.
    Shows how far it is and how long it will take.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(f"{label}: making ready", total=None)

        def show(method: str, prompt: BenchPrompt) -> None:
            progress.update(bar, description=f"{label}, {prompt.category}: {method}")

        for _ in range(repeats):
            contestants = make()
            progress.update(bar, total=repeats * len(contestants) * len(prompts))
            short = replace(params, max_tokens=min(_WARM_UP_TOKENS, params.max_tokens), min_tokens=0)
            for contestant in contestants:
                contestant.generate(warm_up, short, "")
            for sample in run(contestants, prompts, params, on_start=show):
                keep(sample)
                progress.advance(bar)


def answered_by_all(samples: Sequence[Sample]) -> list[Sample]:
    """Without the prompts that an interruption kept from some of the methods; all samples when there are no others."""
    methods = {sample.method for sample in samples}
    answered: dict[int, set[str]] = {}
    for sample in samples:
        answered.setdefault(sample.prompt, set()).add(sample.method)
    return [s for s in samples if answered[s.prompt] == methods] or list(samples)

"""The engine: plan, draft, verify, accept, commit, observe, until every text has ended.

`Engine.from_pretrained` puts the parts together (see `assembly`); `_round` is the loop that all of them meet in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, overload

from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.control.base import Controller
from paceline.costs import CostTable
from paceline.drafting.base import Drafter, DraftJob
from paceline.errors import ModelError, OptionError
from paceline.execution.base import ForwardOutput, Runner, prefill
from paceline.execution.threads import torch_threads
from paceline.models.base import ModelSource, Tokenizer
from paceline.models.cachedir import write_json_atomic
from paceline.records import GenerationResult, Round, StepRecord
from paceline.request import Request, StreamEvent, check_prompt
from paceline.sampling import resolve_seed

__all__ = ["Engine", "StreamEvent"]

Prompt = str | Sequence[int]
MAX_BATCH = 32
"""Sequences that are decoded together; more prompts wait their turn."""


class Engine:
    """A target, its drafters and a controller. One caller at a time; not thread-safe."""

    def __init__(
        self,
        runner: Runner,
        *,
        costs: CostTable,
        controller: Controller,
        drafters: Sequence[Drafter] = (),
        tokenizer: Tokenizer | None = None,
        source: ModelSource | None = None,
        speculation: SpeculationConfig | None = None,
        profile: Path | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """profile: file that `close` writes what the controller learnt to."""
        self.runner = runner
        self.costs = costs
        self.controller = controller
        self.drafters = list(drafters)
        self.source = source
        self.speculation = speculation or SpeculationConfig()
        self.notes = tuple(notes)
        self._profile = profile
        self._tokenizer = tokenizer
        self._ids = count()
        self._finished: list[tuple[Request, Callable[[], StepRecord]]] = []
        """Of the last round, until somebody asks: each sequence's record in the making."""
        self._answered = 0.0
        """When the last verification was known."""
        self._learning = 0.0
        """Seconds that it took to learn from the last round: the coming one pays for them."""

    @classmethod
    def from_pretrained(
        cls,
        model: str = "default",
        *,
        draft: str | None = None,
        controller: str | None = None,
        precision: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        max_context: int | None = None,
        runner: RunnerConfig | None = None,
        speculation: SpeculationConfig | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Engine:
        """Load a model (folder, hub name, GGUF file or `default`), measure what its steps cost here, and set up drafting.

        The single settings override those of `runner` and `speculation`. Raises ModelError, OptionError, CacheError.
        """
        from paceline.assembly import assemble

        given: dict[str, Any] = {"precision": precision, "device": device, "threads": threads, "max_context": max_context}
        chosen: dict[str, Any] = {"draft": draft, "controller": controller}
        return assemble(
            cls,
            model,
            replace(runner or RunnerConfig(), **{k: v for k, v in given.items() if v is not None}),
            replace(speculation or SpeculationConfig(), **{k: v for k, v in chosen.items() if v is not None}),
            progress,
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ModelError when the engine was made without one."""
        if self._tokenizer is None:
            raise ModelError("this engine has no tokenizer: give prompts as token ids")
        return self._tokenizer

    # ---------- calls ----------

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, params: SamplingParams | None = None, *, plain: bool = False, task: str = ""
    ) -> GenerationResult: ...

    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, *, plain: bool = False, task: str = ""
    ) -> list[GenerationResult]: ...

    def generate(
        self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *, plain: bool = False, task: str = ""
    ) -> GenerationResult | list[GenerationResult]:
        """Generate for one prompt (text or token ids) or several at once.

        plain: no speculation in this call. task: tag of similar requests that share what the controller learns.
        Returns one result for one prompt with n = 1, else a list: prompt by prompt, n results each.
        Raises PromptError, OptionError, ResourceError.
        """
        params = params or SamplingParams()
        one = isinstance(prompt, str) or len(prompt) == 0 or isinstance(prompt[0], int)
        prompts: Sequence[Prompt] = [prompt] if one else prompt  # type: ignore[list-item,assignment]
        encoded = [self._encode(p, params) for p in prompts]
        if one and params.n == 1:
            return self._generate_batch([(encoded[0], params)], plain, task)[0]
        jobs = [
            (ids, params if params.seed is None else replace(params, seed=params.seed + i))
            for ids in encoded
            for i in range(params.n)
        ]
        results: list[GenerationResult] = []
        for first in range(0, len(jobs), MAX_BATCH):
            results += self._generate_batch(jobs[first : first + MAX_BATCH], plain, task)
        return results

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, plain: bool = False, task: str = ""
    ) -> Iterator[StreamEvent]:
        """Generate for one prompt, an event a round; the last event carries the result. Checks its input before the first event.

        Close the iterator to stop early. Raises as `generate` does.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise OptionError(f"n = {params.n}: a stream carries one sample; use generate, or n = 1")
        return self._stream(self._encode(prompt, params), params, plain, task)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        plain: bool = False,
        task: str = "",
    ) -> GenerationResult | list[GenerationResult]:
        """Answer a conversation of `{"role": ..., "content": ...}` messages with the model's own chat template."""
        return self.generate(self._chat_ids(messages), params, plain=plain, task=task)

    def chat_stream(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        plain: bool = False,
        task: str = "",
    ) -> Iterator[StreamEvent]:
        """`chat`, an event a round."""
        return self.stream(self._chat_ids(messages), params, plain=plain, task=task)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a conversation."""
        return self.tokenizer.render_chat(messages)

    def close(self) -> None:
        """End worker threads, give memory back, and keep the controller's profile if asked to. Raises CacheError."""
        learnt = self.controller.snapshot() if self._profile is not None else None
        try:
            if self._profile is not None and learnt is not None:
                write_json_atomic(self._profile, learnt)
        finally:
            shutdown = getattr(self.runner, "shutdown", None)
            if shutdown is not None:
                shutdown()

    # ---------- the loop ----------

    def _round(self, requests: Sequence[Request], controller: Controller) -> None:
        """One draft-and-verify cycle of every request, in one forward of the target. Its lessons wait for `_learn`."""
        if not self._learns_later(requests, controller):
            self._learn(controller)
        started, prepared = perf_counter() - self._learning, self._warmup_seconds()
        steps, rows = self._draft(requests, controller)
        drafted = perf_counter()
        output, waited = self._forward(requests, steps, controller)
        verify_seconds = perf_counter() - drafted - waited

        first, outcomes = 0, []
        for request, step in zip(requests, steps, strict=True):
            verdict = request.verify(step.draft, output, first)
            outcomes.append((verdict, request.commit(step, verdict, self.runner, output, first)))
            first += step.rows
        ended = perf_counter()
        for request in requests:
            if request.finish_reason is not None:  # else it waits until somebody asks, or the device works by itself
                request.assemble_text()
        batch = (len(requests), rows, sum(kept for _, kept in outcomes))
        warmup = self._warmup_seconds() - prepared  # done once: plain decoding has its own
        for request, step, (verdict, kept) in zip(requests, steps, outcomes, strict=True):
            request.ended = perf_counter()
            record = partial(request.record, step, verdict, kept, verify_seconds, ended - started - warmup, batch, warmup > 0.0)
            self._finished.append((request, record))

    def _forward(self, requests: Sequence[Request], steps: Sequence[Round], controller: Controller) -> tuple[ForwardOutput, float]:
        """The forward over pending tokens and drafts, and the seconds in it that belong to drafting: late tokens are waited for.

        What nobody waits for is done while a device works by itself: text, and lessons of the last round.
        """
        taps = next((request.taps for request in requests if request.taps), ())
        waited = 0.0 if self.runner.takes_late and not taps else _settle(steps)
        segments = [request.segment(step.draft) for request, step in zip(requests, steps, strict=True)]
        for step, segment in zip(steps, segments, strict=True):
            step.rows = len(segment.tokens)
        if taps:
            return self.runner.forward_tapped(segments, taps), waited
        result = self.runner.begin_forward(segments)
        waited += _settle(steps) if self.runner.takes_late else 0.0
        if self.runner.works_apart:
            for request in requests:
                request.assemble_text()
            self._learn(controller)
            self._learning = 0.0
        output = result()
        self._answered = perf_counter()
        return output, waited

    def _learns_later(self, requests: Sequence[Request], controller: Controller) -> bool:
        """Whether the last round can wait until the device works on the coming one: a batch's, which takes a while, where the
        controller allows it; else if that one is plain already, and grants nobody time that the bank would have to know of."""
        if not self.runner.works_apart:
            return False
        if len(requests) > 1 and controller.learns_late:
            return True
        return all(not r.sessions or controller.plan_unseen(r.task, len(requests)) is not None for r in requests)

    def _learn(self, controller: Controller) -> None:
        """Write the records of the last round and show them to the controller, once.

        Rounds of plain calls are none of its own: they must not pay for its losses.
        """
        finished, self._finished = self._finished, []
        for request, record in finished:
            request.steps.append(record())
        if not finished or not finished[0][0].sessions:
            return
        started = perf_counter()
        for request, _ in finished:
            controller.observe(request.steps[-1])
        self._learning += perf_counter() - started

    def _draft(self, requests: Sequence[Request], controller: Controller) -> tuple[list[Round], int]:
        """Plans and drafts of a round, and the rows of its forward. Drafters that can draft for all sequences at once do so, and
        may leave last tokens late."""
        steps = self._plan(requests, controller)
        waiting: dict[str, list[tuple[Round, DraftJob]]] = {}
        drafting = 0.0
        together = {d.name: d for d in self.drafters if d.drafts_together}
        for request, step in zip(requests, steps, strict=True):
            job, name = request.job(step, controller), step.plan.drafter or ""
            if job is not None and name in together:
                waiting.setdefault(name, []).append((step, job))
            elif job is not None:
                started = perf_counter()
                step.draft = job.session.propose(job.num_tokens, job.keep_drafting)
                step.draft_seconds += (seconds := perf_counter() - started)
                drafting += seconds
        for name, joined in waiting.items():
            runner, started = together[name].verifier, perf_counter()
            followed = runner.followed if runner is not None else 0
            drafts = together[name].propose_together([job for _, job in joined])
            if runner is not None and runner.followed > followed:  # its first steps ran behind the last verification
                started = self._answered
            drafting += (seconds := perf_counter() - started)
            for (step, _), draft in zip(joined, drafts, strict=True):
                step.draft = draft
                step.draft_seconds += seconds
        for step in steps:
            step.batch_draft_seconds = drafting
        return steps, sum(len(step.draft) + 1 for step in steps)

    def _plan(self, requests: Sequence[Request], controller: Controller) -> list[Round]:
        """What the controller decides for the coming round of every request, from what their drafters could do."""
        looks = [request.look(controller, self.speculation.max_draft_tokens, len(requests)) for request in requests]
        seconds = self._learning
        if asked := [(step, context) for step, context in looks if context is not None]:
            started = perf_counter()
            plans = controller.plan_batch([context for _, context in asked])
            seconds += perf_counter() - started
            for (step, context), plan in zip(asked, plans, strict=True):
                step.plan = plan
                for outlook in context.outlooks if plan.drafter is not None else ():
                    if outlook.drafter == plan.drafter:
                        step.signal = outlook.signal
        self._learning = 0.0
        for step, _ in looks:
            step.control_seconds += seconds / len(requests)
        return [step for step, _ in looks]

    def _warmup_seconds(self) -> float:
        return self.runner.warmup_seconds + sum(drafter.warmup_seconds for drafter in self.drafters)

    def _stream(self, prompt: list[int], params: SamplingParams, plain: bool, task: str) -> Iterator[StreamEvent]:
        with self._open([(prompt, params)], plain, task) as (request,):
            while request.finish_reason is None:
                with torch_threads(self.runner.host_threads):
                    self._round([request], self.controller)
                self._learn(self.controller)
                event = request.event()
                if request.finish_reason is None:
                    yield event
            yield replace(event, result=self._result(request))

    def _generate_batch(self, jobs: Sequence[tuple[list[int], SamplingParams]], plain: bool, task: str) -> list[GenerationResult]:
        with self._open(jobs, plain, task) as requests:
            with torch_threads(self.runner.host_threads):
                while active := [r for r in requests if r.finish_reason is None]:
                    self._round(active, self.controller)
            self._learn(self.controller)
            return [self._result(r) for r in requests]

    @contextmanager
    def _open(self, jobs: Sequence[tuple[list[int], SamplingParams]], plain: bool, task: str) -> Iterator[list[Request]]:
        """Requests with their prompts in the cache, closed again whatever happens."""
        requests: list[Request] = []
        self._learning = 0.0
        self._finished.clear()
        drafters = () if plain else self.drafters
        shared = not any(drafter.wants_hidden for drafter in drafters)  # a head must see the states of its own prompt
        try:
            for i, (prompt, params) in enumerate(jobs):
                started = perf_counter()
                if shared and i and jobs[i - 1][0] is prompt:  # another sample of the same prompt
                    sequence = self.runner.fork(requests[-1].sequence)
                else:
                    sequence = self.runner.open()
                request = Request(
                    next(self._ids),
                    prompt,
                    params,
                    resolve_seed(params.seed),
                    sequence=sequence,
                    drafters=drafters,
                    tokenizer=self._tokenizer,
                    max_context=self.runner.info.max_context,
                    rule=self.speculation.rule,
                    task=task,
                    draws_rows=self.runner.draws_rows,
                    logits_are_far=self.runner.logits_are_far,
                    cold_rounds=self.runner.cold_rounds,
                )
                requests.append(request)
                request.started = started
                prefill(self.runner, sequence, prompt[sequence.length : -1], taps=request.taps, listen=request.follow)
            for request in requests:
                request.decode_started = request.ended = perf_counter()
            yield requests
        finally:
            for request in requests:
                request.close(self.runner, self.controller)

    def _result(self, request: Request) -> GenerationResult:
        return request.result(self.costs.plain_step_during(request.steps), self.notes)

    # ---------- input ----------

    def _chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.tokenizer.encode(self.render_chat(messages), add_special=False)

    def _encode(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """Token ids of a prompt that is there and fits."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt) if prompt.strip() else []
        else:
            ids = list(prompt)
        check_prompt(ids, self.runner.info, params)
        return ids


def _settle(steps: Sequence[Round]) -> float:
    """Wait for late tokens; returns the seconds that it took, which belong to drafting."""
    waiting = [step for step in steps if step.draft.late is not None]
    waits: dict[str | None, float] = {}
    for step in waiting:
        late, step.draft = step.draft.late, step.draft.settled()
        waits[step.plan.drafter] = late.waited if late is not None else 0.0
    total = sum(waits.values())
    for step in steps if waiting else ():
        step.draft_seconds += waits.get(step.plan.drafter, 0.0)
        step.batch_draft_seconds += total
    return total

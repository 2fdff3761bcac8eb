"""One sequence on its way through the engine: what it holds, and how a round of its own is drafted, verified and committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from paceline.config import SamplingParams
from paceline.control.base import Controller, RoundContext
from paceline.drafting.base import Drafter, DraftJob, DraftSession, SequenceView
from paceline.errors import PromptError
from paceline.execution.base import ForwardOutput, Runner, RunnerInfo, Segment, SequenceHandle
from paceline.execution.draws import AHEAD, DrawLaw, Draws
from paceline.models.base import Tokenizer
from paceline.output import OutputAssembler
from paceline.records import PLAIN, Draft, DraftFeatures, GenerationResult, Round, StepRecord, TokenLogprob, Verdict
from paceline.sampling import CounterRandom, Purpose, SampledRows, check_token_ids, draw_temperature
from paceline.verification.registry import AUTO, choose_rule, create
from paceline.verification.walk import follow

_HOTTEST = 2.0
"""Temperatures up to here are told apart, in tenths: what a controller learns of requests of one says little about another."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """What one round added to a text; the last event carries the result."""

    text: str
    token_ids: tuple[int, ...] = ()
    from_draft: tuple[bool, ...] = ()
    record: StepRecord | None = None
    seed: int = 0
    """Of the answer's draws, for those who break it off and get no result."""
    result: GenerationResult | None = None


def check_prompt(ids: Sequence[int], info: RunnerInfo, params: SamplingParams) -> None:
    """Raises PromptError for a prompt that is empty, strange to the model or too long for it, OptionError as `check_token_ids`."""
    if not ids:
        raise PromptError("prompt is empty: give some text, or at least one token id")
    if min(ids) < 0 or max(ids) >= info.vocab_size:
        raise PromptError(f"prompt: token ids must be between 0 and {info.vocab_size - 1}; got {min(ids)} to {max(ids)}")
    if len(ids) >= info.max_context:
        over = len(ids) - info.max_context + 1
        raise PromptError(
            f"prompt is {len(ids)} tokens long and the context holds {info.max_context}, answer included: "
            f"at most {info.max_context - 1} fit, shorten it by {over} or more"
        )
    check_token_ids(params, info.vocab_size)


class Request:
    """Invariant between rounds: the cache holds all tokens but the last one, which is *pending*."""

    def __init__(
        self,
        request_id: int,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        *,
        sequence: SequenceHandle,
        drafters: Sequence[Drafter],
        tokenizer: Tokenizer | None,
        max_context: int,
        rule: str = AUTO,
        task: str = "",
        draws_rows: bool = False,
        logits_are_far: bool = False,
        cold_rounds: int = 1,
    ) -> None:
        """draws_rows, logits_are_far, cold_rounds: as in the target's runner (`Runner.draws_rows`)."""
        self.id = request_id
        self.tokens = list(prompt)
        self.num_prompt = len(self.tokens)
        self.params = params
        self.sequence = sequence
        self.task = task if params.greedy else f"{task}@{min(params.temperature, _HOTTEST):.1f}"
        end_ids = frozenset(tokenizer.end_ids) if tokenizer is not None else frozenset()
        self._stop_ids = (frozenset() if params.ignore_eos else end_ids) | set(params.stop_token_ids)
        self._rule = rule
        self._vocab_size = tokenizer.vocab_size if tokenizer is not None else None
        self._random = CounterRandom(seed)
        self._numbers: list[int] = []
        """Of the target's draws at the positions behind the prompt."""
        self._max_context = max_context
        self._cold_rounds = cold_rounds
        max_new = min(params.max_tokens, max_context - self.num_prompt)
        self._output = OutputAssembler(tokenizer, params, self.num_prompt, max_new, end_ids)
        # Where the runner draws, draws are matched unless a ratio test would accept more and has the distributions at hand. On
        # drafts that are chosen it would not: the drawn token is a drafted one with just its probability, on chains and trees.
        drawn = draws_rows and (logits_are_far or not any(drafter.samples for drafter in drafters))
        self._matches = rule == "match" or (rule == AUTO and (params.seed is not None or drawn))
        self._logits_are_far = logits_are_far
        self._draws_rows = draws_rows and self._matches and not (params.greedy or params.shapes_logits or params.min_tokens)
        view = SequenceView(
            request_id,
            self.tokens,
            self.num_prompt,
            params,
            seed,
            self._stop_ids,
            coupled=self._matches,
            sequence=sequence,
        )
        self._law = DrawLaw(draw_temperature(params), params.top_k, params.top_p, params.min_p, self._vocab_size or 1 << 30)
        greedily = params.greedy and (rule == AUTO or create(rule).lossless) and not params.shapes_logits and not params.min_tokens
        self._padded: bool | None = None
        self._is_told = (greedily or self._draws_rows) and params.logprobs is None
        """Whether the runner's own choice of a token is the rule's."""
        self.sessions: dict[str, DraftSession] = {d.name: d.open(view) for d in drafters}
        self._wanting = {d.name for d in drafters if d.wants_logits}
        self.taps = tuple(sorted({layer for d in drafters for layer in d.wants_hidden}))
        """Layers of the target whose states some drafter wants, as in `Runner.forward_tapped`."""
        self._columns = {d.name: [self.taps.index(layer) for layer in d.wants_hidden] for d in drafters if d.wants_hidden}
        self._drafters = list(drafters)
        self.finish_reason: str | None = None
        self.steps: list[StepRecord] = []
        self.from_draft: list[bool] = []
        self.logprobs: list[TokenLogprob] = []
        self.started = self.decode_started = self.ended = perf_counter()

    @property
    def seed(self) -> int:
        """Of its draws: the caller's, or one from the operating system."""
        return self._random.seed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    # ---------- plan and draft ----------

    def look(self, controller: Controller, max_draft: int, batch_size: int) -> tuple[Round, RoundContext | None]:
        """The coming round as far as nobody need be asked: plain. And what a controller should know to decide otherwise, unless
        there is nothing to decide."""
        length = len(self.tokens)
        remaining = min(self.params.max_tokens - self.num_generated, self._max_context - length)
        limit = min(max_draft, remaining - 1)
        if limit < 1 or not self.sessions:
            return Round(PLAIN, length), None
        started = perf_counter()
        if (unseen := controller.plan_unseen(self.task, batch_size)) is not None:
            return Round(unseen, length, control_seconds=perf_counter() - started), None
        outlooks = tuple(session.outlook(limit) for session in self.sessions.values())
        context = RoundContext(self.id, length, limit, outlooks, batch_size, self.task, remaining)
        return Round(PLAIN, length, draft_seconds=perf_counter() - started), context

    def job(self, step: Round, controller: Controller) -> DraftJob | None:
        """What the chosen drafter is to propose, if one was chosen."""
        if step.plan.drafter is None or step.plan.num_draft == 0:
            return None

        def keep_drafting(features: DraftFeatures) -> bool:
            started = perf_counter()
            more = controller.keep_drafting(self.id, features)
            seconds = perf_counter() - started
            step.control_seconds += seconds
            step.draft_seconds -= seconds  # of which it is a part by the clock
            return more

        return DraftJob(self.sessions[step.plan.drafter], step.plan.num_draft, keep_drafting)

    def segment(self, draft: Draft) -> Segment:
        """The pending token and the draft behind it, as one run of new tokens."""
        tokens = (self.tokens[-1], *draft.tokens)
        parents = None if draft.parents is None else (-1, *(parent + 1 for parent in draft.parents))
        return Segment(self.sequence, tokens, parents, draws=self._draws(draft) if self._draws_rows else None, late=draft.late)

    def _draws(self, draft: Draft) -> Draws:
        """A draw from each row, with the number of the row's own position."""
        rows = len(draft) + 1
        bits = self._bits(rows + AHEAD)
        if draft.parents is None:
            return Draws(self._law, bits[:rows], bits[rows:])
        depths = [0]
        for parent in draft.parents:
            depths.append(depths[parent + 1] + 1)
        return Draws(self._law, [bits[depth] for depth in depths])

    def _bits(self, count: int) -> list[int]:
        """Random numbers of the coming positions, each of which is computed once."""
        first = self.num_generated
        while len(self._numbers) < first + count:
            self._numbers.append(self._random.bits(self.num_prompt + len(self._numbers), Purpose.TARGET))
        return self._numbers[first : first + count]

    # ---------- verify and commit ----------

    def verify(self, draft: Draft, output: ForwardOutput, first: int) -> Verdict:
        """Judge the draft. first: its row of the forward that belongs to the pending token; those of the draft follow."""
        end = first + len(draft) + 1
        chosen = self._chosen(draft, output, first, end)
        if chosen is not None and (told := follow(draft, chosen)) is not None:
            return told
        best, drawn = output.best, output.drawn
        whole = best is not None and len(best) == end - first  # slicing takes torch long where its code is in no cache
        logits = output.logits if whole else output.logits[first:end]
        mass = output.mass if self._draws_rows else None
        rows = SampledRows(
            logits,
            self.params,
            self.tokens,
            self.num_prompt,
            draft,
            end_ids=self._stop_ids,
            vocab_size=self._vocab_size if self._is_padded(output) else None,
            argmaxes=None if best is None or self._is_padded(output) else best[first:end],
            drawn=drawn[first:end] if drawn is not None and self._draws_rows else None,
            mass=None if mass is None else lambda row, tokens: mass(first + row, tokens),
        )
        chosen_rule = choose_rule(self._rule, self.params, draft, seeded=self._matches)
        verdict = chosen_rule.verify(rows, draft, self._random, len(self.tokens))
        if self.params.logprobs is not None:
            top = self.params.logprobs
            self.logprobs.extend(rows.logprob(row, token, top) for row, token in zip(verdict.rows, verdict.emitted, strict=True))
        return verdict

    def _chosen(self, draft: Draft, output: ForwardOutput, first: int, end: int) -> Sequence[int] | None:
        """The target's token at each row, where the runner named it and no distribution is asked for: the usual case. On a GPU
        sixteen sequences would wait for one another's rules."""
        if not self._is_told:
            return None
        if self._draws_rows:
            # A chosen draft's exact chances would tell a little more, but fetching each of them takes a share of a round.
            tokens = output.drawn if draft.coupled or not draft.tokens or self._logits_are_far else None
        else:
            tokens = output.best if not self._is_padded(output) else None
        return tokens[first:end] if tokens is not None else None

    def _is_padded(self, output: ForwardOutput) -> bool:
        """Whether rows have places beyond the vocabulary."""
        if self._padded is None:  # the same in all rounds, and torch takes long to tell
            self._padded = self._vocab_size is not None and self._vocab_size < output.logits.shape[1]
        return self._padded

    def follow(self, hidden: torch.Tensor) -> None:
        """Hand the target's states of tokens that entered its cache to the drafters that want them. hidden: [rows, taps, H]."""
        for name, columns in self._columns.items():
            self.sessions[name].follow(hidden[:, columns])

    def commit(self, step: Round, verdict: Verdict, runner: Runner, output: ForwardOutput, first: int) -> int:
        """Keep what was accepted, in cache and drafters, and returns how many tokens stayed. Their text waits for
        `assemble_text`, unless it may end the request.

        first: as in `verify`.
        """
        kept = self._output.add(verdict.emitted)
        path = verdict.rows
        runner.accept(self.sequence, path)
        self.tokens.extend(verdict.emitted[:kept])
        self.from_draft.extend([True] * min(kept, len(verdict.path)) + [False] * (kept > len(verdict.path)))
        del self.logprobs[self.num_generated :]
        self.finish_reason = self._output.finished
        if output.taps is not None:
            self.follow(output.taps[[first + row for row in path]])
        for name, session in self.sessions.items():
            own = verdict if step.draft.drafter == name and step.draft.tokens else None
            rows = None
            if name in self._wanting:
                rows = output.logits[first : first + len(step.draft) + 1]
                rows = rows if own is not None or step.draft.parents is None else rows[list(path)]
            session.observe(own, rows)
        return kept

    def assemble_text(self) -> None:
        """Make the text of what was committed."""
        self._output.assemble()

    def event(self) -> StreamEvent:
        """What the last round added; call it after each."""
        record = self.steps[-1]
        start = len(self.from_draft) - record.num_emitted
        new = tuple(self.tokens[self.num_prompt + start :])
        return StreamEvent("".join(self._output.release()), new, tuple(self.from_draft[start:]), record, self.seed)

    def record(
        self,
        step: Round,
        verdict: Verdict,
        kept: int,
        verify_seconds: float,
        round_seconds: float,
        batch: tuple[int, int, int],
        warmup: bool = False,
    ) -> StepRecord:
        """The finished round as a record, which belongs into `steps`.

        batch: sequences, rows and emitted tokens of the whole batched round.

        warmup: its times hold what is done once only.
        """
        return step.record(
            self.id,
            verdict,
            kept,
            verify_seconds=verify_seconds,
            round_seconds=round_seconds,
            batch=batch,
            warmup=warmup or len(self.steps) < self._cold_rounds,
            task=self.task,
        )

    # ---------- the end ----------

    def close(self, runner: Runner, controller: Controller) -> None:
        """Give back cache and drafts; drafters that learn across requests see the text."""
        for session in self.sessions.values():
            session.close()
        for drafter in self._drafters:
            drafter.finish_request(self.tokens, self.num_prompt)
        controller.finish(self.id)
        runner.close(self.sequence)

    def result(self, plain_seconds: float | None, notes: tuple[str, ...] = ()) -> GenerationResult:
        """What there is so far; `interrupted` when no end was reached."""
        self._output.flush()
        return GenerationResult(
            text=self._output.text,
            token_ids=tuple(self.tokens[self.num_prompt :]),
            finish_reason=self.finish_reason or "interrupted",
            num_prompt_tokens=self.num_prompt,
            seconds=self.ended - self.started,
            prefill_seconds=self.decode_started - self.started,
            decode_seconds=self.ended - self.decode_started,
            steps=tuple(self.steps),
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
            from_draft=tuple(self.from_draft),
            stop_reason=self._output.stop_reason,
            seed=self.seed,
            plain_seconds_per_token=plain_seconds,
            notes=notes,
            draft_bytes=sum(session.memory_bytes() for session in self.sessions.values()),
        )

"""One level of a hierarchy of drafters: a model that verifies what a lower drafter proposes, and so emits its own text sooner.

A level is the engine's loop in small: plan, draft, verify, accept, observe. Its rules are those of the target's rounds, so whatever
drafts below, each emitted token is distributed exactly as the level's model says, given the tokens before it. That also holds given
how long the round has gone on so far: a lossless rule gives the right law to every prefix, so it gives it to the next token of
those rounds that reach it. Hence the row is a valid q for the level above. (A replacement that is drawn from the model's whole
distribution instead of the residual breaks this.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from paceline.control.base import Controller, RoundContext
from paceline.drafting.base import Drafter, DraftSession, Reviewer, SequenceView
from paceline.drafting.choice import evidence
from paceline.execution.base import Segment, prefill
from paceline.records import PLAIN, Draft, Round, Verdict
from paceline.sampling import CounterRandom, SampledRows
from paceline.verification.registry import AUTO, choose_rule

_FEW = 4
"""Tokens that the cache may lack and that ride along with a round; more are fed in a pass of their own, before the clock starts."""


@dataclass(frozen=True, slots=True)
class Emitted:
    """A token of a level's text."""

    token: int
    probs: torch.Tensor
    """[V] float32: what it was drawn from; greedy: the distribution at temperature 1, as evidence."""
    max_prob: float
    token_prob: float
    entropy: float
    """Nats."""
    margin: float


class Level:
    """A level's text and cache of one sequence.

    Between rounds the reviewer's cache lacks at least the text's last token, which is pending. The text runs ahead of the committed
    one while a draft is being made, and is taken back to what was committed before the next one.
    """

    def __init__(self, reviewer: Reviewer, lower: Drafter, controller: Controller, max_draft: int, above: SequenceView) -> None:
        """above: the sequence as the level above has it; max_draft: most tokens that the lower drafter is asked for at once."""
        self._reviewer = reviewer
        self._runner = reviewer.runner
        self._lower = lower
        self._controller = controller
        self._max_draft = max_draft
        self.view = SequenceView(
            above.request_id,
            list(above.tokens),
            above.num_prompt,
            reviewer.sampling,
            above.seed,
            above.end_ids,
            above.coupled,
        )
        self._session: DraftSession | None = None
        self._cold = True
        self.drafted = False
        """Whether the lower drafter proposed something in the last round."""

    def follow(self, shared: int, tail: Sequence[int]) -> None:
        """Replace the text from `shared` on by what was committed above, here and below."""
        tokens = self.view.tokens
        if shared < len(tokens):
            if self._session is not None and not self._session.rewind(shared):
                self._session.close()
                self._session = None  # opened again when it is needed
            del tokens[shared:]
        tokens.extend(tail)
        if tail and self._session is not None:
            self._session.observe(None, None)
        self._reviewer.follow(shared, len(tokens))

    def advance(self, most: int) -> list[Emitted]:
        """One round: 1 to `most` tokens, behind which the text goes on. Nothing follows an end token."""
        view, reviewer = self.view, self._reviewer
        self._catch_up()
        made = Round(PLAIN, len(view.tokens))
        started = perf_counter()
        self._draft(made, most - 1)
        feed = view.tokens[reviewer.fed :]
        forward_started = perf_counter()
        logits = self._forward(feed, made.draft)
        verify_seconds = perf_counter() - forward_started
        rows = SampledRows(
            logits,
            view.sampling,
            view.tokens,
            view.num_prompt,
            made.draft,
            end_ids=view.end_ids,
            vocab_size=reviewer.vocab_size,
        )
        rule = choose_rule(AUTO, view.sampling, made.draft, seeded=view.coupled)
        verdict = rule.verify(rows, made.draft, CounterRandom(view.seed), made.context_length)
        emitted = list(self._emitted(rows, verdict))
        path = verdict.rows[: len(emitted)]
        behind = len(feed) - 1
        self._runner.accept(reviewer.cache, (*range(behind), *(behind + row for row in path)))
        reviewer.fed += behind + len(path)
        view.tokens.extend(token.token for token in emitted)
        if self._session is not None:
            self._session.observe(verdict if made.draft.tokens else None, logits if self._lower.wants_logits else None)
        seconds = perf_counter() - started
        planned = made.plan.num_draft
        record = made.record(
            view.request_id,
            verdict,
            len(emitted),
            verify_seconds=verify_seconds,
            round_seconds=seconds,
            batch=(1, behind + len(made.draft) + 1 if planned else 0, 0),
            # A plain round that had to catch up says nothing of what a plain step costs.
            warmup=self._cold or (behind > 0 and planned == 0),
        )
        self._controller.observe(record)
        self.drafted, self._cold = len(made.draft) > 0, False
        return emitted

    def close(self) -> None:
        """Give back what is held below."""
        if self._session is not None:
            self._session.close()
        self._controller.finish(self.view.request_id)

    def _catch_up(self) -> None:
        """Feed what the cache lacks, where it is too much to ride along or a lower draft works in this very cache."""
        reviewer = self._reviewer
        self.view.sequence = reviewer.cache
        missing = self.view.tokens[reviewer.fed : -1]
        if len(missing) > _FEW or (missing and self._lower.share_of_target is not None):
            prefill(self._runner, reviewer.cache, missing)
            reviewer.fed += len(missing)

    def _draft(self, made: Round, most: int) -> None:
        """Let the controller decide, and the lower drafter propose."""
        view = self.view
        limit = min(most, self._max_draft, self._runner.info.max_context - made.context_length)
        if limit < 1 or self._controller.plan_unseen("", 1) is not None:
            return
        started = perf_counter()
        if self._session is None:
            self._session = self._lower.open(view)
        outlook = self._session.outlook(limit)
        looked = perf_counter()
        plan = self._controller.plan(RoundContext(view.request_id, made.context_length, limit, (outlook,)))
        planned = perf_counter()
        if plan.num_draft > 0:
            made.plan, made.signal = plan, outlook.signal
            request, keep = view.request_id, self._controller.keep_drafting
            made.draft = self._session.propose(plan.num_draft, lambda features: keep(request, features))
        made.control_seconds = planned - looked
        made.draft_seconds = perf_counter() - started - made.control_seconds

    def _forward(self, feed: list[int], draft: Draft) -> torch.Tensor:
        """[len(draft) + 1, V or wider] float32: rows of the pending token, which ends `feed`, and of the draft."""
        behind = len(feed) - 1
        parents = None
        if draft.parents is not None:
            parents = (*range(-1, behind), *(parent + behind + 1 for parent in draft.parents))
        segment = Segment(self._reviewer.cache, (*feed, *draft.tokens), parents, num_logits=len(draft) + 1)
        logits = self._reviewer.forward(segment)
        missing = self._reviewer.vocab_size - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits

    def _emitted(self, rows: SampledRows, verdict: Verdict) -> Iterator[Emitted]:
        """The verdict's tokens up to the first end token, each with its row."""
        greedy = self.view.sampling.greedy
        for row, token in zip(verdict.rows, verdict.emitted, strict=True):
            probs = torch.softmax(rows.logits(row), dim=-1) if greedy else rows.probs(row)
            largest, second, own, entropy = evidence(probs, token)
            yield Emitted(token, probs, largest, own, entropy, largest - second)
            if token in self.view.end_ids:
                return

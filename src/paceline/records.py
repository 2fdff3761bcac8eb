"""What passes between the parts: plain records, not to be written into but for a round in the making. Imports nothing of ours,
and no torch at run time.

Vocabulary: *drafted* tokens are proposed by a draft; *accepted* ones were kept by verification; the target adds one more
token a round, *recovered* (it replaces a rejected one) or *bonus* (everything was accepted); *emitted* = accepted + 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

_Record = TypeVar("_Record")


def light(record: type[_Record]) -> type[_Record]:
    """Make a frozen dataclass quick to construct: it stays frozen for type checkers, and must not be written into.

    A frozen one sets each field through a function, which takes four times as long; several are made in every round.
    """
    known = [(f.name, f.type, field(default=f.default, default_factory=f.default_factory)) for f in fields(record)]  # type: ignore[arg-type]
    record.__init__ = make_dataclass(record.__name__, known).__init__  # type: ignore[method-assign,misc]
    del record.__setattr__, record.__delattr__
    return record


@light
@dataclass(frozen=True, slots=True)
class Outlook:
    """What a drafter could do in the coming round, known before anything is drafted.

    Everything here is a function of the committed tokens alone, so a controller may use it without bias.
    """

    drafter: str
    available: int
    """Most tokens that it would propose now (0: it has nothing to say)."""
    signal: int = 0
    """Evidence bucket, drafter-defined, larger is stronger (for n-grams: length of the matched suffix)."""
    catch_up: int = 0
    """Committed tokens that the draft's own cache still lacks; their cost is part of the round."""
    together: bool = False
    """Drafts of a batch are made in shared steps, in about the time of one."""
    ahead: int = 0
    """Tokens that are on their way already when a draft is stopped, and become part of it."""
    chances: Sequence[float] = ()
    """For drafters that know: chance of each of the tokens (or more), with all those that it follows, to be accepted; not
    increasing. Good until the drafter is asked again."""


@dataclass(frozen=True, slots=True)
class DraftFeatures:
    """Draft-side evidence on the token that was just drawn *and kept* (losslessness rule 2)."""

    position: int
    """1 for the first drafted token of the round."""
    max_prob: float
    """Largest probability of the draft distribution that the token was drawn from."""
    token_prob: float
    """Draft probability of the drawn token."""
    entropy: float
    """Entropy of that distribution, nats."""
    margin: float = 0.0
    """Largest minus second-largest probability."""


@light
@dataclass(frozen=True, slots=True)
class Plan:
    """A controller's decision for one sequence and one round."""

    drafter: str | None
    """Name of the drafter, or None for a plain step."""
    num_draft: int
    """Most tokens to draft; 0 for a plain step."""
    reason: str = ""
    """Why, in words, for `paceline explain`."""
    expected_emitted: float = 1.0
    expected_seconds: float = 0.0
    probe: bool = False
    """True when the round is run to learn, not because it is expected to pay."""
    tolerance: float | None = None
    """Divergence up to which a relaxed rule may keep a token that its strict test rejects; None: none. Lossless rules ignore it."""


@dataclass(frozen=True, slots=True)
class DecodedToken:
    """A token that a runner decoded ahead of the host, with evidence of its own distribution at temperature 1."""

    token: int
    """-1 where logits were not finite."""
    largest: float
    """Largest probability."""
    entropy: float
    """Nats."""
    margin: float
    """Largest less second-largest probability."""
    chance: float
    """Probability that this token had where it was drawn; the largest one when greedy."""


class LateToken(ABC):
    """A token that a device still decodes while the host goes on: whoever needs it waits, and forwards on that device need not."""

    waited: float = 0.0
    """Seconds that the first wait took."""

    @abstractmethod
    def wait(self) -> DecodedToken:
        """The token, once it is there."""


UNKNOWN = -1
"""Stands for a late token."""


@light
@dataclass(frozen=True, slots=True)
class Draft:
    """A proposal: a chain, or a tree with parents before children."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...] | None = None
    """Index of each token's parent in `tokens`, -1 for children of the pending token; None means a chain."""
    draft_probs: torch.Tensor | None = None
    """[N, V] float32: row i is the distribution that token i was really drawn from. None: point-mass (chosen, not drawn)."""
    confidences: tuple[float, ...] = ()
    """Per token, a prefix-only estimate in [0, 1] (largest draft probability); empty when the drafter has none."""
    drafter: str = ""
    coupled: bool = False
    """True when tokens were drawn with the target's own random numbers and their distributions were not kept: for `match` alone."""
    without_replacement: bool = False
    """True when siblings were drawn from `draft_probs` without replacement."""
    chances: tuple[float, ...] = ()
    """Per token, as `Outlook.chances` had it."""
    late: LateToken | None = None
    """The last token of a chain where it is still being decoded: `tokens` ends with UNKNOWN, and `confidences` lack it."""

    def __len__(self) -> int:
        return len(self.tokens)

    def settled(self) -> Draft:
        """The draft with its late token, for which this waits; without it where it came to nothing."""
        if self.late is None:
            return self
        last, known = self.late.wait(), self.tokens[:-1]
        if last.token < 0:
            return replace(self, tokens=known, late=None)
        return replace(self, tokens=(*known, last.token), confidences=(*self.confidences, last.largest), late=None)

    @property
    def num_levels(self) -> int:
        """Tokens on the longest path: all of a chain."""
        if self.parents is None:
            return len(self.tokens)
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        return max(depths, default=0)

    def path(self, row: int) -> list[int]:
        """Drafted tokens down to a row of the verification forward, in order. Row 0 (the pending token) has none, row i + 1 ends
        with token i.
        """
        if self.parents is None:
            return list(self.tokens[:row])
        found = []
        node = row - 1
        while node >= 0:
            found.append(self.tokens[node])
            node = self.parents[node]
        return found[::-1]


@light
@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of verification of one draft."""

    path: tuple[int, ...]
    """Indices into `Draft.tokens` that were accepted, root to leaf (a chain: 0, 1, ..., A-1)."""
    emitted: tuple[int, ...]
    """The accepted tokens and then the recovered or bonus token: len(path) + 1 tokens."""
    acceptance: tuple[float, ...] = ()
    """Exact conditional acceptance probability of each *observed* position (up to the first rejection); may be empty."""
    divergence: tuple[float, ...] = ()
    """Of rules that measure it: distance between target and draft distribution at each observed position, 0 to 1."""
    relaxed: tuple[int, ...] = ()
    """Positions (0-based, along the path) that only a relaxed test accepted; always empty for lossless rules."""

    @property
    def num_accepted(self) -> int:
        return len(self.path)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the verification forward, one for each emitted token: the pending token's, then those of the accepted ones."""
        return (0, *(node + 1 for node in self.path))


@light
@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished round of one sequence. Times are seconds of wall clock.

    In a batch, `verify_seconds` and `round_seconds` are those of the whole batched round.
    """

    request_id: int
    drafter: str | None
    num_planned: int
    num_drafted: int
    num_accepted: int
    num_emitted: int
    context_length: int
    """Committed tokens before the round."""
    signal: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    control_seconds: float = 0.0
    """Of the controller: to plan, to stop the draft, and to learn from the round before (`round_seconds` holds that, too)."""
    round_seconds: float = 0.0
    batch_size: int = 1
    batch_rows: int = 0
    """Rows of the verification forward over the whole batch (0: num_drafted + 1)."""
    batch_emitted: int = 0
    """Tokens that the whole batch emitted in the round (0: num_emitted)."""
    confidences: tuple[float, ...] = ()
    acceptance: tuple[float, ...] = ()
    """As in `Verdict.acceptance`."""
    truncated: bool = False
    """The round was cut by a stop condition: its counts say nothing about later positions."""
    probe: bool = False
    warmup: bool = False
    """First rounds after a cold start, and rounds with a capture or the like; their times should not be learnt from."""
    expected_emitted: float = 1.0
    expected_seconds: float = 0.0
    task: str = ""
    reason: str = ""
    num_levels: int = 0
    """Longest path of the draft, in tokens: of a tree less than `num_drafted` (0: a chain)."""
    divergence: tuple[float, ...] = ()
    """As in `Verdict.divergence`."""
    relaxed: tuple[int, ...] = ()
    """As in `Verdict.relaxed`."""
    batch_draft_seconds: float = 0.0
    """Time in which sequences of the batch drafted, together or one after another (0: not told)."""
    chances: tuple[float, ...] = ()
    """Of the drafted tokens, as in `Outlook.chances`."""
    path: tuple[int, ...] = ()
    """Which of the drafted tokens were accepted, by number."""

    @property
    def labels(self) -> tuple[float, ...]:
        """Acceptance of positions 1, 2, ... as far as the round shows it: up to and including the first rejection, nothing beyond.

        The exact conditional acceptance probability where the rule reports it (for rules of ratio form that is 1 - TV(p, q)), else
        1 for accepted and 0 for rejected. A round cut by a stop condition shows no rejection.
        """
        if self.acceptance:
            return self.acceptance[: self.num_accepted] if self.truncated else self.acceptance
        hits = (1.0,) * self.num_accepted
        whole = self.truncated or self.num_accepted >= (self.num_levels or self.num_drafted)
        return hits if whole else (*hits, 0.0)


PLAIN = Plan(None, 0, "plain")
NO_DRAFT = Draft(())


@dataclass(slots=True)
class Round:
    """A round of one sequence in the making; times are seconds."""

    plan: Plan
    context_length: int
    signal: int = 0
    draft: Draft = NO_DRAFT
    control_seconds: float = 0.0
    draft_seconds: float = 0.0
    batch_draft_seconds: float = 0.0
    rows: int = 1
    """Of the forward that belong to it: one more than the draft has tokens, and one for a late token that came to nothing."""

    def record(
        self,
        request_id: int,
        verdict: Verdict,
        kept: int,
        *,
        verify_seconds: float,
        round_seconds: float,
        batch: tuple[int, int, int],
        warmup: bool,
        task: str = "",
    ) -> StepRecord:
        """The finished round. kept: emitted tokens that stayed; batch: `batch_size`, `batch_rows` and `batch_emitted`."""
        plan, draft = self.plan, self.draft
        return StepRecord(
            request_id=request_id,
            drafter=plan.drafter if plan.num_draft else None,
            num_planned=plan.num_draft,
            num_drafted=len(draft),
            num_accepted=min(kept, len(verdict.path)),
            num_emitted=kept,
            context_length=self.context_length,
            signal=self.signal,
            draft_seconds=self.draft_seconds,
            verify_seconds=verify_seconds,
            control_seconds=self.control_seconds,
            round_seconds=round_seconds,
            batch_size=batch[0],
            batch_rows=batch[1],
            batch_emitted=batch[2],
            confidences=draft.confidences,
            acceptance=verdict.acceptance,
            truncated=kept < len(verdict.emitted),
            probe=plan.probe,
            warmup=warmup,
            expected_emitted=plan.expected_emitted,
            expected_seconds=plan.expected_seconds,
            task=task,
            reason=plan.reason,
            num_levels=draft.num_levels,
            divergence=verdict.divergence,
            relaxed=verdict.relaxed,
            batch_draft_seconds=self.batch_draft_seconds,
            chances=draft.chances,
            path=verdict.path[:kept],
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities (natural log) of the target at one emitted token, after temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished (or interrupted) generation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """`stop` (end token, stop id or stop string), `length`, `interrupted`."""
    num_prompt_tokens: int
    seconds: float
    """Wall clock from the call to the last token, the prompt's pass included."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: tuple[StepRecord, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    from_draft: tuple[bool, ...] = ()
    """Per token: was it drafted and accepted (True), or the target's own (False)?"""
    stop_reason: str | int | None = None
    """The stop string or stop token that ended the text, if one did."""
    seed: int = 0
    plain_seconds_per_token: float | None = None
    """What a plain step would have taken in this answer (`CostTable.plain_step_during`); None when unknown."""
    notes: tuple[str, ...] = field(default=())
    draft_bytes: int = 0
    """Memory that drafters held for this sequence alone at its end."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_drafted(self) -> int:
        return sum(step.num_drafted for step in self.steps)

    @property
    def num_accepted(self) -> int:
        return sum(step.num_accepted for step in self.steps)

    @property
    def num_rounds(self) -> int:
        return len(self.steps)

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None when nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """accepted / rounds (the bonus token is not counted)."""
        return self.num_accepted / self.num_rounds if self.steps else None

    @property
    def block_efficiency(self) -> float | None:
        """emitted / rounds: target tokens per target pass."""
        return sum(step.num_emitted for step in self.steps) / self.num_rounds if self.steps else None

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over decode time (the prompt's pass excluded)."""
        return self.num_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0

"""What the pacer keeps between the steps of a round: offers, running drafts, and what requests of one task share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from paceline.control.arbiter import Arbiter
from paceline.control.bank import TimeBank
from paceline.control.base import RoundContext
from paceline.records import Outlook, StepRecord


@dataclass(slots=True)
class Lane:
    """What requests of one task share at one batch size."""

    arbiter: Arbiter = field(default_factory=Arbiter)
    rests: dict[tuple[str, int], int] = field(default_factory=dict)
    """Token count until which a drafter's offers at a level of evidence are not priced again."""
    purse: TimeBank = field(default_factory=lambda: TimeBank(eps=0.002, start=2.0, cap=50.0))
    """A second, smaller bank: while it is empty nothing is probed, and a promise must be clear to be believed."""
    speed: float = 1.0
    """Delivered speed of batched speculative rounds, relative to plain decoding."""


@dataclass(slots=True)
class Offer:
    """The best that one drafter can do in the coming round."""

    outlook: Outlook
    bucket: int
    rates: list[float]
    seconds: list[float]
    """Predicted time of the round for 0, 1, ... drafted tokens; in a batch, of the shared forward and this draft."""
    num_draft: int
    emitted: float
    merit: float
    """Tokens of this round for one that its time would have emitted by plain decoding."""


@dataclass(slots=True)
class RunningDraft:
    """A request's speculative round, from its plan to its record."""

    offer: Offer
    price: float
    """Tokens a second that the stop rule asks for; 0: draft all that was planned."""
    survival: float = 1.0
    probe: bool = False
    seconds: float = 0.0
    """What its draft takes if no other sequence drafts along."""
    paid: float = 0.0
    """The part of that which its offer was charged with."""
    tokens_per_second: float = 0.0
    """Price of time in a batch."""


@dataclass(slots=True)
class Lesson:
    """A finished round, or plain rounds alike as one, that is yet to be learnt from. Of a batch, a sequence's part of it."""

    record: StepRecord
    """The last one."""
    lane: Lane
    plain: float
    """Seconds of a plain step."""
    rows: int
    """Of the whole forward."""
    seconds: float
    """A whole round; of a plain one without what looking for drafts took."""
    verify_seconds: float
    emitted: int
    """Tokens of all that it stands for."""
    rounds: float
    lag: int | None = None
    """Tokens that the draft's cache had to catch up; None for plain rounds."""

    @property
    def is_pressing(self) -> bool:
        """It should not wait for others."""
        return self.lag is None or self.record.probe or self.record.batch_size > 1


def is_speculative(record: StepRecord) -> bool:
    """Whether it, or another sequence of its batch, drafted in the round."""
    return record.drafter is not None or record.batch_rows > record.batch_size


def alike(records: Sequence[StepRecord]) -> Iterator[list[StepRecord]]:
    """Runs of plain rounds of one task and batch size; a speculative round is a run of its own."""
    run: list[StepRecord] = []
    for record in records:
        if run and (is_speculative(record) or is_speculative(run[-1]) or not _same_kind(record, run[-1])):
            yield run
            run = []
        run.append(record)
    if run:
        yield run


def _same_kind(one: StepRecord, other: StepRecord) -> bool:
    return one.batch_size == other.batch_size and one.task == other.task and one.warmup == other.warmup


def is_alone(context: RoundContext) -> bool:
    """Whether the round's forward serves this sequence only."""
    return context.batch_size == 1 and context.other_rows == 0


def base_rows(context: RoundContext) -> int:
    """Rows of the round's forward if this sequence drafts nothing: sequences that come later bring at least one each."""
    return max(context.other_rows + 1, context.batch_size)


def batch_price(context: RoundContext, plain: float, lane: Lane) -> float:
    """Tokens a second that the whole batch emits: at least those of plain decoding, else what was delivered lately."""
    return max(1.0, lane.speed) * context.batch_size / plain

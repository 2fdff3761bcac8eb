"""What the pacer keeps between the steps of a round: offers, running drafts, and what requests of one task share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import Array, Structure, c_int64
from dataclasses import dataclass

from paceline.control.arbiter import Arbiter
from paceline.control.bank import TimeBank
from paceline.records import Outlook, Plan, StepRecord

NOTHING = Plan(None, 0, "plain: nothing to draft")
FORBIDDEN = Plan(None, 0, "plain: speculation delivered less lately")
RESTING = Plan(None, 0, "plain: drafting did not pay a moment ago")
NOT_WORTH = "plain: drafting would not pay"
SAVING = Plan(None, 0, "plain: bank, earlier losses come first")
_READING = 24.0
"""Plain steps that reading its first prompt may cost a drafter (of a batch, each prompt); a longer one must be earned first."""

SAVES, SHORT, AMPLE, PRICED = 1, 2, 4, 8
"""The bank saves, runs short, could pay several rounds at their worst; the price of a plain step is known."""
DUE_CATCH_UP, _STAY = 8, 16
CLEARLY_NOT, REST, REST_SIGNALS = 0.97, 8, 18
"""Speed under which an offer is clearly not worth it, and tokens for which it is then not priced again."""
SUSPECT = 1.5
"""A round that took this many times what was expected may have been interrupted by the machine."""
LEAST_ROW = 0.002
"""Least that one more row of a forward costs, in plain steps."""
TRIAL = 8
"""Tokens after which a plain step must be priced; until then rounds are charged by what was measured at another time."""
DOUBLE_PROOF = 0.1
"""What drafting must promise above the margin while its purse is empty."""


class Rests(Structure):
    """Token counts until which a drafter's offers are not priced again, by signal (the strongest ones share the last place)."""

    _fields_ = (("_until", c_int64 * REST_SIGNALS),)
    _until: Array[c_int64]

    def until(self, signal: int) -> int:
        """Emitted tokens from which on offers of this signal are priced."""
        return self._until[_place(signal)]

    def rest(self, signal: int, until: int) -> None:
        """Do not price them before."""
        self._until[_place(signal)] = until


def _place(signal: int) -> int:
    return min(max(signal, 0), REST_SIGNALS - 1)


class LaneState(Structure):
    """The numbers of a lane."""

    _fields_ = (("arbiter", Arbiter), ("purse", TimeBank))
    arbiter: Arbiter
    purse: TimeBank


class Lane:
    """What requests of one task share at one batch size."""

    __slots__ = ("_rests", "arbiter", "purse", "rest_until", "state")

    def __init__(self) -> None:
        self.state = LaneState(Arbiter(), TimeBank(eps=0.002, start=2.0, cap=50.0))
        self.arbiter = self.state.arbiter
        self.purse = self.state.purse
        """A second, smaller bank: while it is empty nothing is probed, and a promise must be clear to be believed."""
        self._rests: dict[str, Rests] = {}
        self.rest_until = 0
        """Token count until which no round of a batch is priced, for nothing paid clearly enough."""

    def rests(self, drafter: str) -> Rests:
        """Of a drafter's offers to single sequences."""
        rests = self._rests.get(drafter)
        if rests is None:
            rests = self._rests[drafter] = Rests()
        return rests


@dataclass(slots=True)
class Offer:
    """The best that one drafter can do in the coming round."""

    outlook: Outlook
    bucket: int
    rates: list[float]
    seconds: list[float]
    """Predicted time of the round for 0, 1, ... drafted tokens."""
    num_draft: int
    emitted: float
    merit: float
    """Tokens of this round for one that its time would have emitted by plain decoding."""


@dataclass(slots=True)
class RunningDraft:
    """A request's speculative round, from its plan to its record."""

    drafter: str
    task: str
    catch_up: int = 0
    """Tokens that the draft's cache lacked."""
    price: float = 0.0
    """Tokens a second that the stop rule asks for; 0: draft all that was planned, whatever the offer was."""
    rates: Sequence[float] = ()
    seconds: Sequence[float] = ()
    survival: float = 1.0


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
    times_draft: bool = True
    """Its draft was as long as drafting took: the shared steps of a batch are those of the longest draft."""


def lane_key(task: str, batch: int) -> tuple[str, int]:
    """Batches may mix tasks, so they have lanes of their own."""
    return (task if batch == 1 else "", batch_bucket(batch))


def state_of(bank: TimeBank, priced: bool) -> int:
    """What decides how many rounds may wait. priced: the price of a plain step is known."""
    return SAVES * (bank.saving_for > 0.0) | SHORT * bank.is_short | AMPLE * bank.is_ample | PRICED * priced


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


def lend_reading(read: set[str], drafter: str, seconds: float, plain: float, *banks: TimeBank) -> None:
    """What a drafter is worth cannot be known before it has read: its first reading is lent, and noted in `read`.

    plain: seconds of a plain step, or of one for each prompt that is read.
    """
    if 0.0 < seconds <= _READING * plain and drafter not in read:
        read.add(drafter)
        for bank in banks:
            bank.lend(seconds)


def probe_key(drafter: str, batch: int) -> tuple[str, str, int]:
    """By which probes of a batch are counted; those of single sequences by task, drafter and evidence."""
    return "", drafter, -batch_bucket(batch)


def batch_bucket(batch: int) -> int:
    """Batches of 1, 2, 3 to 4, 5 to 8, ... sequences share what they learn of themselves."""
    return (batch - 1).bit_length()


def spread_lag(lag: int, remaining: int, due: int = 0) -> int:
    """Tokens of a lag that one round is charged with: those that are due, and of the others, which are paid once for a stay of many
    rounds (7.8), a round's part. Rounds that are left: at a few tokens each."""
    stay = min(max(remaining // 3, _STAY), 4 * _STAY)
    return min(lag, due) + max(lag - due, 0) // stay

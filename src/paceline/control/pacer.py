"""The default controller: prices every drafter and draft length, plain decoding included, and bounds what it may lose (ours).

Each round, the order of authority is: time bank (safety), arbiter (delivered speed), prices (prediction), stop rule (local).
Prices are expected tokens over expected seconds for every length, from learnt costs (`pricing`) and learnt acceptance
(`acceptance`, `confidence`): sections 7.2, 7.3 and 8 of the control notes. What does not pay is probed now and then
(`probing`), within the bank's means. Lossless: it reads finished rounds, committed tokens and kept draft tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from paceline.control.acceptance import add_up, evidence_bucket
from paceline.control.bank import TimeBank
from paceline.control.base import Controller, RoundContext
from paceline.control.batches import JointPlanner
from paceline.control.core import Core, load_library
from paceline.control.learning import Learning
from paceline.control.offers import (
    AMPLE,
    CLEARLY_NOT,
    DOUBLE_PROOF,
    DUE_CATCH_UP,
    FORBIDDEN,
    LEAST_ROW,
    NOT_WORTH,
    NOTHING,
    PRICED,
    REST,
    RESTING,
    SAVES,
    SAVING,
    SHORT,
    SUSPECT,
    TRIAL,
    Lane,
    Lesson,
    Offer,
    RunningDraft,
    alike,
    is_speculative,
    lane_key,
    lend_reading,
    spread_lag,
    state_of,
)
from paceline.control.pricing import LearnedCosts, best_ratio, round_seconds, worth_another
from paceline.control.probing import ProbeSchedule
from paceline.control.quality import DraftQuality
from paceline.costs import CostTable
from paceline.errors import OptionError
from paceline.records import DraftFeatures, Outlook, Plan, StepRecord

_TOGETHER = 8
"""Finished rounds that are taken in at once: what runs after a forward finds cold caches, so several cost little more than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PacerOptions:
    """Options of `pacer`. Times of the bank are counted in plain steps."""

    eps: float = 0.009
    """Share of plain time that speculation may lose in the long run (0 to 1). A tenth less than the promised percent: what drafters
    do with committed tokens does not show."""
    start: float = 8.0
    """What it may lose at once, in plain steps (0 to 1000). With half of it an engine whose first drafts are unlucky has too little
    left to find out that others pay: it stayed plain for hundreds of tokens."""
    cap: float = 200.0
    """Most that is kept of earlier gains, in plain steps (0 to 1e6)."""
    margin: float = 0.02
    """Drafting must promise this much more than plain decoding, relative (0 to 1): learning from a draft comes after its round, in
    whose time it does not show."""
    explain: bool = False
    """Give reasons with figures (a little slower)."""

    def __post_init__(self) -> None:
        for name, high in (("eps", 1.0), ("start", 1e3), ("cap", 1e6), ("margin", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= high:
                raise OptionError(f"{name} = {value!r}: must be a number in [0, {high:g}]")


class Pacer(Controller):
    """See the module's text. One instance serves an engine; only a request's own odds and running round are kept by id."""

    name = "pacer"
    learns_late = True
    options_type = PacerOptions

    def __init__(self, options: PacerOptions, costs: CostTable) -> None:
        self.options = options
        self._costs = LearnedCosts(costs)
        self._quality = DraftQuality()
        self._bank = TimeBank(options.eps, options.start, options.cap)
        self._probes = ProbeSchedule()
        self._learning = Learning(self._costs, self._quality, self._bank, self._probes)
        self._read: set[str] = set()
        """Drafters that were lent the time to read a prompt."""
        self._joint = JointPlanner(self._costs, self._quality, self._bank, self._probes, self._read, options.margin)
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._running: dict[int, RunningDraft] = {}
        self._tokens = 0
        self._finished: list[StepRecord] = []
        """Rounds that are yet to be settled."""
        self._renewing = False
        """The running round is to tell the price of a plain step."""
        self._state = 0
        """As `state_of` had it when rounds were taken in last: to look in every round would cost more than it saves."""
        library = load_library()
        self._core = None if isinstance(library, str) else self._compiled(library)
        if options.explain:
            self.explain()

    def _compiled(self, library: CDLL) -> Core:
        parts = (self._costs, self._quality, self._bank, self._probes, self._lanes)
        return Core(library, *parts, self.options.margin)

    def plan_unseen(self, task: str, batch_size: int) -> Plan | None:
        if self._bank.saving_for > 0.0:
            return SAVING
        lane = self._lanes.get(lane_key(task, batch_size))
        if lane is not None and batch_size > 1 and self._tokens < lane.rest_until:
            return RESTING
        return FORBIDDEN if lane is not None and lane.arbiter.forbids else None

    def plan_batch(self, contexts: Sequence[RoundContext]) -> list[Plan]:
        first = contexts[0]
        if first.batch_size == 1:
            return [self.plan(first)]
        if (unseen := self.plan_unseen(first.task, first.batch_size)) is not None:
            return [unseen] * len(contexts)
        plain = self._costs.plain(max(context.context_length for context in contexts), first.batch_size)
        lane = self._lane(first.task, first.batch_size, plain)
        if lane.arbiter.wants_plain or self._needs_plain(first.batch_size):
            return [self._renew(plain)] * len(contexts)
        return self._joint.plan(contexts, plain, lane, self._tokens)

    def plan(self, context: RoundContext) -> Plan:
        if context.batch_size > 1:
            return self.plan_batch([context])[0]
        # What follows is the reference of what C does in a tenth of the time. It asks for it where a round is out of the ordinary.
        if self._core is not None and (usual := self._core.plan(context, self._tokens, self._running)) is not None:
            return usual
        able = [o for o in context.outlooks if o.available > 0] if context.max_draft > 0 else []
        if not able:
            return NOTHING
        if self._bank.saving_for > 0.0:
            return SAVING
        plain = self._costs.plain(context.context_length)
        lane = self._lane(context.task, 1, plain)
        if lane.arbiter.forbids:
            return FORBIDDEN
        # Deciding has a price, too: what clearly did not pay is left alone for some tokens.
        able = [o for o in able if self._tokens >= lane.rests(o.drafter).until(o.signal)]
        if not able:
            return RESTING
        if lane.arbiter.wants_plain or self._needs_plain(1):
            return self._renew(plain)
        now = plain * self._costs.change
        best = self._offer(context, able[0], now)
        others: list[Offer] = []
        for outlook in able[1:]:
            offer = self._offer(context, outlook, now)
            if offer.merit > best.merit:
                best, offer = offer, best
            others.append(offer)
        pays = best.merit > 1.0 + self.options.margin + (DOUBLE_PROOF if lane.purse.slack <= 0.0 else 0.0)
        for offer in others if pays else [best, *others]:
            if self._may_probe(context, offer, now, best.merit if pays else 1.0, lane):
                return self._grant(context, offer, plain, lane, min(offer.num_draft, 2), probe=True)
        for offer in (best, *others):
            if offer.merit < CLEARLY_NOT:
                lane.rests(offer.outlook.drafter).rest(offer.outlook.signal, self._tokens + REST)
        if pays:
            return self._grant(context, best, plain, lane, best.num_draft, probe=False)
        return Plan(None, 0, self._why_plain(best, plain), 1.0, plain)

    def _renew(self, plain: float) -> Plan:
        """A plain round, to see what one costs now."""
        self._take_in()  # what came before says nothing of the machine as it is now
        self._renewing = True
        return Plan(None, 0, "plain: renewing the price of a plain step", 1.0, plain)

    def _needs_plain(self, batch: int) -> bool:
        """Whether the price of a plain step, by which the bank charges rounds, must be seen: at once where the bank runs short."""
        return (self._tokens >= TRIAL or self._bank.is_short) and not self._costs.knows_plain(batch)

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool:
        self._core = None  # C knows nothing of confidence
        if (joint := self._joint.keep_drafting(request_id, features)) is not None:
            return joint
        running = self._running.get(request_id)
        if running is None:
            return True
        confident = self._quality.states_confidence(running.drafter, running.task)
        confident.asks = True
        if running.price == 0.0:
            return True
        running.survival *= self._quality.chance(request_id, running.drafter, confident, features)
        return worth_another(running.survival, features.position, running.rates, running.seconds, running.price)

    def observe(self, record: StepRecord) -> None:
        self._tokens += record.num_emitted
        self._finished.append(record)
        if record.batch_size > 1:
            due = 4 * record.batch_size if self._bank.saving_for > 0.0 else record.batch_size
        else:
            due = 1 if record.drafter is not None and self._is_urgent(record) else self._due
        if len(self._finished) >= due:
            self._take_in()

    def _is_urgent(self, record: StepRecord) -> bool:
        """Whether a speculative round is charged at once. Else it waits: what was granted to it stays granted until then."""
        if not self._state & AMPLE or record.probe or record.round_seconds > SUSPECT * record.expected_seconds:
            return True
        if record.warmup:  # a request's first rounds: what they tell of its drafts is wanted soon
            return True
        if 2.0 * self._bank.granted > self._bank.slack:  # else the next plan would be refused what is only promised away
            return True
        running = self._running.get(record.request_id)
        return running is None or running.catch_up > 0

    @property
    def _due(self) -> int:
        """How many rounds of single sequences may wait."""
        if self._state & SAVES:  # nothing is drafted before the bank has saved some rounds anyway
            return 4 * _TOGETHER
        return 1 if self._renewing or self._state & SHORT or not self._state & PRICED else _TOGETHER

    def _take_in(self) -> None:
        """Settle all finished rounds, and learn from them."""
        finished, self._finished, self._renewing = self._finished, [], False
        state = self._core.take_in(finished, self._tokens, self._running) if self._core is not None else None
        if state is None:
            self._take_in_reference(finished)
            state = state_of(self._bank, self._costs.knows_plain(1))
        self._state = state

    def _take_in_reference(self, finished: Sequence[StepRecord]) -> None:
        """What C does for the usual rounds."""
        longest = max((record.num_drafted for record in finished), default=0)
        lessons = [
            self._settle(rounds[0], longest) if is_speculative(rounds[0]) else self._settle_plain(rounds)
            for rounds in alike(finished)
        ]
        self._learning.take(lessons, self._tokens, self._joint.prober)

    def _settle(self, record: StepRecord, longest: int) -> Lesson:
        """Charge a speculative round to the banks, and make a lesson of it. longest: draft of the batch, in tokens."""
        batch = record.batch_size
        plain = self._costs.plain(record.context_length, batch)
        lane = self._lane(record.task, batch, plain)
        rows = record.batch_rows or record.num_drafted + 1
        seconds = record.round_seconds or record.verify_seconds + record.draft_seconds
        steps = record.num_emitted / batch
        running = self._running.pop(record.request_id, None)
        lag = running.catch_up if running is not None else self._joint.settle(record)
        ceiling = self._ceiling(record, rows)
        # In a round that is cold plain decoding would have been slow, too.
        charged = min(seconds, record.expected_seconds or ceiling) if record.warmup else seconds
        self._bank.settle(plain, steps, charged / batch, ceiling / batch, 1.0 / batch)
        lane.purse.settle(plain, steps, min(charged, ceiling) / batch)
        times_draft = batch == 1 or record.num_drafted == longest
        verify, emitted = record.verify_seconds, record.num_emitted
        return Lesson(record, lane, plain, rows, seconds, verify, emitted, 1.0 / batch, lag, times_draft)

    def _settle_plain(self, records: Sequence[StepRecord]) -> Lesson:
        """As `_settle`, of plain rounds alike. Looking for drafts and deciding against them is speculation's own cost."""
        last = records[-1]
        batch, emitted, rounds = last.batch_size, sum(r.num_emitted for r in records), len(records) / last.batch_size
        plain = self._costs.plain(last.context_length, batch)
        lane = self._lane(last.task, batch, plain)
        looking = add_up([r.draft_seconds + r.control_seconds for r in records])
        self._bank.settle_plain(plain, emitted / batch, looking, rounds)
        lane.purse.settle_plain(plain, emitted / batch)
        verify = add_up([r.verify_seconds for r in records]) / len(records)
        whole = add_up([r.round_seconds or r.verify_seconds + r.draft_seconds for r in records]) / len(records)
        return Lesson(last, lane, plain, batch, max(whole - looking / rounds, verify), verify, emitted, rounds)

    def finish(self, request_id: int) -> None:
        self._take_in()
        self._quality.forget(request_id)
        self._running.pop(request_id, None)
        self._joint.forget(request_id)
        if self._core is not None:
            self._core.forget(request_id)

    def explain(self) -> None:
        self.options = replace(self.options, explain=True)
        self._joint.explains = True
        self._core = None  # C gives no figures

    def calibration(self) -> list[dict[str, Any]]:
        """See `DraftQuality.calibration`."""
        return self._quality.calibration()

    def snapshot(self) -> dict[str, Any]:
        """What was learnt about drafts, for a stored profile."""
        return self._quality.snapshot()

    def restore(self, data: dict[str, Any]) -> None:
        """See `DraftQuality.restore`."""
        self._quality.restore(data)
        if self._quality.knows_confidence:
            self._core = None

    def _lane(self, task: str, batch: int, plain: float) -> Lane:
        key = lane_key(task, batch)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane()
            lane.purse.open(plain)
            if not self._bank.is_open:
                self._bank.open(plain)
        return lane

    def _offer(self, context: RoundContext, outlook: Outlook, plain: float) -> Offer:
        """Price all lengths of one drafter and take the best."""
        costs, drafter, bucket = self._costs, outlook.drafter, evidence_bucket(outlook)
        limit = min(context.max_draft, outlook.available)
        rates = self._quality.rates(context.request_id, context.task, drafter, bucket, limit, outlook.chances)
        curve = costs.forwards(limit, context.context_length)
        fixed, per_token = costs.drafting(drafter)
        once, each = fixed + costs.rest.fixed, per_token + costs.rest.per_token
        if outlook.catch_up:
            once += costs.catch_up(drafter, spread_lag(outlook.catch_up, context.remaining, DUE_CATCH_UP))
        # Prices of near equals are noisy; a round with a draft in it is never cheaper than one without.
        seconds = round_seconds(curve, once, each, plain + fixed, per_token + LEAST_ROW * plain)
        num_draft, emitted = best_ratio(rates, seconds)
        merit = emitted * plain / seconds[num_draft]
        confident = self._quality.confidence(drafter, context.task)
        if confident is not None:
            merit *= confident.delivered.factor
        return Offer(outlook, bucket, rates, seconds, num_draft, emitted, merit)

    def _may_probe(self, context: RoundContext, offer: Offer, plain: float, speed: float, lane: Lane) -> bool:
        """Whether an offer that does not win should be tried once more; speed: of what wins, relative to plain."""
        loss = max(0.0, offer.seconds[offer.num_draft] / plain - offer.emitted / speed)
        if lane.purse.slack < loss * plain:
            return False
        drafter = offer.outlook.drafter
        doubt = self._quality.doubt(context.request_id, drafter, offer.rates[0], loss + self.options.margin)
        return self._probes.due((context.task, drafter, offer.bucket), self._tokens, loss, doubt)

    def _grant(self, context: RoundContext, offer: Offer, plain: float, lane: Lane, wanted: int, *, probe: bool) -> Plan:
        """Let the bank shorten or refuse the draft, and write the plan."""
        drafter = offer.outlook.drafter
        stops = not probe and self._quality.ends_drafts(drafter, context.task)
        reading = self._costs.catch_up(drafter, offer.outlook.catch_up)
        lend_reading(self._read, drafter, reading, plain, self._bank, lane.purse)
        num_draft = self._affordable(context, offer, plain, len(offer.rates) if stops else wanted)
        if num_draft == 0:
            lane.rests(drafter).rest(offer.outlook.signal, self._tokens + REST)
            return Plan(None, 0, SAVING.reason, 1.0, plain)
        expected, emitted = min(num_draft, offer.num_draft), offer.emitted
        if expected < offer.num_draft:
            emitted = survival = 1.0
            for rate in offer.rates[:expected]:
                survival *= rate
                emitted += survival
        price = max(offer.merit, 1.0) / plain if stops else 0.0
        lag = offer.outlook.catch_up
        self._running[context.request_id] = RunningDraft(drafter, context.task, lag, price, offer.rates, offer.seconds)
        seconds = offer.seconds[expected]
        return Plan(drafter, num_draft, self._why_draft(num_draft, emitted, seconds / plain, probe), emitted, seconds, probe)

    def _affordable(self, context: RoundContext, offer: Offer, plain: float, wanted: int) -> int:
        """The longest draft, up to the wanted one, whose worst loss the bank grants; 0 if there is none."""
        costs, outlook = self._costs, offer.outlook
        table = costs.measured(1, wanted, context.context_length)
        catch_up = costs.catch_up(outlook.drafter, outlook.catch_up)
        margin = 1.0 + 2.0 * costs.deviation
        for k in range(wanted, 0, -1):
            worst = max(margin * offer.seconds[k], table[k] + costs.worst_drafting(outlook.drafter, k) + costs.rest.worst(k))
            worst += catch_up
            if self._bank.grant(max(0.0, worst - plain)):
                return k
        self._bank.save_for(worst - plain + 0.25 * plain, plain)
        return 0

    def _ceiling(self, record: StepRecord, rows: int) -> float:
        """Seconds beyond which a speculative round was interrupted rather than dear: the worst that its plan was granted."""
        if record.round_seconds <= SUSPECT * record.expected_seconds:
            return inf  # the usual case, without a look at the worst one
        worst = max(self._costs.measured(rows, 0, record.context_length)[0], record.expected_seconds)
        worst += record.batch_size * self._costs.rest.worst(record.num_drafted)
        if record.drafter is not None:
            batch = record.batch_size  # of a batch one draft where they share their steps
            drafts = batch * self._costs.overlap.share(batch) if batch > 1 else 1.0
            worst += drafts * self._costs.worst_drafting(record.drafter, record.num_drafted)
        return max(1.0 + 2.0 * self._costs.deviation, SUSPECT) * worst if worst > 0.0 else inf

    def _why_plain(self, offer: Offer, plain: float) -> str:
        if not self.options.explain:
            return NOT_WORTH
        drafter, k, steps = offer.outlook.drafter, offer.num_draft, offer.seconds[offer.num_draft] / plain
        return f"plain: {drafter} {k}: expects {offer.emitted:.2f} tokens for {steps:.2f} plain steps (first {offer.rates[0]:.0%})"

    def _why_draft(self, num_draft: int, emitted: float, steps: float, probe: bool) -> str:
        verb = "probing" if probe else "drafting"
        return f"{verb} {num_draft}: expects {emitted:.1f} tokens for {steps:.2f} plain steps" if self.options.explain else verb

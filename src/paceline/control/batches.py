"""The pacer's part for batches: offers of all sequences at once, one bank, one probe (ours). `joint` holds the rule itself."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from paceline.control.acceptance import signal_bucket
from paceline.control.bank import TimeBank
from paceline.control.base import RoundContext
from paceline.control.followed import Line
from paceline.control.joint import Allocation, JointDraft, JointRound, Share, allocate, best_round, weigh
from paceline.control.offers import (
    CLEARLY_NOT,
    DOUBLE_PROOF,
    DUE_CATCH_UP,
    NOTHING,
    REST,
    SAVING,
    Lane,
    batch_bucket,
    lend_reading,
    probe_key,
    spread_lag,
)
from paceline.control.pricing import LearnedCosts
from paceline.control.probing import ProbeSchedule
from paceline.control.quality import DraftQuality
from paceline.records import DraftFeatures, Outlook, Plan, StepRecord

_SPARED = Plan(None, 0, "plain: others of the batch draft what is likelier")
_DEAREST = 2.0
"""Plain forwards that a forward may take at most. Beyond, where rows cost in proportion, more of them gain hardly more than they
waste where estimates are too high, and leave the last rounds less full."""
_MORE, _MOST = 2, 160
"""Tokens beyond its share that a sequence may draft where others leave rows to it (random numbers are made for all of them), and
the most drafted tokens of a round that is priced."""
_LONGEST_REST = 2
"""Times that the rest after an offer which clearly did not pay may double: asking sixteen takes a quarter of a plain step."""
_UNDER_WAY = 2
"""Rounds that may be planned and not yet settled."""
_PROBED = 2
"""Tokens that each sequence drafts in a probe: steps are shared, so all may as well take part."""


class JointPlanner:
    """Plans rounds of several sequences. It shares its parts with the pacer that it belongs to."""

    def __init__(
        self, costs: LearnedCosts, quality: DraftQuality, bank: TimeBank, probes: ProbeSchedule, read: set[str], margin: float
    ) -> None:
        """read: drafters that were lent the time to read a prompt."""
        self._costs, self._quality, self._bank, self._probes = costs, quality, bank, probes
        self._read, self._margin = read, margin
        self._running: dict[int, JointDraft] = {}
        self._lags: dict[int, deque[int]] = {}
        """Tokens caught up that each draft's time tells about, of rounds under way, oldest first: a round may be planned before the
        last is settled."""
        self._stakes: deque[float] = deque(maxlen=_UNDER_WAY)
        """Losses granted to rounds that are not settled, which the bank forgets when it settles another one."""
        self._outside: dict[int, Line] = {}
        """Seconds of a speculative round outside forward and drafting, by its batch size: planning, judging and committing."""
        self._refused: dict[int, int] = {}
        """How often the rest after an offer doubled, by batch size."""
        self._settled = 0
        """Records of the last round that were settled."""
        self.prober = -1
        """The request whose record tells how a probe went."""
        self.explains = False

    def plan(self, contexts: Sequence[RoundContext], plain: float, lane: Lane, now: int) -> list[Plan]:
        """One plan for each context. plain: seconds of a plain step of the whole batch; now: tokens emitted so far."""
        batch = contexts[0].batch_size
        self._running.clear()
        offered = [self._share(context, batch / plain) for context in contexts]
        shares = [share for share in offered if share is not None]
        if not shares:
            return [NOTHING] * len(contexts)
        weigh(shares)
        found, count = best_round(shares, *self._prices(shares), batch=batch)
        merit = (batch + found.emitted[count]) * self._costs.change * plain / (batch * found.seconds[count])
        probe = merit <= 1.0 + self._margin + (DOUBLE_PROOF if lane.purse.slack <= 0.0 else 0.0)
        if probe:
            for share in shares:
                del share.rates[_PROBED:]
            found = allocate(shares, *self._prices(shares))
            count = len(found.order)
            if not self._may_probe(found, plain, lane, now):
                if merit < CLEARLY_NOT:
                    lane.rest_until = now + self._rest(batch) * batch
                return [Plan(None, 0, self._why_plain(merit), 1.0, plain)] * len(contexts)
            self.prober = shares[0].context.request_id
        else:
            self._lend_reading(shares, plain, lane)
        count = self._affordable(found, count, plain)
        if count == 0:
            lane.rest_until = now + REST * batch
            return [SAVING] * len(contexts)
        found.give(count)
        bucket = batch_bucket(batch)
        self._refused[bucket] = max(0, self._refused.get(bucket, 0) - 1)
        return self._grant(offered, found, count, batch, probe)

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool | None:
        """The stop rule; None for a request that is not in a joint round."""
        draft = self._running.get(request_id)
        if draft is None:
            return None
        share, position = draft.share, features.position
        confident = self._quality.states_confidence(share.outlook.drafter, share.context.task)
        confident.asks = True
        if not draft.stops:
            return True
        draft.survival *= self._quality.chance(request_id, share.outlook.drafter, confident, features)
        return draft.round.goes_on(draft, position)

    def settle(self, record: StepRecord) -> int:
        """A round ended in which the batch drafted. Returns the tokens that were caught up in this record's drafting time."""
        batch, drafter = record.batch_size, record.drafter
        self._running.pop(record.request_id, None)  # drafting is over, also that of a next round which was planned already
        lags = self._lags.get(record.request_id)
        lag = lags.popleft() if lags and drafter is not None else 0
        self._settled += 1
        if self._settled >= batch:
            self._settled = 0
            if self._stakes:
                self._stakes.popleft()
            outside = record.round_seconds - record.verify_seconds - record.batch_draft_seconds
            if record.batch_draft_seconds == 0.0:  # not told: drafting would count twice
                return lag
            if not record.warmup:
                self._outside_of(batch).learn(record.batch_rows - batch, outside)
            elif drafter is not None and outside > 0.0:  # a first round, without a capture: no other one reads prompts
                fixed, each = self._costs.drafting(drafter)
                self._costs.learn_catch_up(drafter, lag, record.draft_seconds - fixed - each * record.num_drafted)
        return lag

    def forget(self, request_id: int) -> None:
        """The request ended."""
        self._running.pop(request_id, None)
        self._lags.pop(request_id, None)

    def _rest(self, batch: int) -> int:
        """Rounds to rest after an offer that clearly does not pay: twice as many as after the last one of this batch size."""
        bucket = batch_bucket(batch)
        times = self._refused.get(bucket, 0)
        self._refused[bucket] = min(times + 1, _LONGEST_REST)
        return REST << times

    def _outside_of(self, batch: int) -> Line:
        bucket = batch_bucket(batch)
        line = self._outside.get(bucket)
        if line is None:
            line = self._outside[bucket] = Line(0.0, 0.0, 0.0)
        return line

    def _share(self, context: RoundContext, price: float) -> Share | None:
        """The drafter that is worth most to a sequence by itself. price: tokens a second that time is worth."""
        able = [o for o in context.outlooks if o.available > 0] if context.max_draft > 0 else []
        shares = [self._offer(context, outlook) for outlook in able]
        if len(shares) < 2:
            return shares[0] if shares else None
        part = self._costs.overlap.share(context.batch_size)
        return max(shares, key=lambda share: _own_worth(share, price * part))

    def _offer(self, context: RoundContext, outlook: Outlook) -> Share:
        costs, drafter, bucket = self._costs, outlook.drafter, signal_bucket(outlook.signal)
        if outlook.together:
            costs.overlap.expect_together()
        limit = min(context.max_draft, outlook.available)
        rates = self._quality.rates(context.request_id, context.task, drafter, bucket, limit, outlook.chances)
        lag, once = outlook.catch_up, 0.0
        if lag > DUE_CATCH_UP:
            once = costs.catch_up(drafter, spread_lag(lag, context.remaining))
        elif lag:  # goes along with the first shared step
            once = costs.catch_up(drafter, lag) * costs.overlap.share(context.batch_size)
        return Share(context, outlook, rates, *costs.drafting(drafter), once)

    def _caught_up(self, shares: Sequence[Share]) -> dict[str, float]:
        """Tokens that drafts with shared steps catch up in their common time, by drafter: as `_offer` prices them, but whole."""
        lags: dict[str, float] = {}
        for share in shares:
            lag = share.outlook.catch_up if share.num_draft else 0
            part = 1.0 if lag > DUE_CATCH_UP else self._costs.overlap.share(len(shares))
            lags[share.outlook.drafter] = lags.get(share.outlook.drafter, 0.0) + part * lag
        return lags

    def _reading(self, share: Share) -> float:
        """Seconds that its draft must read beyond what its round is charged with."""
        return max(0.0, self._costs.catch_up(share.outlook.drafter, share.outlook.catch_up) - share.once)

    def _prices(self, shares: Sequence[Share]) -> tuple[Sequence[float], float, float, float, int]:
        """What `allocate` is told of times and of the most tokens."""
        costs, rows = self._costs, shares[0].context.batch_size
        length = max(share.context.context_length for share in shares)
        forwards = costs.learnt(rows, min(sum(len(share.rates) for share in shares), _MOST), length)
        most = max(bisect_right(forwards, _DEAREST * forwards[0]) - 1, _PROBED * len(shares))
        outside = self._outside.get(batch_bucket(rows))
        each, once = (outside.per_token, outside.fixed) if outside is not None else (costs.rest.per_token, 0.0)
        return forwards, costs.overlap.serial, each, once, most

    def _may_probe(self, found: Allocation, plain: float, lane: Lane, now: int) -> bool:
        share, batch = found.shares[0], found.shares[0].context.batch_size
        seconds = found.seconds[-1] + sum(self._reading(one) for one in found.shares)  # a try does not stay to earn it
        loss = max(0.0, seconds * batch / plain - batch - found.emitted[-1])
        if lane.purse.slack < loss * plain / batch:
            return False
        drafter = share.outlook.drafter
        doubt = self._quality.doubt(share.context.request_id, drafter, share.rates[0], loss / batch + self._margin)
        return self._probes.due(probe_key(drafter, batch), now, loss, doubt)

    def _lend_reading(self, shares: Sequence[Share], plain: float, lane: Lane) -> None:
        """What a drafter is worth cannot be known before it has read prompts: those of its first batch are lent."""
        catch_up: dict[str, float] = {}
        for share in shares:
            drafter, lag = share.outlook.drafter, share.outlook.catch_up
            catch_up[drafter] = catch_up.get(drafter, 0.0) + self._costs.catch_up(drafter, lag)
        for drafter, seconds in catch_up.items():
            lend_reading(self._read, drafter, seconds, plain * len(shares), self._bank, lane.purse)

    def _affordable(self, found: Allocation, wanted: int, plain: float) -> int:
        """The most tokens, up to the wanted ones, whose worst loss the bank grants; 0 if there are none."""
        costs, rows = self._costs, found.shares[0].context.batch_size
        length = max(share.context.context_length for share in found.shares)
        measured = costs.measured(rows, wanted, length)
        reading = [self._reading(share) for share in found.shares]
        margin, count, worst = 1.0 + 2.0 * costs.deviation, wanted, 0.0
        while count > 0:
            seconds = found.seconds[count]
            worst = max(margin * seconds, seconds + measured[count] - found.forwards[count]) - plain
            worst += sum(reading[i] for i in set(found.order[:count]))
            if self._bank.grant(max(0.0, worst) + sum(self._stakes)):
                self._stakes.append(max(0.0, worst))
                return count
            count = 3 * count // 4
        self._bank.save_for(worst + 0.25 * plain, plain)
        return 0

    def _grant(self, offered: Sequence[Share | None], found: Allocation, count: int, batch: int, probe: bool) -> list[Plan]:
        """Write the plans, and keep what the stop rule needs."""
        seconds = found.seconds[count]
        row = max(0.0, found.forwards[count] - found.forwards[0]) / count
        joint = JointRound((batch + found.emitted[count]) / seconds, row, self._costs.overlap.serial)
        plans, together = [], self._caught_up(found.shares)
        for share in offered:
            if share is None or share.num_draft == 0:
                plans.append(NOTHING if share is None else _SPARED)
                continue
            drafter, context = share.outlook.drafter, share.context
            stops = not probe and self._quality.ends_drafts(drafter, context.task)
            self._running[context.request_id] = joint.join(share, stops=stops)
            lag = together[drafter] if share.outlook.together else share.outlook.catch_up
            self._lags.setdefault(context.request_id, deque(maxlen=_UNDER_WAY)).append(round(lag))
            wanted = min(len(share.rates), share.num_draft + _MORE) if stops and share.num_draft > 1 else share.num_draft
            plans.append(Plan(drafter, wanted, self._why_draft(share, probe), share.emitted, seconds, probe))
        return plans

    def _why_plain(self, merit: float) -> str:
        if not self.explains:
            return "plain: drafting would not pay"
        return f"plain: drafts of the batch would make it {merit:.2f} times as fast"

    def _why_draft(self, share: Share, probe: bool) -> str:
        verb = "probing" if probe else "drafting"
        return f"{verb} {share.num_draft}: expects {share.emitted:.1f} tokens" if self.explains else verb


def _own_worth(share: Share, price: float) -> float:
    """Tokens that the best length gains over what its draft's time is worth, for a sequence by itself."""
    chance, gained, best = 1.0, 0.0, -1.0
    for drafted, rate in enumerate(share.rates, 1):
        chance *= rate
        gained += chance
        best = max(best, gained - price * (share.fixed + share.per_token * drafted + share.once))
    return best

"""What finished rounds teach the pacer: acceptance, what probes found, costs, delivered speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paceline.control.acceptance import evidence_bucket
from paceline.control.bank import TimeBank
from paceline.control.offers import Lesson, probe_key
from paceline.control.pricing import LearnedCosts
from paceline.control.probing import ProbeSchedule
from paceline.control.quality import DraftQuality

LESSON, SETTLED = 4, 32
"""Drafted rounds of which one teaches costs, once that many have: a lesson takes longer than what it tells is worth then."""


class Learning:
    """Takes lessons into the parts that it shares with the pacer."""

    def __init__(self, costs: LearnedCosts, quality: DraftQuality, bank: TimeBank, probes: ProbeSchedule) -> None:
        self._costs, self._quality, self._bank, self._probes = costs, quality, bank, probes

    def take(self, lessons: Sequence[Lesson], now: int, prober: int) -> None:
        """Learn from rounds. now: tokens emitted so far; prober: the request whose record tells how a batch's probe went."""
        for of_one in _of_one_draft(lessons):
            self._learn_quality(of_one, now, prober)
        for lesson in lessons:
            record, lane, seconds = lesson.record, lesson.lane, lesson.seconds
            batch, speculative = record.batch_size, lesson.lag is not None
            if record.warmup:
                continue
            if self._teaches_costs(batch, speculative):
                self._learn_costs(lesson)
                if speculative and self._bank.is_short and self._costs.plain_is_stale:
                    lane.arbiter.renew()
            lane.arbiter.observe(lesson.plain, lesson.emitted / batch, seconds / batch, speculative, lesson.rounds)

    def _teaches_costs(self, batch: int, speculative: bool) -> bool:
        """Whether rounds teach costs: all of a batch, all plain ones (taken in several at once), a draft's first ones, then every
        fourth."""
        if batch > 1 or not speculative:
            return True
        self._costs.state.drafted_rounds = rounds = self._costs.state.drafted_rounds + 1
        return rounds % LESSON == 0 or rounds <= SETTLED

    def _learn_quality(self, lessons: Sequence[Lesson], now: int, prober: int) -> None:
        records = [lesson.record for lesson in lessons]
        told = self._quality.learn(records, [lesson.seconds for lesson in lessons], now)
        for record, tells in zip(records, told, strict=True):
            drafter, alone = record.drafter or "", record.batch_size == 1
            key = (record.task, drafter, evidence_bucket(record)) if alone else probe_key(drafter, record.batch_size)
            if not record.probe:
                self._probes.pays(key, now)
            elif tells and (alone or record.request_id == prober):
                self._probes.probed(key, now, accepted=record.num_accepted > 0)

    def _learn_costs(self, lesson: Lesson) -> None:
        record, costs = lesson.record, self._costs
        if lesson.lag is not None:
            costs.learn_speculative(record, lesson.rows, lesson.seconds, lesson.lag, lesson.times_draft)
            return
        batch, context = record.batch_size, record.context_length
        costs.learn_plain(context, batch, lesson.seconds, lesson.verify_seconds, lesson.rounds)
        if costs.knows_plain(batch):
            self._bank.correct_start(costs.plain(context, batch))


def _of_one_draft(lessons: Sequence[Lesson]) -> Iterator[list[Lesson]]:
    """Runs of lessons of one request and drafter; plain rounds are left out."""
    run: list[Lesson] = []
    for lesson in lessons:
        record = lesson.record
        if run and (record.drafter, record.request_id) != (run[-1].record.drafter, run[-1].record.request_id):
            yield run
            run = []
        if record.drafter is not None:
            run.append(lesson)
    if run:
        yield run

"""The usual round of one sequence in C (`pacer_core.c`), on the state that the pacer's Python methods work on as well.

Names are looked up once a request: a round costs two calls with addresses. What is rare is left to Python, which the answer None
or False asks for: several sequences at once, drafters that state how sure they are, caches that must catch up, a first round of a
task, the first drafts at a level of evidence, and whatever has no room in C's arrays.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from ctypes import Array, addressof, c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from struct import Struct
from types import ModuleType
from typing import Any

from paceline import compiled
from paceline.control import acceptance, arbiter, bank, chances, followed, learning, offers, pricing, probing
from paceline.control.acceptance import NUM_BUCKETS, POSITIONS, prior_rates, temperature_tag
from paceline.control.base import RoundContext
from paceline.control.followed import EXACT_ROWS
from paceline.control.offers import FORBIDDEN, NOT_WORTH, NOTHING, RESTING, SAVING, Lane, RunningDraft
from paceline.control.pricing import CONTEXT_SHIFT, LearnedCosts
from paceline.control.probing import ProbeSchedule
from paceline.control.quality import DraftQuality
from paceline.records import Plan, StepRecord

_MOST_LOOKS, _MOST_FINISHED, _MOST_LABELS, _MOST_GIVEN, _NUM_CURVES = 8, 32, 512, 64, 8
"""Room in C: drafters of a round, rounds taken in together, their labels in all and of one round, contexts with costs at hand."""
_ASK, _NEED_CURVE, _DONE, _NOTHING, _SAVING, _FORBIDDEN, _RESTING, _RENEW, _POOR, _NOT_WORTH, _DRAFT, _PROBE = range(12)
"""Answers of C. From `_POOR` on they come with seconds, from `_DRAFT` on with a draft."""
_TRUNCATED, _PROBING, _WARMUP, _KNOWS = 1, 2, 4, 8
"""Flags of finished rounds."""
_FROM: tuple[tuple[ModuleType, str, str], ...] = (
    (bank, "", "FORGIVE_EVERY LONGEST_LOOK SAVED MOST_SAVED"),
    (arbiter, "", "RENEWAL"),
    (acceptance, "", "POSITIONS NUM_BUCKETS ALARM HALF_LIFE POOL_DISCOUNT POOL_WEIGHT"),
    (offers, "", "CLEARLY_NOT REST REST_SIGNALS DOUBLE_PROOF SUSPECT LEAST_ROW TRIAL SAVES SHORT AMPLE PRICED"),
    (followed, "", "EXACT_ROWS ROW_BUCKETS OUTLIER"),
    (pricing, "", "CONTEXT_SHIFT OTHER_MACHINE TRUSTED"),
    (learning, "", "LESSON SETTLED"),
    (chances, "", "NUM_SPANS CHANCE_DISCOUNT MOST_CHANCE"),
    (probing, "PROBE_", "FIRST LAST BUDGET BOOST IN_A_ROW"),
    (sys.modules[__name__], "", "_MOST_LOOKS _MOST_FINISHED _MOST_LABELS _MOST_GIVEN _NUM_CURVES"),
    (sys.modules[__name__], "", "_TRUNCATED _PROBING _WARMUP _KNOWS"),
    (
        sys.modules[__name__],
        "",
        "_ASK _NEED_CURVE _DONE _NOTHING _SAVING _FORBIDDEN _RESTING _RENEW _POOR _NOT_WORTH _DRAFT _PROBE",
    ),
)
_CONSTANTS = {f"{prefix}{name.lstrip('_')}": getattr(module, name) for module, prefix, names in _FROM for name in names.split()}
"""Stand once, in Python, and reach C as definitions."""
_SPANS = f"-DSPAN_ENDS={','.join(map(repr, chances.SPAN_ENDS))}"
_SOURCES = compiled.Sources(
    name="pacer",
    folder=Path(__file__).parent,
    files=("pacer_core.c", "pacer_core.h", "pacer_plan.h", "pacer_state.h"),
    # A fused product, or a power taken in another way, would not come to the bits of Python.
    flags=("-O2", "-ffp-contract=off", "-fno-builtin-pow", *(f"-D{name}={value!r}" for name, value in _CONSTANTS.items()), _SPANS),
    libraries=("-lm",),
    abi=("paceline_pacer_abi", 2),
)
_ALWAYS = {_NOTHING: NOTHING, _SAVING: SAVING, _FORBIDDEN: FORBIDDEN, _RESTING: RESTING}
_WHY_PLAIN = {_POOR: SAVING.reason, _NOT_WORTH: NOT_WORTH}
_LOOK = 5
_ROUND = Struct("13qQ5d")


class _Standing(ctypes.Structure):
    _fields_ = (
        ("pools", c_void_p * NUM_BUCKETS),
        ("probes", c_void_p * NUM_BUCKETS),
        *((name, c_void_p) for name in ("line", "level", "width", "chances", "rests", "prior")),
    )


class _Curve(ctypes.Structure):
    _fields_ = (("context", c_int64), ("count", c_int64), ("seconds", c_double * EXACT_ROWS))


class _Core(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("bank", "costs", "told")),
        ("margin", c_double),
        *((name, c_int64) for name in ("tokens", "wanted_context", "wanted_rows")),
        ("query", c_int64 * (4 + _LOOK * _MOST_LOOKS)),
        ("finished", ctypes.c_char * (_ROUND.size * _MOST_FINISHED)),
        ("labels", c_double * _MOST_LABELS),
        ("curves", _Curve * _NUM_CURVES),
    )


@cache
def load_library() -> ctypes.CDLL | str:
    """The compiled pacer, or the reason why there is none."""
    library = compiled.load(_SOURCES, ctypes.PyDLL)
    if not isinstance(library, str):
        one = [c_void_p, c_int64, c_void_p, c_void_p, c_void_p, *[c_int64] * 4, c_void_p]
        told = (("plan", one[:2]), ("plan_one", one), ("take_in", [c_void_p, c_int64, c_int64]), ("size", [c_int]))
        for name, arguments in told:
            function = getattr(library, f"paceline_pacer_{name}")
            function.restype, function.argtypes = c_int64, arguments
    return library


@cache
def _prior_table(tag: str) -> Any:
    rates = [rate for bucket in range(NUM_BUCKETS) for rate in prior_rates(bucket, tag)]
    return (c_double * (NUM_BUCKETS * POSITIONS))(*rates)


def _in_place(given: Sequence[float]) -> Any:
    """Chances as C reads them: often they lie so already."""
    if isinstance(given, Array):
        return given
    return (c_double * len(given))(*given) if given else None


@dataclass(slots=True)
class _Entry:
    """A drafter of a request."""

    standing: int
    own: int
    running: RunningDraft


@dataclass(slots=True)
class _Request:
    """A request as C knows it."""

    lane: Lane
    lane_at: int
    task: str
    entries: dict[str, _Entry]


class Core:
    """The pacer's usual round. It shares its parts with the pacer that it belongs to, and keeps addresses of them."""

    def __init__(
        self,
        library: ctypes.CDLL,
        costs: LearnedCosts,
        quality: DraftQuality,
        safe: bank.TimeBank,
        probes: ProbeSchedule,
        lanes: Mapping[tuple[str, int], Lane],
        margin: float,
    ) -> None:
        self._costs, self._quality, self._probes, self._lanes = costs, quality, probes, lanes
        self._bank = safe  # kept alive
        self._told = array("d", (0.0, 0.0))
        """Expected tokens and seconds of the plan that C made last."""
        self._core = core = _Core(addressof(safe), addressof(costs.state), self._told.buffer_info()[0], margin)
        for curve in core.curves:
            curve.context = -1
        self._plan: Callable[..., int] = library.paceline_pacer_plan
        self._plan_one: Callable[..., int] = library.paceline_pacer_plan_one
        self._take_in: Callable[..., int] = library.paceline_pacer_take_in
        self._at = ctypes.byref(core)
        start = addressof(core)
        self._finished = memoryview((ctypes.c_char * _Core.finished.size).from_address(start + _Core.finished.offset)).cast("B")
        self._labels = core.labels
        self._requests: dict[int, _Request] = {}
        self._standings: dict[tuple[str, str], _Standing] = {}
        self._scale = costs.scale

    def plan(self, context: RoundContext, tokens: int, running: dict[int, RunningDraft]) -> Plan | None:
        """As `Pacer.plan`. None: ask Python, where nothing was changed.

        tokens: emitted so far; running: the drafts of requests, to note this one in.
        """
        request = self._requests.get(context.request_id) or self._meet(context.request_id, context.task)
        length, most = context.context_length, context.max_draft
        entry: _Entry | None
        if request is None or request.task != context.task or most >= EXACT_ROWS:
            return None
        if len(context.outlooks) == 1 and (outlook := context.outlooks[0]).available > 0:  # the usual case, without lists
            entry = request.entries.get(outlook.drafter) or self._enter(context.request_id, request, outlook.drafter)
            if outlook.catch_up:
                return None
            at, standing, own, known = request.lane_at, entry.standing, entry.own, _in_place(outlook.chances)
            found = self._plan_one(self._at, tokens, at, standing, own, length, most, outlook.available, outlook.signal, known)
        else:
            able = [o for o in context.outlooks if o.available > 0]
            if len(able) > _MOST_LOOKS or any(o.catch_up for o in able):
                return None
            entries = [request.entries.get(o.drafter) or self._enter(context.request_id, request, o.drafter) for o in able]
            known = [_in_place(o.chances) for o in able]  # kept alive
            looks = [
                value
                for e, o, k in zip(entries, able, known, strict=True)
                for value in (e.standing, e.own, o.available, o.signal, addressof(k) if k is not None else 0)
            ]
            self._core.query[: 4 + len(looks)] = [request.lane_at, length, most, len(able), *looks]
            found = self._plan(self._at, tokens)
            entry = entries[found >> 16] if entries else None
        if found == _NEED_CURVE:
            self._fill_curve()
            return self.plan(context, tokens, running)
        kind = found & 0xFF
        if kind >= _DRAFT and entry is not None:
            running[context.request_id] = chosen = entry.running
            verb = "drafting" if kind == _DRAFT else "probing"
            emitted, seconds = self._told
            return Plan(chosen.drafter, found >> 8 & 0xFF, verb, emitted, seconds, kind == _PROBE)
        if kind >= _POOR:
            return Plan(None, 0, _WHY_PLAIN[kind], 1.0, self._told[1])
        return _ALWAYS.get(kind)

    def take_in(self, records: Sequence[StepRecord], tokens: int, running: dict[int, RunningDraft]) -> int | None:
        """As `Pacer._take_in`, and what `offers.state_of` tells then. None: ask Python, where nothing was changed."""
        if self._scale != self._costs.scale:
            self._scale = self._costs.scale
            for curve in self._core.curves:
                curve.context = -1
        if len(records) > _MOST_FINISHED or not self._gather(records, running):
            return None
        done = self._take_in(self._at, tokens, len(records))
        for _ in records:  # each may need costs of its own
            if done == _NEED_CURVE:
                self._fill_curve()
                done = self._take_in(self._at, tokens, len(records))
        if done & 0xFF != _DONE:
            return None
        for record in records:
            if record.drafter is not None:
                running.pop(record.request_id, None)
        return done >> 8

    def forget(self, request_id: int) -> None:
        """The request ended."""
        self._requests.pop(request_id, None)

    def _gather(self, records: Sequence[StepRecord], running: dict[int, RunningDraft]) -> bool:
        """Write the records down as C reads them; False where it cannot take them in."""
        at = used = 0
        for record in records:
            request = self._requests.get(record.request_id) or self._meet(record.request_id, record.task)
            if request is None or request.task != record.task or record.batch_size != 1:
                return False
            standing = own = told = path = 0
            if record.drafter is not None:
                run = running.get(record.request_id)
                if run is None or run.catch_up or run.drafter != record.drafter:
                    return False
                entry = request.entries.get(record.drafter) or self._enter(record.request_id, request, record.drafter)
                standing, own, given = entry.standing, entry.own, record.chances or record.acceptance
                told, path = len(given), sum([1 << node for node in record.path])
                if told > _MOST_GIVEN or used + told > _MOST_LABELS or path >> 64:
                    return False
                self._labels[used : used + told] = given
                used += told
            elif record.batch_rows > 1:
                return False
            _ROUND.pack_into(
                self._finished,
                at,
                request.lane_at,
                standing,
                own,
                record.context_length,
                record.num_planned,
                record.num_drafted,
                record.num_accepted,
                record.num_emitted,
                record.signal,
                record.batch_rows,
                record.num_levels,
                record.truncated * _TRUNCATED | record.probe * _PROBING | record.warmup * _WARMUP | bool(record.chances) * _KNOWS,
                told,
                path,
                record.draft_seconds,
                record.verify_seconds,
                record.control_seconds,
                record.round_seconds,
                record.expected_seconds,
            )
            at += _ROUND.size
        return True

    def _meet(self, request_id: int, task: str) -> _Request | None:
        """Make a request known, unless its task is new."""
        lane = self._lanes.get((task, 0))
        if lane is None:
            return None
        request = self._requests[request_id] = _Request(lane, addressof(lane.state), task, {})
        return request

    def _enter(self, request_id: int, request: _Request, drafter: str) -> _Entry:
        """Make a drafter of a request known."""
        standing = self._standings.get((request.task, drafter))
        if standing is None:
            standing = self._standings[request.task, drafter] = self._stand(request, drafter)
        own = addressof(self._quality.acceptance.own(request_id, drafter).state)
        entry = request.entries[drafter] = _Entry(addressof(standing), own, RunningDraft(drafter, request.task))
        return entry

    def _stand(self, request: _Request, drafter: str) -> _Standing:
        task, acceptance = request.task, self._quality.acceptance
        return _Standing(
            tuple(addressof(acceptance.room(task, drafter, bucket).state) for bucket in range(NUM_BUCKETS)),
            tuple(addressof(self._probes.state((task, drafter, bucket))) for bucket in range(NUM_BUCKETS)),
            line=addressof(self._costs.line(drafter)),
            level=addressof(acceptance.level(drafter, task)),
            width=addressof(self._quality.width(drafter)),
            chances=addressof(self._quality.chances(drafter, task)),
            rests=addressof(request.lane.rests(drafter)),
            prior=addressof(_prior_table(temperature_tag(task))),
        )

    def _fill_curve(self) -> None:
        """Hand over measured costs that C asked for."""
        bucket, rows = self._core.wanted_context, self._core.wanted_rows
        curve = self._core.curves[bucket % _NUM_CURVES]
        curve.context, curve.count = bucket, rows
        curve.seconds[:rows] = self._costs.measured(1, rows - 1, bucket << CONTEXT_SHIFT)[:rows]

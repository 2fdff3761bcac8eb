"""Recorded rounds as JSON lines, what can be learnt from them, and the world that they replay as (ours).

A file holds one header line (schema, controller, cost table) and one line a round: outlooks, features of the drafted tokens, and
the `StepRecord`. No text and no token ids. It is written next to its place and moved there when complete, so a file under the
final name is whole; an interrupted recording stays readable under the name with `.part`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Protocol, TextIO

from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable, DraftCost
from paceline.errors import OptionError, ResourceError
from paceline.records import DraftFeatures, Outlook, Plan, StepRecord
from paceline.study.regimes import CPU_NATIVE, MAX_DRAFT, Regime, Stream

SCHEMA = "paceline.trace/1"
_TUPLES = ("confidences", "acceptance", "divergence", "relaxed", "chances", "path")
_LONG_LAG = 16
"""Tokens to catch up on, from which a round tells what catching up costs."""
_RECORD_FIELDS = {f.name for f in fields(StepRecord)}


@dataclass(frozen=True, slots=True)
class Round:
    """One recorded round."""

    record: StepRecord
    features: tuple[DraftFeatures, ...] = ()
    """Of the drafted tokens, as far as the drafter showed them."""
    outlooks: tuple[Outlook, ...] = ()

    @property
    def labels(self) -> tuple[float, ...]:
        """As in `StepRecord.labels`."""
        return self.record.labels


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole recording, rounds in the order in which they ended."""

    rounds: tuple[Round, ...]
    controller: str = ""
    costs: CostTable | None = None


class RoundSink(Protocol):
    """Where `Tracing` puts finished rounds."""

    def add(self, finished: Round) -> None: ...


class TraceWriter:
    """Streams rounds to a file. Use as a context manager: leaving it normally puts the file in place."""

    def __init__(self, path: str | Path, controller: str, costs: CostTable | None) -> None:
        """Raises ResourceError when the file cannot be written."""
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        """Where the rounds are until the recording is complete."""
        try:
            self._file: TextIO = self.part.open("w", encoding="utf-8")
        except OSError as error:
            raise self._refused(error) from error
        table = costs.to_json() if costs is not None else None
        self._write({"schema": SCHEMA, "controller": controller, "costs": table})

    def _refused(self, error: OSError) -> ResourceError:
        return ResourceError(f"trace = {str(self.path)!r}: cannot be written ({error.strerror}); choose another place")

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error

    def add(self, finished: Round) -> None:
        """Append one round. Raises ResourceError when the disk refuses."""
        record = {k: v for k, v in asdict(finished.record).items() if k != "reason"}
        shown = [[f.position, f.max_prob, f.token_prob, f.entropy, f.margin] for f in finished.features]
        outlooks = [[o.drafter, o.available, o.signal, o.catch_up] for o in finished.outlooks]
        self._write({"record": record, "features": shown, "outlooks": outlooks})

    def close(self) -> None:
        """Finish: the file appears under its name, whole."""
        self._file.close()
        try:
            os.replace(self.part, self.path)
        except OSError as error:
            raise self._refused(error) from error

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class Tracing(Controller):
    """A controller that decides as another one does, and writes down every round (the time to write counts as its own)."""

    def __init__(self, inner: Controller, writer: RoundSink) -> None:
        self.name = inner.name
        self.inner = inner
        self._writer = writer
        self._outlooks: dict[int, tuple[Outlook, ...]] = {}
        self._features: dict[int, list[DraftFeatures]] = {}

    def plan_unseen(self, task: str, batch_size: int) -> Plan | None:
        return self.inner.plan_unseen(task, batch_size)

    def plan(self, context: RoundContext) -> Plan:
        self._outlooks[context.request_id] = context.outlooks
        self._features[context.request_id] = []
        return self.inner.plan(context)

    def plan_batch(self, contexts: Sequence[RoundContext]) -> list[Plan]:
        for context in contexts:
            self._outlooks[context.request_id] = context.outlooks
            self._features[context.request_id] = []
        return self.inner.plan_batch(contexts)

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool:
        self._features.setdefault(request_id, []).append(features)
        return self.inner.keep_drafting(request_id, features)

    def observe(self, record: StepRecord) -> None:
        features = self._features.pop(record.request_id, [])[: record.num_drafted]
        self._writer.add(Round(record, tuple(features), self._outlooks.pop(record.request_id, ())))
        self.inner.observe(record)

    def finish(self, request_id: int) -> None:
        self._features.pop(request_id, None)
        self._outlooks.pop(request_id, None)
        self.inner.finish(request_id)


class Survey(Controller):
    """Records best: long drafts by every drafter in turn, so that a replay knows what each of them would have got accepted."""

    name = "survey"

    def __init__(self, num_draft: int = MAX_DRAFT) -> None:
        self._num_draft = num_draft
        self._turn = 0

    def plan(self, context: RoundContext) -> Plan:
        able = [o for o in context.outlooks if o.available > 0]
        if not able or context.max_draft < 1:
            return Plan(None, 0, "survey: nothing to draft")
        self._turn += 1
        outlook = able[self._turn % len(able)]
        return Plan(outlook.drafter, min(self._num_draft, context.max_draft, outlook.available), "survey", probe=True)


def read_trace(path: str | Path) -> Trace:
    """Read a recording; an unfinished last line (of an interrupted one) is left out.

    Raises OptionError when the file cannot be read, is no trace, or has another schema.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        whole = [json.loads(line) for line in text.split("\n")[:-1]]
        header = whole[0]
        if header.get("schema") != SCHEMA:
            raise OptionError(
                f"trace = {str(path)!r}: schema {header.get('schema')!r}, this version reads {SCHEMA!r}; record it anew"
            )
        costs = CostTable.from_json(header["costs"]) if header["costs"] else None
        return Trace(tuple(map(_round_from_json, whole[1:])), header["controller"], costs)
    except (OSError, IndexError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"trace = {str(path)!r}: not a readable trace ({error}); record one with `paceline trace`") from error


def _round_from_json(line: dict[str, Any]) -> Round:
    known: dict[str, Any] = {k: tuple(v) if k in _TUPLES else v for k, v in line["record"].items() if k in _RECORD_FIELDS}
    features = tuple(DraftFeatures(*f) for f in line["features"])
    return Round(StepRecord(**known), features, tuple(Outlook(*o) for o in line["outlooks"]))


def write_parquet(trace: Trace, path: str | Path) -> None:
    """The rounds as a Parquet table, one row each, features as lists.

    Raises OptionError when pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise OptionError("parquet: needs pyarrow, which is not installed; write .jsonl instead")
    rows = [
        {**asdict(r.record), **{f"draft_{name}": [getattr(f, name) for f in r.features] for name in ("max_prob", "entropy")}}
        for r in trace.rounds
    ]
    table = import_module("pyarrow").Table.from_pylist(rows)
    import_module("pyarrow.parquet").write_table(table, path)


def acceptance_by_depth(rounds: Iterable[Round], drafter: str) -> list[float]:
    """Chance of acceptance at depth 1, 2, ... given that all before were accepted, from observed positions alone.

    The product is the Kaplan-Meier estimate of survival: a fully accepted (or cut) draft is censored at its length. Each depth
    leans on the one before with a weight of 3 tokens, and the first on 0.5; depths never seen repeat the last estimate.
    """
    hits, seen = [0.0] * MAX_DRAFT, [0] * MAX_DRAFT
    for finished in rounds:
        if finished.record.drafter == drafter:
            for j, label in enumerate(finished.labels[:MAX_DRAFT]):
                hits[j] += label
                seen[j] += 1
    estimates: list[float] = []
    before = 0.5
    for j in range(MAX_DRAFT):
        before = (hits[j] + 3 * before) / (seen[j] + 3)
        estimates.append(before)
    return estimates


def first_by_signal(rounds: Iterable[Round], mean: float) -> dict[int, float]:
    """Chance that a first token is accepted, by the drafter's signal; each estimate leans on `mean` with a weight of 3 rounds."""
    seen: dict[int, list[float]] = {}
    for finished in rounds:
        if finished.labels:
            seen.setdefault(finished.record.signal, []).append(finished.labels[0])
    return {signal: (sum(hits) + 3 * mean) / (len(hits) + 3) for signal, hits in seen.items()}


class _StreamBuilder:
    """Collects one drafter's text positions; see `trace_regime` for how gaps are filled."""

    def __init__(self, drafter: str, rounds: Sequence[Round], rng: random.Random) -> None:
        self.drafter = drafter
        self.hazard = acceptance_by_depth(rounds, drafter)
        own = [r for r in rounds if r.record.drafter == drafter]
        self._first = first_by_signal(own, self.hazard[0])
        pairs = [(f, j < r.record.num_accepted) for r in own for j, f in enumerate(r.features[: len(r.labels)])]
        self._shown = {kind: [f for f, accepted in pairs if accepted == kind] for kind in (True, False)}
        self.has_features = bool(pairs)
        self._rng = rng
        self.accept: list[float] = []
        self.available: list[int] = []
        self.signal: list[int] = []
        self.features: list[DraftFeatures] = []

    def add(self, finished: Round) -> None:
        """Append the text positions that a round emitted."""
        record = finished.record
        outlook = next((o for o in finished.outlooks if o.drafter == self.drafter), Outlook(self.drafter, 0))
        known = finished.labels if record.drafter == self.drafter else ()
        depth = 0
        for j in range(record.num_emitted):
            accepted = j < record.num_accepted if j < len(known) else self._guess(depth, outlook.signal)
            depth = depth + 1 if accepted else 0
            self.accept.append(1.0 if accepted else 0.0)
            self.available.append(max(outlook.available - j, 0))
            self.signal.append(outlook.signal)
            if self.has_features:
                seen = finished.features[j] if j < min(len(known), len(finished.features)) else self._borrow(accepted)
                self.features.append(seen)

    def _guess(self, depth: int, signal: int) -> bool:
        """A position that this drafter was not seen at, `depth` tokens into a draft that went well so far."""
        chance = self.hazard[min(depth, MAX_DRAFT - 1)] if depth else self._first.get(signal, self.hazard[0])
        return self._rng.random() < chance

    def _borrow(self, accepted: bool) -> DraftFeatures:
        return self._rng.choice(self._shown[accepted] or self._shown[not accepted])

    def stream(self) -> Stream:
        return Stream(
            drafter=self.drafter,
            accept=self.accept,
            coins=[0.5] * len(self.accept),
            available=[min(a, MAX_DRAFT) for a in self.available],
            signal=self.signal,
            max_prob=[f.max_prob for f in self.features],
            token_prob=[f.token_prob for f in self.features],
        )


def trace_regime(trace: Trace, name: str = "trace", seed: int = 0) -> Regime:
    """The world that a trace replays as: text positions of all requests, one after another.

    **Censoring.** A round of A accepted tokens out of k tells that A positions would be accepted and, if A < k and no stop
    condition cut it, that the next one would not. What it does not tell (the position after a fully accepted draft, all positions
    of plain rounds and, for a drafter, of other drafters' rounds) is drawn once, with `seed`, from the drafter's own estimates:
    of a first token by its signal (`first_by_signal`), of later ones by depth (`acceptance_by_depth`). Its features are borrowed
    from observed tokens of the same outcome. So acceptance is taken to belong to text positions, not to the depth at which they
    are drafted. Record with long drafts by every drafter in turn (`Survey`) to leave little to be drawn. Requests are laid end to
    end and cut anew into equal ones of their mean length, one at a time.

    Availability (for n-grams) at a position inside a recorded draft is what was left of that draft; costs are the recorded
    table, its forwards and each drafter scaled by the median ratio of recorded to predicted times; catching up costs what rounds
    with a long lag took beyond drafting. Raises OptionError for a trace without rounds.
    """
    rounds = [r for _, own in sorted(_by_request(trace.rounds).items()) for r in own]
    if not rounds:
        raise OptionError("trace: holds no rounds; record some first")
    rng = random.Random(seed)
    drafters = list(dict.fromkeys(o.drafter for r in rounds for o in r.outlooks)) or sorted(
        {r.record.drafter for r in rounds if r.record.drafter}
    )
    builders = [_StreamBuilder(drafter, rounds, rng) for drafter in drafters]
    for finished in rounds:
        for builder in builders:
            builder.add(finished)
    streams = tuple(builder.stream() for builder in builders)
    requests = len(_by_request(rounds))
    tokens = len(streams[0].accept) if streams else 0
    return Regime(
        name=name,
        description=f"recorded: {requests} requests, {tokens} tokens",
        curve=CPU_NATIVE,
        build=lambda _rng, _n: streams,
        request_tokens=max(tokens // requests, 2),
        prompt_tokens=int(median(own[0].record.context_length for own in _by_request(rounds).values())),
        costs=_recorded_costs(trace),
    )


def _by_request(rounds: Iterable[Round]) -> dict[int, list[Round]]:
    grouped: dict[int, list[Round]] = {}
    for finished in rounds:
        grouped.setdefault(finished.record.request_id, []).append(finished)
    return grouped


def _recorded_costs(trace: Trace) -> CostTable | None:
    if trace.costs is None:
        return None
    table = CostTable.from_json(trace.costs.to_json())
    factor = _median_ratio(
        (r.record.verify_seconds, table.t_verify(r.record.batch_rows or r.record.num_drafted + 1, r.record.context_length))
        for r in trace.rounds
        if not r.record.warmup
    )
    table.verify = [[seconds * factor for seconds in row] for row in table.verify]
    for drafter, cost in table.drafters.items():
        own = [(r.record, _lag(r)) for r in trace.rounds if r.record.drafter == drafter]
        usual = _median_ratio((r.draft_seconds, cost.seconds(r.num_drafted, lag)) for r, lag in own if lag < _LONG_LAG)
        per_token, fixed = cost.per_token * usual, cost.fixed * usual
        late = [(r.draft_seconds - fixed - per_token * r.num_drafted, lag) for r, lag in own if lag >= _LONG_LAG]
        per_catch_up = _median_ratio(late) if late else cost.per_catch_up * usual
        table.drafters[drafter] = DraftCost(per_token, fixed, per_catch_up)
    return table


def _lag(finished: Round) -> int:
    return next((o.catch_up for o in finished.outlooks if o.drafter == finished.record.drafter), 0)


def _median_ratio(times: Iterable[tuple[float, float]]) -> float:
    """Median of recorded over predicted seconds; 1 where there is nothing to compare."""
    ratios = [recorded / predicted for recorded, predicted in times if recorded > 0 and predicted > 0]
    return median(ratios) if ratios else 1.0

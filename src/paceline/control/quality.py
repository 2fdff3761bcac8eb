"""What the pacer has learnt of drafts: how often their tokens are accepted, how well they know it, and how wide their trees are."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure
from typing import Any

from paceline.control.acceptance import AcceptanceModel, Shift, add_up, observed_labels, signal_bucket, temperature_tag
from paceline.control.chances import ChanceTable, step_rates
from paceline.control.confidence import Calibrated
from paceline.control.pricing import node_rates
from paceline.control.shared import doubles, wholes
from paceline.records import DraftFeatures, StepRecord

_CALIBRATED = 16
"""Labels from which on a drafter's confidence may end its drafts."""
_FADING, _WEIGHT = 0.96, 6.0
"""Of a request's own shift: fading for each label, and labels that the calibration counts for."""


class Width(Structure):
    """Nodes a level of a drafter's trees; 1 of chains."""

    _fields_ = (*doubles("nodes"), *wholes("_known"))
    nodes: float
    _known: int

    def __init__(self) -> None:
        super().__init__(1.0)

    def update(self, drafted: int, levels: int) -> None:
        """Count a draft. Chains of a drafter that never proposed a tree do not matter."""
        if 0 < levels < drafted or self._known:
            width = drafted / max(levels, 1)
            self.nodes = 0.9 * (self.nodes if self._known else width) + 0.1 * width
            self._known = 1


class DraftQuality:
    """Estimates of all drafters, from finished rounds."""

    def __init__(self) -> None:
        self.acceptance = AcceptanceModel()
        self._confident: dict[str, Calibrated] = {}
        self._surer: dict[int, dict[str, Shift]] = {}
        """By how much a request's drafts are right more or less often than their confidence says, by drafter."""
        self._widths: dict[str, Width] = {}
        self._chances: dict[str, ChanceTable] = {}

    def rates(
        self, request_id: int, task: str, drafter: str, bucket: int, count: int, chances: Sequence[float] = ()
    ) -> list[float]:
        """Chances a_1 .. a_count of positions, or of a tree's nodes in their order, given that those before were accepted.

        chances: what the drafter itself says, as in `Outlook.chances`.
        """
        if chances:
            believed = self.chances(drafter, task).believed(chances[:count])
            return step_rates(self.acceptance.shifted(request_id, drafter, believed))
        rates = self.acceptance.rates(request_id, task, drafter, bucket, count)
        nodes = self.width(drafter).nodes
        return node_rates(rates, nodes) if nodes > 1.0 else rates

    def chances(self, drafter: str, task: str) -> ChanceTable:
        """How far a drafter's own chances can be believed, at the task's temperature."""
        tag = temperature_tag(task)
        table = self._chances.get(drafter + tag)
        if table is None:
            table = self._chances[drafter + tag] = ChanceTable(float(tag[1:]) if tag else 0.0)
        return table

    def width(self, drafter: str) -> Width:
        """How wide its trees are."""
        width = self._widths.get(drafter)
        if width is None:
            width = self._widths[drafter] = Width()
        return width

    @property
    def knows_confidence(self) -> bool:
        """Whether some drafter states how sure it is."""
        return bool(self._confident)

    def doubt(self, request_id: int, drafter: str, rate: float, gap: float) -> float:
        """See `AcceptanceModel.doubt`."""
        return self.acceptance.doubt(request_id, drafter, rate, gap)

    def confidence(self, drafter: str, task: str) -> Calibrated | None:
        """What is known of a drafter that states how sure it is, at the task's temperature; None of another one."""
        return self._confident.get(drafter + temperature_tag(task))

    def ends_drafts(self, drafter: str, task: str) -> bool:
        """Whether its confidence is known well enough to end its drafts, and it asks."""
        confident = self.confidence(drafter, task)
        return confident is not None and confident.asks and confident.model.labels >= _CALIBRATED

    def states_confidence(self, drafter: str, task: str) -> Calibrated:
        """As `confidence`, of a drafter that does so from now on."""
        key = drafter + temperature_tag(task)
        confident = self._confident.get(key)
        if confident is None:
            confident = self._confident[key] = Calibrated()
        return confident

    def chance(self, request_id: int, drafter: str, confident: Calibrated, features: DraftFeatures) -> float:
        """Chance that the token just drafted is accepted, given that those before it were."""
        chance = confident.model.chance(features.position, features.max_prob)
        shifts = self._surer.get(request_id)
        shift = shifts.get(drafter) if shifts is not None else None
        return shift.apply([chance])[0] if shift is not None else chance

    def learn(self, records: Sequence[StepRecord], seconds: Sequence[float], now: int) -> list[bool]:
        """Count rounds of one request in which one drafter drafted, of these seconds; now: tokens emitted so far. Whether each
        said something about acceptance."""
        first = records[0]
        request, task, drafter = first.request_id, first.task, first.drafter or ""
        if any(record.chances for record in records):
            return self._learn_chances(records, now)
        labels = [observed_labels(record) for record in records]
        rounds = [(signal_bucket(record.signal), known) for record, known in zip(records, labels, strict=True)]
        self.acceptance.update_rounds(request, task, drafter, rounds, now)
        for record, known, took in zip(records, labels, seconds, strict=True):
            self.width(drafter).update(record.num_drafted, record.num_levels)
            confident = self.confidence(drafter, task) if record.confidences else None
            if confident is not None and confident.asks:  # of others, confidence decides nothing
                self._learn_confidence(record, confident, known, took, now)
        return [len(known) > 0 for known in labels]

    def _learn_chances(self, records: Sequence[StepRecord], now: int) -> list[bool]:
        request, drafter = records[0].request_id, records[0].drafter or ""
        table = self.chances(drafter, records[0].task)
        count, hits, expected = 0, 0.0, 0.0
        for record in records:
            if record.truncated:
                continue
            count += len(record.chances)
            hits += len(record.path)
            expected += add_up(table.believed(record.chances))
            table.update(record.chances, record.path)
        if count:
            self.acceptance.own(request, drafter).update(count, hits, expected, now)
        return [not record.truncated for record in records]

    def _learn_confidence(
        self, record: StepRecord, confident: Calibrated, labels: Sequence[float], seconds: float, now: int
    ) -> None:
        if labels:
            self._learn_surety(record, confident, labels, now)
        confident.model.update(record.confidences, labels)
        if record.batch_size == 1 and not (record.truncated or record.warmup or record.probe):
            confident.delivered.update(record, seconds)

    def _learn_surety(self, record: StepRecord, confident: Calibrated, labels: Sequence[float], now: int) -> None:
        expected = sum(
            confident.model.chance(j, max_prob) for j, (max_prob, _) in enumerate(zip(record.confidences, labels, strict=False), 1)
        )
        shifts = self._surer.setdefault(record.request_id, {})
        shift = shifts.get(record.drafter or "")
        if shift is None:
            shift = shifts[record.drafter or ""] = Shift(_FADING, _WEIGHT)
        count = min(len(labels), len(record.confidences))
        shift.update(count, sum(labels[:count]), expected, now)

    def forget(self, request_id: int) -> None:
        """The request ended."""
        self.acceptance.forget(request_id)
        self._surer.pop(request_id, None)

    def calibration(self) -> list[dict[str, Any]]:
        """Reliability diagrams as rows: predicted and observed acceptance of each drafter that states its confidence."""
        return [
            {"drafter": drafter, "predicted": round(b.predicted, 3), "accepted": round(b.accepted, 3), "labels": b.labels}
            for drafter, confident in self._confident.items()
            for b in confident.model.reliability()
        ]

    def snapshot(self) -> dict[str, Any]:
        """As plain data for a stored profile."""
        curves = {drafter: confident.model.snapshot() for drafter, confident in self._confident.items()}
        chances = {drafter: table.snapshot() for drafter, table in self._chances.items()}
        return {"version": 1, "acceptance": self.acceptance.snapshot(), "confidence": curves, "chances": chances}

    def restore(self, data: dict[str, Any]) -> None:
        """Begin with a stored profile. Raises KeyError, TypeError or ValueError on data that `snapshot` did not write."""
        if data["version"] != 1:
            raise ValueError(f"pacer profile: version {data['version']!r} is unknown, expected 1")
        confident = {drafter: Calibrated() for drafter in data["confidence"]}
        for drafter, curve in data["confidence"].items():
            confident[drafter].model.restore(curve)
        chances = {drafter: ChanceTable() for drafter in data.get("chances", {})}
        for drafter, table in chances.items():
            table.restore(data["chances"][drafter])
        self.acceptance.restore(data["acceptance"])
        self._confident.update(confident)
        self._chances.update(chances)

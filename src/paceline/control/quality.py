"""What the pacer has learnt of drafts: how often their tokens are accepted, how well they know it, and how wide their trees are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paceline.control.acceptance import AcceptanceModel, Shift, observed_labels, signal_bucket, temperature_tag
from paceline.control.confidence import Calibrated
from paceline.control.pricing import node_rates
from paceline.records import DraftFeatures, StepRecord

_CALIBRATED = 16
"""Labels from which on a drafter's confidence may end its drafts."""
_FADING, _WEIGHT = 0.96, 6.0
"""Of a request's own shift: fading for each label, and labels that the calibration counts for."""


class DraftQuality:
    """Estimates of all drafters, from finished rounds."""

    def __init__(self) -> None:
        self._acceptance = AcceptanceModel()
        self._confident: dict[str, Calibrated] = {}
        self._surer: dict[int, dict[str, Shift]] = {}
        """By how much a request's drafts are right more or less often than their confidence says, by drafter."""
        self._widths: dict[str, float] = {}
        """Nodes a level of drafters that propose trees."""

    def rates(self, request_id: int, task: str, drafter: str, bucket: int, count: int) -> list[float]:
        """Chances a_1 .. a_count of positions, or of a tree's nodes in their order, given that those before were accepted."""
        rates = self._acceptance.rates(request_id, task, drafter, bucket, count)
        width = self._widths.get(drafter, 1.0)
        return node_rates(rates, width) if width > 1.0 else rates

    def doubt(self, request_id: int, drafter: str, rate: float, gap: float) -> float:
        """See `AcceptanceModel.doubt`."""
        return self._acceptance.doubt(request_id, drafter, rate, gap)

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
        labels = [observed_labels(record) for record in records]
        rounds = [(signal_bucket(record.signal), known) for record, known in zip(records, labels, strict=True)]
        self._acceptance.update_rounds(request, task, drafter, rounds, now)
        for record, known, took in zip(records, labels, seconds, strict=True):
            if 0 < record.num_levels < record.num_drafted or drafter in self._widths:
                width = record.num_drafted / max(record.num_levels, 1)
                self._widths[drafter] = 0.9 * self._widths.get(drafter, width) + 0.1 * width
            confident = self.confidence(drafter, task) if record.confidences else None
            if confident is not None and confident.asks:  # of others, confidence decides nothing
                self._learn_confidence(record, confident, known, took, now)
        return [len(known) > 0 for known in labels]

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
        self._acceptance.forget(request_id)
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
        return {"version": 1, "acceptance": self._acceptance.snapshot(), "confidence": curves}

    def restore(self, data: dict[str, Any]) -> None:
        """Begin with a stored profile. Raises KeyError, TypeError or ValueError on data that `snapshot` did not write."""
        if data["version"] != 1:
            raise ValueError(f"pacer profile: version {data['version']!r} is unknown, expected 1")
        confident = {drafter: Calibrated() for drafter in data["confidence"]}
        for drafter, curve in data["confidence"].items():
            confident[drafter].model.restore(curve)
        self._acceptance.restore(data["acceptance"])
        self._confident.update(confident)

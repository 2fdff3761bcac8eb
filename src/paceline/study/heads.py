"""Fitting the heads of the trained stop rules from recorded rounds, and judging them on rounds held out (ours).

`benchmarks/fit_heads.py` is the whole recipe, from traces to the files in `paceline/control/fitted`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from paceline.control.heads import FEATURES, LogisticHead
from paceline.errors import OptionError
from paceline.study.trace import Round

_EPS = 1e-6


def training_rows(rounds: Iterable[Round], inputs: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(inputs [N, F], labels [N]) float64 of all observed tokens that have features.

    inputs: names in `heads.FEATURES`. Tokens past the first rejection are left out: their acceptance is unknown.
    """
    recent: dict[int, float] = {}
    rows: list[list[float]] = []
    targets: list[float] = []
    for finished in rounds:
        record = finished.record
        last = recent.get(record.request_id, 1.0)
        for feature, label in zip(finished.features, finished.labels, strict=False):
            rows.append([FEATURES[name](feature, last) for name in inputs])
            targets.append(label)
        if record.num_drafted and not record.truncated:
            recent[record.request_id] = record.num_accepted / record.num_drafted
    return np.asarray(rows, dtype=np.float64).reshape(-1, len(inputs)), np.asarray(targets, dtype=np.float64)


def fit_head(rounds: Iterable[Round], inputs: Sequence[str], *, l2: float = 1e-3, note: str = "") -> LogisticHead:
    """Logistic regression of acceptance on draft features, by damped Newton steps; labels may be probabilities.

    l2: penalty on the weights of the standardised inputs, per token. Raises OptionError when no token has features.
    """
    x, y = training_rows(rounds, inputs)
    if len(y) == 0:
        raise OptionError("trace: no drafted token has features; record with a drafter that has confidences")
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread[spread < 1e-9] = 1.0
    design = np.concatenate([(x - mean) / spread, np.ones((len(y), 1))], axis=1)
    penalty = np.full(design.shape[1], l2 * len(y))
    penalty[-1] = 1e-6 * len(y)
    weights = np.zeros(design.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -40, 40)))
        gradient = design.T @ (chance - y) + penalty * weights
        curvature = (design * (chance * (1 - chance) + 1e-6)[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights -= step / max(1.0, float(np.abs(step).max()))
        if float(np.abs(step).max()) < 1e-8:
            break
    slopes = weights[:-1] / spread
    bias = float(weights[-1] - slopes @ mean)
    return LogisticHead(tuple(inputs), tuple(float(w) for w in slopes), bias, note or f"fitted on {len(y)} tokens")


def hold_out(rounds: Iterable[Round], every: int = 4) -> tuple[list[Round], list[Round]]:
    """(rounds to fit on, rounds to judge by): every `every`-th request is held out whole, so that no text is in both."""
    fit: list[Round] = []
    held: list[Round] = []
    for finished in rounds:
        (held if finished.record.request_id % every == every - 1 else fit).append(finished)
    return fit, held


@dataclass(frozen=True, slots=True)
class HeadQuality:
    """How well a head predicts acceptance of tokens that it was not fitted on."""

    num_tokens: int
    accepted: float
    """Mean label."""
    predicted: float
    """Mean prediction."""
    log_loss: float
    """Nats a token; labels may be probabilities."""
    constant_log_loss: float
    """Of always predicting `rate`: what a head has to beat."""
    auc: float
    """Chance that an accepted token is rated above a rejected one (ties count half); 0.5 tells nothing."""


def judge(head: LogisticHead, rounds: Iterable[Round], rate: float) -> HeadQuality:
    """Judge a head by rounds it has not seen. rate: mean acceptance of the rounds it was fitted on.

    Raises OptionError when no token has features.
    """
    x, y = training_rows(rounds, head.inputs)
    if len(y) == 0:
        raise OptionError("trace: no drafted token was held out; record more requests")
    predicted = 1 / (1 + np.exp(-np.clip(x @ np.asarray(head.weights) + head.bias, -40, 40)))
    return HeadQuality(
        num_tokens=len(y),
        accepted=float(y.mean()),
        predicted=float(predicted.mean()),
        log_loss=_log_loss(predicted, y),
        constant_log_loss=_log_loss(np.full(len(y), rate), y),
        auc=weighted_auc(predicted, y),
    )


def _log_loss(predicted: np.ndarray, labels: np.ndarray) -> float:
    p = np.clip(predicted, _EPS, 1 - _EPS)
    return float(-(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean())


def weighted_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; a label y in [0, 1] counts as y accepted and 1 - y rejected tokens. 0.5 where one side is empty."""
    values, place = np.unique(scores, return_inverse=True)
    accepted, rejected = np.bincount(place, labels, len(values)), np.bincount(place, 1 - labels, len(values))
    total = accepted.sum() * rejected.sum()
    below = np.cumsum(rejected) - rejected
    return float((accepted * (below + rejected / 2)).sum() / total) if total > 0 else 0.5

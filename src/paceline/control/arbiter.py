"""Delivered speed decides between plain and speculative decoding, whatever the model of costs says (8.2 of the control notes).

Speeds are relative to a plain step (tokens * plain seconds / seconds), so that a growing context needs no special case and
plain decoding has speed 1. Their one weak point is a stale price of the plain step; so that is renewed before a verdict.
"""

from __future__ import annotations

from ctypes import Structure

from paceline.control.shared import doubles, wholes

RENEWAL = 3
"""Plain steps that move the median which their price is."""


def better(current: float, other: float, current_deviation: float, other_deviation: float) -> bool:
    """Whether the other mode's speed exceeds the current one's by more than the margin for noise."""
    return other > current + max(0.05 * current, 0.5 * (current_deviation + other_deviation))


class Estimate(Structure):
    """Running speed of a mode with its mean deviation. A first value replaces; later ones are averaged in."""

    _fields_ = (*doubles("value", "deviation"), *wholes("_known"))
    value: float
    deviation: float
    _known: int

    def update(self, value: float) -> None:
        """Take in the speed of one window."""
        if not self._known:
            self.value, self._known = value, 1
            return
        error = value - self.value
        self.value += 0.3 * error
        self.deviation = 0.7 * self.deviation + 0.3 * abs(error)


class Arbiter(Structure):
    """Watches windows of speculative rounds and forbids speculation for a while where they deliver less than plain decoding.

    Plain rounds do not count: their speed is 1 but for the error of the plain price, which is no fault of speculation. A window is
    long because tokens a round scatter: 32 rounds of 1.35 +- 0.8 tokens are known to a tenth.

    window: rounds of a window; dwell: windows in a row that must agree; retry: tokens of plain decoding after which
    speculation is allowed again; refresh: tokens without a plain round after which one is asked for.
    """

    _fields_ = (
        *wholes("_window", "_dwell", "_retry", "_refresh"),
        ("_estimate", Estimate),
        *doubles("_rounds", "_worth", "_seconds", "_since_plain", "_plain_left", "_banned_for"),
        *wholes("_against"),
    )
    _window: int
    _dwell: int
    _retry: int
    _refresh: int
    _estimate: Estimate
    _rounds: float
    _worth: float
    _seconds: float
    _since_plain: float
    _plain_left: float
    _banned_for: float
    _against: int

    def __init__(self, window: int = 32, dwell: int = 2, retry: int = 256, refresh: int = 512) -> None:
        super().__init__(window, dwell, retry, refresh)

    @property
    def forbids(self) -> bool:
        """Speculation is off, since it delivered less than plain decoding."""
        return self._banned_for > 0.0

    @property
    def wants_plain(self) -> bool:
        """A plain round is due to renew the price of a plain step."""
        return self._plain_left > 0.001

    def renew(self) -> None:
        """Ask for the price of a plain step: the machine is not what it was."""
        self._plain_left = RENEWAL

    def observe(self, plain_seconds: float, num_emitted: float, seconds: float, speculative: bool, weight: float = 1.0) -> None:
        """Count a finished round. plain_seconds: price of a plain step now; weight: share of a round that a record stands for."""
        if speculative:
            self._since_plain += num_emitted
            if self._since_plain >= self._refresh:
                self._plain_left = max(self._plain_left, 1.0)
        else:
            self._since_plain = 0.0
            self._plain_left = max(0.0, self._plain_left - weight)
        if self._banned_for > 0.0:
            self._banned_for -= num_emitted
            return
        if not speculative:
            return
        self._worth += plain_seconds * num_emitted
        self._seconds += seconds
        self._rounds += weight
        if self._rounds > self._window - 0.001:
            self._close_window()

    def _close_window(self) -> None:
        estimate = self._estimate
        value = self._worth / self._seconds if self._seconds > 0.0 else 1.0
        estimate.update(value)
        self._rounds = self._worth = self._seconds = 0.0
        # A bad start that is over already must not count against the present.
        if not (better(estimate.value, 1.0, estimate.deviation, 0.0) and better(value, 1.0, 0.0, 0.0)):
            self._against = 0
            return
        self._against += 1
        self.renew()
        if self._against >= self._dwell:
            self._banned_for = self._retry
            self._against = 0
            self._estimate = Estimate()

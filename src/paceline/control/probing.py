"""When to try again what does not pay: geometric back-off, shared by all requests (8.4 of the control notes)."""

from __future__ import annotations

from collections.abc import Hashable
from ctypes import Structure

from paceline.control.shared import doubles, wholes

FIRST, LAST = 64, 2048
BUDGET, BOOST = 0.001, 32.0
"""See `ProbeSchedule`."""
IN_A_ROW = 4


class ProbeState(Structure):
    """Of one key. Times in emitted tokens."""

    _fields_ = (*wholes("last", "again"), *doubles("interval"))
    last: int
    again: int
    """Probes that follow at once."""
    interval: float
    """0: the key was never met."""


class ProbeSchedule:
    """Intervals in emitted tokens for each key: doubled by a failed probe, reset when the key pays by itself.

    first, last: shortest and longest interval, tokens. budget: share of plain time that the probes of a key may cost, so that
    what is nearly worth its price is tried often, and a change is noticed after `loss / budget` tokens even when the interval
    has grown (8.4, changes of regime). boost: how much more may be spent while the evidence against a key is weak.
    """

    def __init__(self, first: int = FIRST, last: int = LAST, budget: float = BUDGET, boost: float = BOOST) -> None:
        self._first, self._last, self._budget, self._boost = first, last, budget, boost
        self._states: dict[Hashable, ProbeState] = {}

    def state(self, key: Hashable) -> ProbeState:
        """What is kept of a key, met or not."""
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = ProbeState()
        return state

    def due(self, key: Hashable, now: int, loss: float, doubt: float = 0.0) -> bool:
        """Whether a probe may run at `now` emitted tokens.

        loss: plain steps that it is expected to lose; doubt: 0 to 1, how weak the evidence is that it loses at all.
        """
        state = self._met(key, now)
        affordable = loss / (self._budget * (1.0 + self._boost * doubt))
        return state.again > 0 or now - state.last >= min(state.interval, affordable)

    def probed(self, key: Hashable, now: int, accepted: bool) -> None:
        """A probe ran. Accepted ones are followed by more at once, a few in a row; else the next one waits twice as long."""
        state = self._met(key, now)
        state.last = now
        state.again = (state.again + 1) % IN_A_ROW if accepted else 0
        if not state.again:
            state.interval = min(2 * state.interval, self._last)

    def pays(self, key: Hashable, now: int) -> None:
        """The key was chosen by merit: start from the first interval when it stops paying."""
        state = self._met(key, now)
        state.last = now
        state.interval = self._first
        state.again = 0

    def _met(self, key: Hashable, now: int) -> ProbeState:
        state = self.state(key)
        if state.interval == 0.0:
            state.last, state.interval = now, self._first
        return state

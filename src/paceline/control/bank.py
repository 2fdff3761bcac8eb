"""The time bank: a hard bound on what speculation may cost over plain decoding (8.3 of the control notes; ours).

Total time <= (1 + eps) * plain time + start, at every moment, as long as no speculative round takes longer than the loss that
it was granted. The idea is that of conservative bandits (Wu et al. 2016, arXiv 1602.04282). One bank serves an engine: a new
request does not bring a new start. A drafter with a cache of its own brings one reading of a prompt with it (`lend`), once.
"""

from __future__ import annotations

from ctypes import Structure
from math import inf

from paceline.control.shared import doubles, wholes

FORGIVE_EVERY = 32.0
HICCUP = 3.0
"""A round that takes this many times what was expected was interrupted by the machine."""
LONGEST_LOOK = 0.25
"""Plain steps; beyond, it was an interruption of the machine."""
SAVED, MOST_SAVED = 0.5, 4.0
"""Plain steps that an empty bank must hold again before drafts are looked for (looking takes more than it earns meanwhile), and the
most that it saves for a draft that it had to refuse."""


class TimeBank(Structure):
    """Seconds that speculation may still lose.

    eps: share of plain time that may be lost in the long run; start: what may be lost at once, in plain steps; cap: most that
    is kept of earlier gains, in plain steps, so that old successes cannot pay for a long bad stretch. A debt is never larger than
    the start: only an interruption of the machine can make one, and it must not forbid speculation for good.
    """

    _fields_ = (
        *doubles("_eps", "_start", "_cap", "_since", "_forgiven", "_opened_at", "slack", "granted", "saving_for"),
        *wholes("is_open"),
    )
    slack: float
    """(1 + eps) * plain time + start - time so far, but at most the cap; seconds."""
    granted: float
    """Losses allowed to plans of the running round, seconds."""
    saving_for: float
    """Seconds to hold before drafts are looked for again; 0: it was neither empty nor too poor for a draft."""
    is_open: int
    _eps: float
    _start: float
    _cap: float
    _since: float
    _forgiven: float
    _opened_at: float

    def __init__(self, eps: float = 0.01, start: float = 3.0, cap: float = 200.0) -> None:
        super().__init__(eps, start, cap, FORGIVE_EVERY)

    @property
    def is_short(self) -> bool:
        """Less is left than a quarter of the start."""
        return self.slack < 0.25 * self._start * self._opened_at

    @property
    def is_ample(self) -> bool:
        """It could pay several rounds at their worst."""
        return self.slack >= 2.0 * self._start * self._opened_at

    def open(self, plain_seconds: float) -> None:
        """Set the start from the time of a plain step."""
        self.is_open = 1
        self._opened_at = plain_seconds
        self.slack = self._start * plain_seconds

    def correct_start(self, plain_seconds: float) -> None:
        """A plain step is known by now to take less than `open` was told: take back what the start had too much."""
        if plain_seconds < self._opened_at:
            self.slack -= self._start * (self._opened_at - plain_seconds)
            self._opened_at = plain_seconds

    def lend(self, seconds: float) -> None:
        """Raise the start: what a drafter needs once, before anything can be known of it (it reads its first prompt)."""
        self.slack += seconds

    def grant(self, loss: float) -> bool:
        """Allow a plan that loses at most this many seconds (one token emitted), if everything granted can be paid."""
        if self.slack < self.granted + loss:
            return False
        self.granted += loss
        return True

    def save_for(self, goal: float, plain_seconds: float) -> None:
        """Look for no drafts until this many seconds are held, unless that would take too long."""
        if goal <= min(MOST_SAVED, self._cap) * plain_seconds:
            self.saving_for = goal

    def settle_plain(self, plain_seconds: float, num_emitted: float = 1.0, looking: float = 0.0, rounds: float = 1.0) -> None:
        """Plain rounds: their time is plain time by definition, and their tokens add their share of eps.

        looking: seconds spent on deciding against a draft. They are speculation's own loss: who finds the bank empty stops looking.
        """
        looking = min(looking, LONGEST_LOOK * plain_seconds * rounds)
        self._settle(self._eps * plain_seconds * num_emitted - looking, plain_seconds)

    def settle(self, plain_seconds: float, num_emitted: float, seconds: float, ceiling: float = inf, weight: float = 1.0) -> None:
        """A speculative round of `seconds` that emitted `num_emitted` tokens, each worth a plain step.

        ceiling: seconds beyond which the machine was interrupted (another process, a page fault), as plain decoding would have
        been too; such an excess is not charged, once in 32 rounds. weight: share of a round that a record of a batch stands for.
        """
        self._since += weight
        if seconds > ceiling and self._since >= FORGIVE_EVERY:
            seconds = ceiling
            self._forgiven += weight
            if self._forgiven > 0.999:
                self._since = self._forgiven = 0.0
        self._settle((1.0 + self._eps) * plain_seconds * num_emitted - seconds, plain_seconds)

    def _settle(self, gain: float, plain_seconds: float) -> None:
        self.granted = 0.0
        self.slack = max(min(self.slack + gain, self._cap * plain_seconds), -self._start * plain_seconds)
        if self.slack <= 0.0:
            self.saving_for = max(self.saving_for, min(SAVED, self._cap) * plain_seconds)
        elif self.slack >= self.saving_for:
            self.saving_for = 0.0

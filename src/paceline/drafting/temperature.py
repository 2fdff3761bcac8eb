"""The temperature that a draft is drawn at: the target's, a fixed one, or one that is tuned between rounds (ours).

Lossless at any value: a round's tokens are verified against the distribution that they were drawn from, and its temperature is
settled before the first one is drawn, from finished rounds alone (losslessness rule 1). What it changes is how much of the draft is
accepted: a position is accepted with probability sum min(p, q), which is largest where q is about as sharp as p; a smaller model
is often too sharp or too blunt.

Tuning is stochastic approximation in the log of a factor on the target's temperature (Kiefer and Wolfowitz, 1952): rounds are drawn
by turns a little above and a little below the current factor, and it moves towards the side with the higher acceptance. Width and
steps shrink with what was seen: for a close copy of the target, which is best at exactly the target's temperature, looking a tenth
aside costs 4 % of acceptance. A weak pull towards 1 keeps the factor there where acceptance does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from paceline.config import SamplingParams
from paceline.drafting.options import number
from paceline.errors import OptionError

AUTO = "auto"
_SETTLING = 200
"""Observed positions after which the width begins to shrink."""
_MOST_TUNERS = 64
"""Temperatures of requests that are told apart; others share the nearest tuner made before."""


def check_draft_temperature(value: object) -> None:
    """Raises OptionError unless `value` is None, `auto` or a number in [0, 100]."""
    if isinstance(value, str) and value != AUTO:
        raise OptionError(f"temperature = {value!r}: must be a number, or `{AUTO}` to tune it between rounds")
    if value is not None and value != AUTO:
        number("temperature", value, 0.0, 100.0)


@dataclass(frozen=True, slots=True)
class Trial:
    """The factor of one round, and on which side of the current one it lies (1 above, -1 below)."""

    factor: float
    side: int


class TemperatureTuner:
    """Seeks the factor on the target's temperature at which most of a draft is accepted. One serves all requests of a temperature.

    width: first distance of the two sides from the current factor, in its log; least: last one. rate: first step for each observed
    position; small, because acceptance differs far more between positions than between the sides. pull: towards 1, in acceptance
    per log. reach: largest factor; the smallest is its inverse.
    """

    def __init__(self, width: float = 0.1, least: float = 0.03, rate: float = 0.003, pull: float = 0.1, reach: float = 2.5) -> None:
        self._first_width = self._width = width
        self._least = least
        self._rate = rate
        self._pull = pull
        self._reach = math.log(reach)
        self._log_factor = 0.0
        self._mean: float | None = None
        self._positions = 0
        self._side = 1

    @property
    def factor(self) -> float:
        """The current factor; rounds are drawn to both sides of it."""
        return math.exp(self._log_factor)

    def next(self) -> Trial:
        """The factor for the coming round."""
        self._side = -self._side
        return Trial(math.exp(self._log_factor + self._side * self._width), self._side)

    def learn(self, trial: Trial, acceptance: Sequence[float]) -> None:
        """Count the acceptance probabilities (or outcomes) of a round's observed positions (`Verdict.acceptance`)."""
        for label in acceptance:
            # The mean takes no part in where the two sides balance; without it every position would push by its whole value.
            mean = label if self._mean is None else self._mean
            self._mean = mean + 0.02 * (label - mean)
            slope = trial.side * (label - mean) / self._width
            rate = self._rate * (self._width / self._first_width) ** 2
            moved = self._log_factor + rate * (slope - self._pull * self._log_factor)
            self._log_factor = min(max(moved, -self._reach), self._reach)
        self._positions += len(acceptance)
        self._width = max(self._least, self._first_width * (1 + self._positions / _SETTLING) ** -0.25)


class DraftTemperature:
    """What a drafter's `temperature` option amounts to, with the tuners that all its requests share."""

    def __init__(self, setting: float | str | None) -> None:
        """setting: None: the target's; a number: that one (0 drafts the most probable token); `auto`: tuned."""
        check_draft_temperature(setting)
        self._setting = setting
        self._tuners: dict[float, TemperatureTuner] = {}

    def sampling_of(self, sampling: SamplingParams) -> SamplingParams:
        """How draft tokens are chosen for a request with this sampling, tuning apart."""
        setting = self._setting
        if sampling.greedy or setting is None or isinstance(setting, str):
            return sampling
        if setting == 0:
            return replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, n=1)
        return replace(sampling, temperature=setting)

    def tuner(self, sampling: SamplingParams) -> TemperatureTuner | None:
        """The tuner of a request; None for greedy ones, and unless the option is `auto`."""
        if sampling.greedy or self._setting != AUTO:
            return None
        known = self._tuners.get(sampling.temperature)
        if known is None and len(self._tuners) < _MOST_TUNERS:
            known = self._tuners[sampling.temperature] = TemperatureTuner()
        return known or self._tuners[min(self._tuners, key=lambda t: abs(t - sampling.temperature))]

"""Which drafters to stack: the hierarchy with the least time a token, from measured costs and acceptances.

HSD (2510.19705) poses the choice as a generalised shortest path; the formulation here is ours (drafting.md 3.1). With p_j(n) the
seconds of a pass of level j over n rows, E_ij(T) the tokens that a round of j emits when i drafts T for it, and C_i the seconds of
a drafted token of i,

    C_j = min over i < j and T of (T * C_i + p_j(T + 1)) / E_ij(T),   or what j takes by itself.

An edge i -> j has the cost p_j / E and the gain T / E. Its value grows with C_i and models are in order, so a dynamic programme
over the levels is optimal. Acceptance is taken as independent of what lies below; levels that agree with each other do better.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import inf, isfinite
from pathlib import Path
from typing import Any

from paceline.errors import OptionError

Acceptance = Mapping[tuple[str, str], float | tuple[float, ...]]
"""(lower, upper) -> the acceptance rate of each drafted token, or the share of rounds in which at least 1, 2, ... are accepted."""


@dataclass(frozen=True, slots=True)
class StackLevel:
    """A drafter or the target, with what it costs here."""

    name: str
    per_token: float
    """Seconds a token when it drafts by itself."""
    fixed: float = 0.0
    """Seconds of a draft, whatever its length."""
    rows: tuple[int, ...] = ()
    passes: tuple[float, ...] = ()
    """Seconds of a verifying pass over so many rows; empty when it cannot verify."""

    def pass_seconds(self, rows: int) -> float:
        """A pass over `rows` rows: linear between what was measured, with the last slope beyond."""
        if len(self.rows) == 1:
            return self.passes[0]
        i = next((i for i in range(1, len(self.rows)) if rows <= self.rows[i]), len(self.rows) - 1)
        slope = (self.passes[i] - self.passes[i - 1]) / (self.rows[i] - self.rows[i - 1])
        return self.passes[i - 1] + slope * (rows - self.rows[i - 1])


@dataclass(frozen=True, slots=True)
class Stack:
    """A hierarchy, lowest level first, the target last."""

    levels: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens that each level but the last drafts for the next one."""
    seconds_per_token: float
    per_token: float
    """Seconds a drafted token, were it drafting for another level."""
    fixed: float = 0.0

    @property
    def name(self) -> str:
        return " > ".join(self.levels)

    @property
    def spec(self) -> str:
        """What to give as `draft`: `none`, a drafter, or a cascade."""
        below = self.levels[:-1]
        return "none" if not below else below[0] if len(below) == 1 else "cascade:" + ">".join(below)


def survival(acceptance: float | tuple[float, ...], most: int) -> list[float]:
    """Chance that at least 1, 2, ... drafted tokens are accepted, for at most `most`."""
    if isinstance(acceptance, tuple):
        return list(acceptance[:most])
    return [acceptance**j for j in range(1, most + 1)]


def best_stack(levels: Sequence[StackLevel], acceptance: Acceptance, max_draft: int = 16) -> Stack:
    """The stack with the least time a token of the last level, by the dynamic programme.

    levels: in order, the target last; a pair without acceptance cannot be stacked.
    """
    starts: list[list[Stack]] = []  # of each level: by itself, and with the best draft of its own
    for level in levels:
        found = [_add(start, level, acceptance, max_draft) for below in starts for start in below]
        stacked = min((stack for stack in found if stack is not None), key=_seconds, default=None)
        starts.append([_alone(level)] if stacked is None else [_alone(level), stacked])
    return min(starts[-1], key=_seconds)


def all_stacks(levels: Sequence[StackLevel], acceptance: Acceptance, max_draft: int = 16) -> list[Stack]:
    """Every chain of levels that ends in the target, each with its best lengths, fastest first."""
    *below, target = levels
    found = []
    for count in range(len(below) + 1):
        for chosen in combinations(below, count):
            stack: Stack | None = None
            for level in (*chosen, target):
                stack = _alone(level) if stack is None else _add(stack, level, acceptance, max_draft)
                if stack is None:
                    break
            found += [stack] if stack is not None else []
    return sorted(found, key=_seconds)


def _seconds(stack: Stack) -> float:
    return stack.seconds_per_token


def _alone(level: StackLevel) -> Stack:
    plain = level.pass_seconds(1) if level.passes else level.per_token + level.fixed
    return Stack((level.name,), (), plain, level.per_token, level.fixed)


def _add(below: Stack, level: StackLevel, acceptance: Acceptance, max_draft: int) -> Stack | None:
    """`below` drafting for one more level, with the best length; None where that is not possible."""
    rate = acceptance.get((below.levels[-1], level.name))
    if rate is None or not level.passes:
        return None
    best_length, best = 0, inf
    emitted = 1.0
    for length, alive in enumerate(survival(rate, max_draft), 1):
        emitted += alive
        seconds = (below.fixed + length * below.per_token + level.pass_seconds(length + 1)) / emitted
        if seconds < best:
            best_length, best = length, seconds
    if best_length == 0:
        return None
    return Stack((*below.levels, level.name), (*below.lengths, best_length), best, best)


# ---------- documents ----------


def read_stack(path: Path) -> tuple[list[StackLevel], dict[tuple[str, str], float | tuple[float, ...]]]:
    """Levels and acceptances of a file that `paceline stack --json` wrote, or one written by hand. Raises OptionError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _levels(document["levels"]), _acceptances(document["acceptance"])
    except OSError as error:
        raise OptionError(f"stack file {str(path)!r}: {error.strerror}; give a file of `paceline stack --json`") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"stack file {str(path)!r}: not as `paceline stack --json` writes it ({error!r})") from None


def _levels(rows: Sequence[Mapping[str, Any]]) -> list[StackLevel]:
    levels = [
        StackLevel(
            str(row["name"]),
            float(row["per_token"]),
            float(row.get("fixed", 0.0)),
            tuple(int(n) for n in row.get("rows", ())),
            tuple(float(s) for s in row.get("passes", ())),
        )
        for row in rows
    ]
    for level in levels:
        if len(level.rows) != len(level.passes) or list(level.rows) != sorted(set(level.rows)):
            raise OptionError(f"level {level.name!r}: rows = {level.rows} must increase, with one of passes = {level.passes} each")
        if not all(isfinite(s) and s >= 0 for s in (level.per_token, level.fixed, *level.passes)):
            raise OptionError(f"level {level.name!r}: seconds must be finite numbers >= 0")
    if not levels or not levels[-1].passes or len({level.name for level in levels}) < len(levels):
        raise OptionError("levels: name each once, the target last, with the seconds of its passes")
    return levels


def _acceptances(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float | tuple[float, ...]]:
    found: dict[tuple[str, str], float | tuple[float, ...]] = {}
    for row in rows:
        value = tuple(float(s) for s in row["survival"]) if "survival" in row else float(row["rate"])
        pair = str(row["draft"]), str(row["target"])
        if not all(0.0 <= share <= 1.0 for share in (value if isinstance(value, tuple) else (value,))):
            raise OptionError(f"acceptance of {pair[0]!r} for {pair[1]!r}: {value} must be in [0, 1]")
        found[pair] = value
    return found


def stack_document(levels: Sequence[StackLevel], acceptance: Acceptance, stacks: Sequence[Stack]) -> dict[str, Any]:
    """What was measured and what follows from it, as plain data; `read_stack` reads the first half back."""
    target = levels[-1]
    plain = target.pass_seconds(1)
    return {
        "levels": [asdict(level) for level in levels],
        "acceptance": [
            {"draft": lower, "target": upper} | ({"survival": list(value)} if isinstance(value, tuple) else {"rate": value})
            for (lower, upper), value in acceptance.items()
        ],
        "stacks": [
            {
                "draft": stack.spec,
                "levels": list(stack.levels),
                "lengths": list(stack.lengths),
                "predicted_tokens_per_second": 1.0 / stack.seconds_per_token,
                "predicted_speedup": plain / stack.seconds_per_token,
            }
            for stack in stacks
        ],
    }

"""Any controller over synthetic or recorded worlds (`study.simulator`), in milliseconds and without torch (ours).

Regrets are shares of time: 0.05 against a reference means that it took 5 % longer. `best_fixed` is the best of plain decoding
and `fixed_K` on the same regime. `best_k_in_hindsight` knows every coin and picks drafter and length of each round by dynamic
programming: the exact optimum (noise and drafts' lags apart) for one sequence; for batches a reference only, as it takes all
sequences of a round to draft alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from paceline.control import registry
from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable
from paceline.errors import OptionError
from paceline.records import Plan
from paceline.study.environment import environment
from paceline.study.regimes import Regime, all_regimes
from paceline.study.simulator import Outcome, Simulator, World, draw_world, hindsight_seconds

FIXED_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
OFFLINE = "offline_policy"


class _Plain(Controller):
    """Never drafts."""

    name = "plain"

    def plan(self, context: RoundContext) -> Plan:
        return Plan(None, 0, "plain")


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """One line of the result; see the module's text for the regrets."""

    regime: str
    controller: str
    tokens_per_second: float
    speedup_vs_plain: float
    regret_vs_best_fixed: float
    regret_vs_best_k_in_hindsight: float
    acceptance_rate: float | None
    rounds: int
    controller_us_per_round: float


def make_controller(name: str, costs: CostTable, world: World) -> Controller:
    """`plain`, `fixed_K`, `offline_policy` (trained on another draw of the same regime), or a registered controller.

    Raises OptionError for anything else.
    """
    if name == "plain":
        return _Plain()
    if name == OFFLINE:
        from paceline.study.offline_policy import train_for_world

        return train_for_world(world, costs)
    prefix, _, length = name.rpartition("_")
    if prefix == "fixed" and length.isdigit():
        return registry.create("fixed", costs, {"num_draft": int(length)})
    return registry.create(name, costs)


def controller_names() -> tuple[str, ...]:
    """All that `run_replay` knows: references, registered controllers (but `fixed`, which needs a length), the learnt policy."""
    fixed = tuple(f"fixed_{k}" for k in FIXED_LENGTHS)
    return ("plain", *fixed, *(name for name in registry.names() if name != "fixed"), OFFLINE)


def run_world(world: World, controllers: Sequence[str]) -> list[ReplayRow]:
    """All controllers over one world, in the order given; the references are always run, if not always listed."""
    references = ("plain", *(f"fixed_{k}" for k in FIXED_LENGTHS))
    outcomes = {
        name: Simulator(world, make_controller(name, world.regime.table(), world)).run()
        for name in dict.fromkeys((*references, *controllers))
    }
    plain = outcomes["plain"]
    best_fixed = min(outcomes[name].seconds / outcomes[name].tokens for name in references)
    hindsight = hindsight_seconds(world) / world.tokens
    return [_row(world.regime.name, name, outcomes[name], plain, best_fixed, hindsight) for name in controllers]


def _row(regime: str, name: str, run: Outcome, plain: Outcome, best_fixed: float, hindsight: float) -> ReplayRow:
    per_token = run.seconds / run.tokens
    return ReplayRow(
        regime=regime,
        controller=name,
        tokens_per_second=1 / per_token,
        speedup_vs_plain=plain.seconds / plain.tokens / per_token,
        regret_vs_best_fixed=per_token / best_fixed - 1,
        regret_vs_best_k_in_hindsight=per_token / hindsight - 1,
        acceptance_rate=run.accepted / run.drafted if run.drafted else None,
        rounds=run.rounds,
        controller_us_per_round=1e6 * run.control_seconds / run.rounds,
    )


def pick_regimes(names: Sequence[str]) -> list[Regime]:
    """Regimes by name; `all`, a shape (`high`) or a curve (`gpu-8b`) stands for several. Raises OptionError for unknown names."""
    known = all_regimes()
    picked: dict[str, Regime] = {}
    for wanted in names:
        found = {n: r for n, r in known.items() if wanted in ("all", n, *n.split("@"))}
        if not found:
            raise OptionError(f"regimes = {wanted!r}: unknown; choose `all` or among {', '.join(known)}")
        picked |= found
    return list(picked.values())


def pick_controllers(names: Sequence[str]) -> list[str]:
    """Controllers by name; `all` stands for every one."""
    picked = [name for wanted in names for name in (controller_names() if wanted == "all" else (wanted,))]
    return list(dict.fromkeys(picked))


def run_replay(
    regimes: Sequence[str | Regime],
    controllers: Sequence[str],
    seed: int = 0,
    tokens: int = 2000,
    command: str = "",
) -> dict[str, Any]:
    """The whole table, ready for JSON: `{results: [ReplayRow, ...], environment, command}`.

    regimes: names (see `pick_regimes`) or regimes of one's own. tokens: length of each regime's text. command: the command line to
    record with the result.
    Raises OptionError for unknown names and for tokens < 2.
    """
    if tokens < 2:
        raise OptionError(f"tokens = {tokens}: must be at least 2")
    chosen = [r for item in regimes for r in (pick_regimes([item]) if isinstance(item, str) else [item])]
    names = pick_controllers(controllers)
    rows = [row for regime in chosen for row in run_world(draw_world(regime, seed, tokens), names)]
    setting = {"seed": seed, "tokens": tokens, "curves": {r.curve.name: r.curve.to_json() for r in chosen}}
    return {"results": [asdict(row) for row in rows], "environment": {**environment(), "replay": setting}, "command": command}


def plot_replay(results: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Heat chart of speed against plain decoding, written to `path`: controllers, the fastest first, by cost curves and by shapes
    (geometric means), and the worst regime of each.

    results: the `results` of `run_replay`. Raises PacelineError when matplotlib is missing, OptionError when there is nothing to
    draw.
    """
    from paceline.study.charts import Panel, heat_chart

    if not results:
        raise OptionError("plot: no results to draw")
    speeds: dict[str, dict[str, list[float]]] = {}
    for row in results:
        shape, _, curve = row["regime"].partition("@")
        own = speeds.setdefault(row["controller"], {})
        for group in dict.fromkeys(("all", curve or shape, shape)):
            own.setdefault(group, []).append(row["speedup_vs_plain"])
    names = sorted(speeds, key=lambda name: -geometric_mean(speeds[name]["all"]))
    curves, shapes = (list(dict.fromkeys(row["regime"].partition("@")[part] for row in results)) for part in (2, 0))
    groups = [*(curve for curve in curves if curve), *shapes]
    values = [
        [geometric_mean(own["all"]), min(own["all"]), *(geometric_mean(own[group]) if group in own else None for group in groups)]
        for own in (speeds[name] for name in names)
    ]
    title = "speed, plain decoding = 1: geometric means over all regimes, each cost curve, each shape"
    columns = ["all regimes", "worst regime", *groups]
    heat_chart([Panel(title, names, columns, values, bold=["pacer"], breaks=[1, len(groups) - len(shapes) + 1])], Path(path))

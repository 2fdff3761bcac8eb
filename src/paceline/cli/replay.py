"""`paceline replay`: controllers over synthetic or recorded rounds, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def replay(
    regimes: Annotated[str, typer.Option("--regimes", help="`all`, or names of regimes, shapes or cost curves, by comma.")] = "all",
    trace: Annotated[Path | None, typer.Option("--trace", help="A file of `paceline trace`, in place of the regimes.")] = None,
    controllers: Annotated[str, typer.Option("--controllers", help="`all`, or names by comma; `plain` and `fixed_K` too.")] = "all",
    tokens: Annotated[int, typer.Option("--tokens", help="Length of each regime's text.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the regimes.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows here.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the speed-ups to this PNG file.")] = None,
) -> None:
    """Run controllers over regimes of acceptance, cost and load: against plain, the best fixed length, and hindsight."""
    from paceline.study.environment import command
    from paceline.study.replay import plot_replay, run_replay
    from paceline.study.report import check_writable, write_json
    from paceline.study.trace import read_trace, trace_regime

    for path in (json_file, plot):
        if path is not None:
            check_writable(path)
    worlds = _names(regimes) if trace is None else [trace_regime(read_trace(trace), trace.stem, seed)]
    document = run_replay(worlds, _names(controllers), seed=seed, tokens=tokens, command=command())
    if json_file is not None:
        write_json(json_file, document)
    if plot is not None:
        plot_replay(document["results"], plot)
    Console().print(replay_table(document["results"]))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def replay_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A row for each controller over all its regimes, the fastest first."""
    by_controller: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_controller.setdefault(row["controller"], []).append(row)
    table = Table(title=f"{len({row['regime'] for row in rows})} regimes")
    for name in ("controller", "against plain", "worst", "time over best fixed", "time over hindsight", "us a round"):
        table.add_column(name, justify="left" if name == "controller" else "right")
    mean = {name: geometric_mean(row["speedup_vs_plain"] for row in own) for name, own in by_controller.items()}
    for name in sorted(mean, key=lambda item: -mean[item]):
        own = by_controller[name]
        table.add_row(
            name,
            f"{mean[name]:.3f}x",
            f"{min(row['speedup_vs_plain'] for row in own):.3f}x",
            f"{fmean(row['regret_vs_best_fixed'] for row in own):+.1%}",
            f"{fmean(row['regret_vs_best_k_in_hindsight'] for row in own):+.1%}",
            f"{fmean(row['controller_us_per_round'] for row in own):.1f}",
        )
    return table

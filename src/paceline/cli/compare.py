"""`paceline compare`: two result files of `paceline bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def compare(
    before: Annotated[Path, typer.Argument(help="A file that `paceline bench --json` wrote.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    fail_under: Annotated[
        float | None, typer.Option("--fail-under", min=0.0, help="Exit with 1 when a row's ratio is below this.")
    ] = None,
) -> None:
    """Compare two bench results row by row: tokens per second, and the second over the first."""
    from paceline.study.report import compare_results, read_results

    changes = compare_results(read_results(before), read_results(after))
    table = Table()
    for name in ("category", "method", before.stem, after.stem, "ratio"):
        table.add_column(name, justify="left" if name in ("category", "method") else "right")
    for change in changes:
        speeds = ("" if speed is None else f"{speed:.1f}" for speed in (change.before, change.after))
        table.add_row(change.category, change.method, *speeds, "" if change.ratio is None else f"{change.ratio:.3f}")
    Console().print(table)
    slower = [change for change in changes if fail_under is not None and change.ratio is not None and change.ratio < fail_under]
    if slower:
        typer.echo(f"{len(slower)} rows are under {fail_under:g}", err=True)
        raise typer.Exit(1)

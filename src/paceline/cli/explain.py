"""`paceline explain`: what every round of one answer drafted, cost and emitted, and why."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paceline.cli import loading
from paceline.cli.generate import AsJson, Chat, Prompt, System, print_summary
from paceline.cli.loading import Request
from paceline.cli.options import Settings, takes_settings
from paceline.cli.output import StreamFold, draft_memory, result_document
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.errors import OptionError
from paceline.study.reliability import calibration_error, plot_reliability, reliability_bar

if TYPE_CHECKING:
    from paceline.engine import Engine
    from paceline.records import GenerationResult, StepRecord

WIDE = 120
"""Columns of a terminal from which on the plan's expectation and the parts of a round's time are shown as well."""
ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
"""Points of the printed cost curve: tokens of one forward."""


@takes_settings(SpeculationConfig, SamplingParams, RunnerConfig)
def explain(
    prompt: Prompt = None,
    chat: Chat = None,
    system: System = "",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Most rounds to show.")] = 60,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the reliability diagram to this PNG file.")] = None,
    as_json: AsJson = False,
    *,
    settings: Settings,
) -> None:
    """Answer a prompt and show every round: what was drafted, kept, what it cost, and why. Ctrl-C shows those so far."""
    if settings.sampling.n > 1:
        raise OptionError(f"-n = {settings.sampling.n}: explain one answer at a time; leave it out")
    text = loading.read_prompt(prompt)
    if plot is not None:
        from paceline.study.report import check_writable

        check_writable(plot)
    with loading.open_engine(settings) as engine:
        engine.controller.explain()
        fold = StreamFold()
        interrupted = fold.follow(Request.make(engine, text, system, chat).stream(engine, settings.sampling))
        result = fold.finish(engine)
        if as_json:
            typer.echo(json.dumps(explanation(engine, result), ensure_ascii=False))
        else:
            show(engine, result, rounds)
        if plot is not None:
            plot_reliability(engine.controller.calibration(), plot)
        if interrupted:
            raise typer.Exit(130)


def show(engine: Engine, result: GenerationResult, rounds: int) -> None:
    """The tables: rounds, costs, and calibration where the controller keeps one."""
    console = Console()
    console.print(rounds_table(result.steps[:rounds], console.width))
    if len(result.steps) > rounds:
        console.print(f"{len(result.steps) - rounds} more rounds; --rounds {len(result.steps)} shows all")
    console.print(cost_table(engine, context=_last_context(result)))
    if reliability := engine.controller.calibration():
        console.print(calibration_table(reliability))
    print_summary(engine, result)


def _last_context(result: GenerationResult) -> int:
    return result.num_prompt_tokens + result.num_tokens


def rounds_table(steps: tuple[StepRecord, ...], width: int) -> Table:
    """One row a round, in a terminal of so many columns; times in milliseconds."""
    table = Table(title="rounds", box=SIMPLE_HEAD, pad_edge=False)
    rows = [round_cells(number, step) for number, step in enumerate(steps, start=1)]
    details = {"planned", "expected", "draft ms", "verify ms"} if width < WIDE else set()
    for name in (name for name in (rows[0] if rows else ()) if name not in details):
        table.add_column(name, justify="left" if name in ("drafter", "why") else "right", no_wrap=name != "why")
    for cells in rows:
        table.add_row(*(cell for name, cell in cells.items() if name not in details))
    return table


def round_cells(number: int, step: StepRecord) -> dict[str, str]:
    """What the table of rounds says of one round, by column."""
    seconds = {"draft ms": step.draft_seconds, "verify ms": step.verify_seconds, "round ms": step.round_seconds}
    return {
        "round": str(number),
        "drafter": step.drafter or "plain",
        "planned": str(step.num_planned),
        "drafted": str(step.num_drafted),
        "accepted": str(step.num_accepted),
        "emitted": str(step.num_emitted),
        "expected": f"{step.expected_emitted:.2f}",
        **{name: f"{1e3 * value:.2f}" for name, value in seconds.items()},
        "why": escape(step.reason + (" (probe)" if step.probe else "")),
    }


def cost_curve(engine: Engine, context: int) -> list[dict[str, float]]:
    """Seconds of a forward over so many tokens, at this context."""
    plain = engine.costs.t_plain(context)
    curve = []
    for rows in ROWS:
        seconds = engine.costs.t_verify(rows, context)
        curve.append({"rows": rows, "seconds": seconds, "against_plain": seconds / plain if plain else 0.0})
    return curve


def cost_table(engine: Engine, context: int) -> Table:
    """The cost curve, and what each drafter costs."""
    memory = draft_memory(engine)
    drafters = "; ".join(
        f"{name}: {1e3 * cost.fixed:.3f} ms a round + {1e3 * cost.per_token:.3f} ms a token, {memory.get(name, 0) / 1e6:.1f} MB"
        for name, cost in engine.costs.drafters.items()
    )
    table = Table(
        title=f"cost of a forward at {context} tokens of context", caption=drafters or None, box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("tokens")
    for point in cost_curve(engine, context):
        table.add_column(str(int(point["rows"])), justify="right", no_wrap=True)
    table.add_row("ms", *(f"{1e3 * point['seconds']:.1f}" for point in cost_curve(engine, context)))
    table.add_row("against plain", *(f"{point['against_plain']:.2f}x" for point in cost_curve(engine, context)))
    return table


def calibration_table(rows: list[dict[str, Any]]) -> Table:
    """The reliability diagram: a row for each bin of predicted acceptance."""
    errors = "; ".join(f"{drafter}: {error:.3f}" for drafter, error in calibration_error(rows).items())
    table = Table(title="calibration: predicted (|) and observed (#) acceptance", caption=f"mean error {errors}")
    for column in (*rows[0], "0 to 1"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()), reliability_bar(row["predicted"], row["accepted"]))
    return table


def explanation(engine: Engine, result: GenerationResult) -> dict[str, Any]:
    """Everything that the tables show, as one object."""
    return result_document(engine, result) | {
        "steps": [asdict(step) for step in result.steps],
        "costs": engine.costs.to_json(),
        "cost_curve": cost_curve(engine, _last_context(result)),
        "calibration": engine.controller.calibration(),
    }

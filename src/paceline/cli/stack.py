"""`paceline stack`: which drafters to stack on one another here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from paceline.cli import loading
from paceline.cli.options import Settings, takes_settings
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig

if TYPE_CHECKING:
    from paceline.study.stacks import Acceptance, Stack, StackLevel


@takes_settings(SamplingParams, RunnerConfig)
def stack(
    levels: Annotated[str, typer.Option("--levels", help="Drafters by comma, the cheapest first.")] = "ngram,early_exit",
    prompts: Annotated[str, typer.Option("--prompts", help="JSONL file (docs/benchmarks.md), `builtin` or `agent`.")] = "builtin",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most prompts of each category.")] = 1,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    given: Annotated[Path | None, typer.Option("--from", help="Choose from figures of an earlier --json; loads no model.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures and stacks here.")] = None,
    *,
    settings: Settings,
) -> None:
    """Measure drafters alone and for one another, and name the stack with the least time a token."""
    from paceline.study.environment import command, environment
    from paceline.study.report import check_writable, write_json
    from paceline.study.stacks import all_stacks, read_stack, stack_document

    if json_file is not None:
        check_writable(json_file)
    facts: dict[str, Any] = {"environment": environment(), "command": command()}
    acceptance: Acceptance
    if given is not None:
        measured, acceptance = read_stack(given)
    else:
        measured, acceptance, engine_facts = _measure(settings, levels, prompts, limit, raw)
        facts["environment"] |= engine_facts
        facts["settings"] = {"levels": levels, "prompts": prompts, "limit": limit, "sampling": asdict(settings.sampling)}
    stacks = all_stacks(measured, acceptance)
    if json_file is not None:
        write_json(json_file, facts | stack_document(measured, acceptance, stacks))
    console = Console()
    console.print(level_table(measured, acceptance))
    console.print(stack_table(stacks, measured[-1]))
    typer.echo(f"least time a token: --draft '{stacks[0].spec}'", err=True)


def _measure(
    settings: Settings, levels: str, prompts: str, limit: int | None, raw: bool
) -> tuple[list[StackLevel], Acceptance, dict[str, Any]]:
    from paceline.study.prompts import encode_prompt, load_prompts
    from paceline.study.stack_measure import measure_levels

    prompt_set = load_prompts(prompts, limit=limit)
    console = Console(stderr=True)
    with loading.open_engine(replace(settings, speculation=SpeculationConfig(draft=levels))) as engine:
        chat = engine.tokenizer.has_chat_template and not raw
        encoded = [encode_prompt(engine.tokenizer, prompt.text, chat=chat) for prompt in prompt_set]
        with console.status("measuring") as status:
            measured, acceptance = measure_levels(engine, encoded, settings.sampling, status.update)
        facts = {"model": loading.source_name(engine), "runner": asdict(engine.runner.info)}
    return measured, acceptance, facts


def level_table(levels: Sequence[StackLevel], acceptance: Acceptance) -> Table:
    """What each level costs, and how much of its draft each other one accepts."""
    from paceline.study.stacks import survival

    table = Table(title="levels: accepted of 4 drafted tokens, by who verifies")
    uppers = [level.name for level in levels if any(upper == level.name for _, upper in acceptance)]
    for name in ("level", "ms a drafted token", "ms a draft", "ms a pass", "ms a pass of 5", *uppers):
        table.add_column(name, justify="left" if name == "level" else "right")
    for level in levels:
        costs = [f"{1e3 * level.per_token:.3f}", f"{1e3 * level.fixed:.3f}"] if level is not levels[-1] else ["", ""]
        passes = [f"{1e3 * level.pass_seconds(rows):.2f}" if level.passes else "" for rows in (1, 5)]
        rates = [acceptance.get((level.name, upper)) for upper in uppers]
        table.add_row(level.name, *costs, *passes, *("" if rate is None else f"{sum(survival(rate, 4)):.2f}" for rate in rates))
    return table


def stack_table(stacks: Sequence[Stack], target: StackLevel) -> Table:
    """A row for each stack, the fastest first."""
    table = Table(title="stacks")
    for name in ("stack", "lengths", "tok/s, predicted", "against plain"):
        table.add_column(name, justify="left" if name == "stack" else "right")
    for each in stacks:
        speed = target.pass_seconds(1) / each.seconds_per_token
        table.add_row(each.name, " ".join(map(str, each.lengths)), f"{1 / each.seconds_per_token:.1f}", f"{speed:.2f}x")
    return table

"""`paceline bench`: several methods on one set of prompts, interleaved."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from paceline.cli import loading
from paceline.cli.loading import source_name
from paceline.cli.options import Settings, takes_settings
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.errors import OptionError

if TYPE_CHECKING:
    from paceline.engine import Engine
    from paceline.study.bench import Method, Sample
    from paceline.study.prompts import BenchPrompt


@takes_settings(SamplingParams, RunnerConfig)
def bench(
    prompts: Annotated[str, typer.Option("--prompts", help="JSONL file (docs/benchmarks.md), `builtin` or `agent`.")] = "builtin",
    methods: Annotated[
        str, typer.Option("--methods", help="Comma-separated: plain, DRAFT[@CONTROLLER[:NAME=VALUE]], transformers, ...")
    ] = "plain,auto",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most prompts of each category.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times that every prompt is answered.")] = 1,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="Tokens that each method answers before timing.")] = 16,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the speed-ups to this PNG file.")] = None,
    *,
    settings: Settings,
) -> None:
    """Time methods on the same prompts in one run, in rotating order, and compare every answer with plain decoding's."""
    from paceline.study.methods import make_methods, split_names
    from paceline.study.prompts import WARM_UP, encode_prompt, encode_prompts, load_prompts
    from paceline.study.report import check_writable

    if settings.sampling.n > 1 or settings.sampling.logprobs is not None:
        raise OptionError("-n and --logprobs: bench times single answers; leave them out")
    for path in (json_file, plot):
        if path is not None:
            check_writable(path)
    prompt_set = load_prompts(prompts, limit=limit)
    names = split_names(methods)
    engines: list[Engine] = []
    engine_for = loading.engine_factory(settings, Console(stderr=True))

    def remember(config: SpeculationConfig) -> Engine:
        engines.append(engine_for(config))
        return engines[-1]

    try:
        made = make_methods(names, remember)
        chat = engines[0].tokenizer.has_chat_template and not raw
        encoded = encode_prompts(engines[0].tokenizer, prompt_set, chat=chat)
        ready = encode_prompt(engines[0].tokenizer, WARM_UP, chat=chat)
        samples, broken = _measure(made, encoded, settings.sampling, repeats, ready, warm_up)
        options = {"prompts": prompts, "methods": names, "limit": limit, "repeats": repeats, "warm_up": warm_up, "chat": chat}
        if samples:
            _finish(engines[0], samples, prompt_set, settings, options, complete=broken is None, json_file=json_file, plot=plot)
    finally:
        for engine in engines:
            engine.close()
    if broken is not None:
        raise typer.Exit(130) if isinstance(broken, KeyboardInterrupt) else broken


def _measure(
    methods: list[Method],
    prompts: list[tuple[BenchPrompt, list[int]]],
    params: SamplingParams,
    repeats: int,
    warm_up: list[int],
    warm_up_tokens: int,
) -> tuple[list[Sample], BaseException | None]:
    """Samples, and what ended the run early, if anything did: Ctrl-C or a method that fails keep what there is."""
    from paceline.study.bench import run
    from paceline.study.methods import EngineMethod

    samples: list[Sample] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("warming up", total=len(methods) * len(prompts) * repeats)

        def show(method: str, prompt: BenchPrompt) -> None:
            progress.update(bar, description=f"{method}: {prompt.category}")

        try:
            for repeat in range(repeats):
                for method in methods:
                    if isinstance(method, EngineMethod):
                        method.forget()
                tokens = 0 if repeat else warm_up_tokens
                for sample in run(methods, prompts, params, warm_up=warm_up, warm_up_tokens=tokens, on_start=show):
                    samples.append(sample)
                    progress.advance(bar)
        except (KeyboardInterrupt, Exception) as stop:
            return samples, stop
    return samples, None


def _finish(
    engine: Engine,
    samples: list[Sample],
    prompts: list[BenchPrompt],
    settings: Settings,
    options: dict[str, Any],
    *,
    complete: bool,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Write the document, draw the plot, print the table."""
    from paceline.study.report import bench_document, plot_results, write_json

    document = bench_document(
        samples,
        prompts,
        settings.sampling,
        settings=options | {"model": settings.model, "runner": asdict(settings.runner)},
        engine={"model": source_name(engine), "runner": asdict(engine.runner.info)},
        complete=complete,
    )
    if json_file is not None:
        write_json(json_file, document)
    if plot is not None and samples:
        plot_results(document, plot)
    Console().print(results_table(document["results"]))
    if not complete:
        typer.echo(f"interrupted after {len(samples)} answers; the figures cover those", err=True)


def results_table(rows: list[dict[str, Any]]) -> Table:
    """A row for each method and category."""
    table = Table()
    for name in ("category", "method", "tok/s", "against plain", "95 %", "accounted", "acceptance", "tokens a round", "same ids"):
        table.add_column(name, justify="left" if name in ("category", "method") else "right")
    category = None
    for row in rows:
        if category is not None and row["category"] != category:
            table.add_section()
        category = row["category"]
        interval = row["speedup_ci95"]
        same = row["num_identical"]
        table.add_row(
            row["category"],
            row["method"],
            f"{row['tokens_per_second']:.1f}",
            _number(row["speedup_vs_plain"], "{:.2f}x"),
            f"{interval[0]:.2f}-{interval[1]:.2f}" if interval else "",
            _number(row["accounted_vs_plain"], "{:.2f}x"),
            _number(row["acceptance_rate"], "{:.0%}"),
            _number(row["block_efficiency"], "{:.2f}"),
            "" if same is None else f"{same}/{row['num_prompts']}",
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)

"""`paceline generate --compare`: plain and speculative decoding of one prompt in one run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from paceline.cli.loading import Request
from paceline.cli.output import drafters_used, result_document
from paceline.config import SamplingParams

if TYPE_CHECKING:
    from paceline.engine import Engine
    from paceline.records import GenerationResult

REPEATS = 2
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Runs of both ways, in the order plain, speculative, plain, speculative."""

    plain: tuple[GenerationResult, ...]
    speculative: tuple[GenerationResult, ...]

    @property
    def same_text(self) -> bool:
        return all(result.token_ids == self.plain[0].token_ids for result in (*self.plain, *self.speculative))


def tokens_per_second(results: tuple[GenerationResult, ...]) -> float:
    """Tokens of all runs over the decode seconds of all runs."""
    seconds = sum(result.decode_seconds for result in results)
    return sum(result.num_tokens for result in results) / seconds if seconds else 0.0


def run_side_by_side(engine: Engine, request: Request, params: SamplingParams) -> SideBySide:
    """Warm up, then alternate, so that drift of the machine falls on both. Sampled runs share one seed."""
    short = replace(params, max_tokens=min(WARM_UP_TOKENS, params.max_tokens), min_tokens=0)
    warm_up = [request.run(engine, short, plain=plain)[0] for plain in (True, False)]
    if params.seed is None:
        params = replace(params, seed=warm_up[0].seed)
    runs: dict[bool, list[GenerationResult]] = {True: [], False: []}
    for _ in range(REPEATS):
        for plain in (True, False):
            runs[plain].append(request.run(engine, params, plain=plain)[0])
    return SideBySide(tuple(runs[True]), tuple(runs[False]))


def document(engine: Engine, outcome: SideBySide) -> dict[str, Any]:
    """The object of `generate --json`, with both speeds measured over all runs."""
    plain, speculative = tokens_per_second(outcome.plain), tokens_per_second(outcome.speculative)
    return result_document(engine, outcome.speculative[-1]) | {
        "tokens_per_second": speculative,
        "plain_tokens_per_second": plain,
        "speedup_vs_plain": speculative / plain if plain else None,
        "same_text": outcome.same_text,
        "runs": [
            {"method": name, "tokens_per_second": result.tokens_per_second, "num_tokens": result.num_tokens}
            for pair in zip(outcome.plain, outcome.speculative, strict=True)
            for name, result in zip(("plain", "speculative"), pair, strict=True)
        ],
    }


def print_side_by_side(engine: Engine, outcome: SideBySide, as_json: bool) -> None:
    """The answer and a table of both ways, or one JSON object."""
    data = document(engine, outcome)
    if as_json:
        typer.echo(json.dumps(data, ensure_ascii=False))
        return
    typer.echo(outcome.speculative[-1].text)
    info = engine.runner.info
    table = Table(title=f"{info.precision} {info.backend} on {info.device}, {REPEATS} runs each, in turn")
    for column in ("way", "tokens", "tok/s", "against plain", "accepted / drafted", "tokens a round"):
        table.add_column(column, justify="left" if column == "way" else "right")
    plain_speed = tokens_per_second(outcome.plain)
    last = outcome.speculative[-1]
    rows = (("plain", outcome.plain), (f"{drafters_used(last.steps)}, {engine.controller.name}", outcome.speculative))
    for name, results in rows:
        speed, final = tokens_per_second(results), results[-1]
        table.add_row(
            name,
            str(final.num_tokens),
            f"{speed:.1f}",
            f"{speed / plain_speed:.2f}x" if plain_speed else "?",
            f"{final.num_accepted} / {final.num_drafted}",
            f"{final.block_efficiency:.2f}" if final.block_efficiency else "",
        )
    Console().print(table)
    typer.echo(f"same text: {'yes' if outcome.same_text else 'NO, see docs/losslessness.md'}")

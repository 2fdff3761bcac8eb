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
from paceline.study.prompts import WARM_UP

if TYPE_CHECKING:
    from paceline.engine import Engine
    from paceline.records import GenerationResult

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Plain, speculative, plain: drift of the machine falls on both ways, and no draft is taken from an answer already given."""

    plain: tuple[GenerationResult, GenerationResult]
    speculative: GenerationResult

    @property
    def same_text(self) -> bool:
        return all(result.token_ids == self.plain[0].token_ids for result in (self.plain[1], self.speculative))

    @property
    def plain_tokens_per_second(self) -> float:
        """Tokens of both plain runs over their decode seconds."""
        seconds = sum(result.decode_seconds for result in self.plain)
        return sum(result.num_tokens for result in self.plain) / seconds if seconds else 0.0


def run_side_by_side(engine: Engine, request: Request, params: SamplingParams) -> SideBySide:
    """Warm up on another prompt, then answer three times. Sampled runs share one seed."""
    short = replace(params, max_tokens=min(WARM_UP_TOKENS, params.max_tokens), min_tokens=0)
    warm_up = [Request(WARM_UP, chat=request.chat).run(engine, short, plain=plain)[0] for plain in (True, False)]
    if params.seed is None:
        params = replace(params, seed=warm_up[0].seed)
    before, speculative, after = (request.run(engine, params, plain=plain)[0] for plain in (True, False, True))
    return SideBySide((before, after), speculative)


def document(engine: Engine, outcome: SideBySide) -> dict[str, Any]:
    """The object of `generate --json`, with both speeds measured."""
    plain, final = outcome.plain_tokens_per_second, outcome.speculative
    runs = (("plain", outcome.plain[0]), ("speculative", final), ("plain", outcome.plain[1]))
    return result_document(engine, final) | {
        "plain_tokens_per_second": plain,
        "speedup_vs_plain": final.tokens_per_second / plain if plain else None,
        "same_text": outcome.same_text,
        "runs": [
            {"method": name, "tokens_per_second": result.tokens_per_second, "num_tokens": result.num_tokens}
            for name, result in runs
        ],
    }


def print_side_by_side(engine: Engine, outcome: SideBySide, as_json: bool) -> None:
    """The answer and a table of both ways, or one JSON object."""
    data = document(engine, outcome)
    if as_json:
        typer.echo(json.dumps(data, ensure_ascii=False))
        return
    typer.echo(outcome.speculative.text)
    info = engine.runner.info
    table = Table(title=f"{info.precision} {info.backend} on {info.device}; plain, speculative, plain")
    for column in ("way", "tokens", "tok/s", "against plain", "accepted / drafted", "tokens a round"):
        table.add_column(column, justify="left" if column == "way" else "right")
    plain_speed, last = outcome.plain_tokens_per_second, outcome.speculative
    rows = (
        ("plain", outcome.plain[0], plain_speed),
        (f"{drafters_used(last.steps)}, {engine.controller.name}", last, last.tokens_per_second),
    )
    for name, final, speed in rows:
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

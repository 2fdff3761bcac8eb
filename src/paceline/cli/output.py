"""What the commands print: coloured answers, the closing line, one JSON object. Nothing here measures anything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from paceline.records import GenerationResult, StepRecord

if TYPE_CHECKING:
    from paceline.engine import Engine, StreamEvent

DRAFTED_COLOUR = typer.colors.GREEN
"""Tokens that were drafted and accepted; the target's own tokens keep the terminal's colour."""


def split_by_origin(text: str, token_texts: Sequence[str], from_draft: Sequence[bool]) -> Iterator[tuple[str, bool]]:
    """Cut a streamed text at its tokens: (piece, was it drafted?).

    A piece runs to the end of its token's text. Where a token's own text is not found (half a character, say), its piece
    is joined to the next; the pieces always add up to `text`.
    """
    start = 0
    for token_text, drafted in zip(token_texts, from_draft, strict=True):
        found = text.find(token_text, start) if token_text else -1
        if found >= 0:
            end = found + len(token_text)
            yield text[start:end], drafted
            start = end
    if start < len(text):
        yield text[start:], bool(from_draft) and from_draft[-1]


def echo_event(engine: Engine, event: StreamEvent) -> None:
    """Print a stream event's text at once, drafted tokens in colour where stdout is a terminal."""
    if not event.text:
        return
    if "NO_COLOR" in os.environ:
        typer.echo(event.text, nl=False)
        return
    token_texts = [engine.tokenizer.decode([token]) for token in event.token_ids]
    for piece, drafted in split_by_origin(event.text, token_texts, event.from_draft):
        typer.echo(typer.style(piece, fg=DRAFTED_COLOUR, reset=True) if drafted else piece, nl=False)


@dataclass(slots=True)
class StreamFold:
    """Adds up stream events, so that an interrupted answer keeps its text and its statistics."""

    started: float = field(default_factory=time.perf_counter)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    seed: int = 0
    result: GenerationResult | None = None

    def add(self, event: StreamEvent) -> None:
        self.text += event.text
        self.token_ids += event.token_ids
        self.from_draft += event.from_draft
        if event.record is not None:
            self.steps.append(event.record)
        self.seed = event.seed
        self.result = event.result or self.result

    def follow(self, events: Iterable[StreamEvent], show: Callable[[StreamEvent], None] | None = None) -> bool:
        """Add all events, showing each one as it comes. True when Ctrl-C broke them off."""
        try:
            for event in events:
                self.add(event)
                if show is not None:
                    show(event)
        except KeyboardInterrupt:
            return True
        return False

    def finish(self, engine: Engine) -> GenerationResult:
        """The engine's own result, or what was delivered before the interruption."""
        if self.result is not None:
            return self.result
        seconds = time.perf_counter() - self.started
        decode_seconds = sum(step.round_seconds for step in self.steps)
        num_prompt = self.steps[0].context_length if self.steps else 0
        return GenerationResult(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason="interrupted",
            num_prompt_tokens=num_prompt,
            seconds=seconds,
            prefill_seconds=max(0.0, seconds - decode_seconds),
            decode_seconds=decode_seconds,
            steps=tuple(self.steps),
            from_draft=tuple(self.from_draft),
            seed=self.seed,
            plain_seconds_per_token=engine.costs.plain_step_during(self.steps),
        )


def plain_tokens_per_second(result: GenerationResult) -> float | None:
    return 1.0 / result.plain_seconds_per_token if result.plain_seconds_per_token else None


def speedup(result: GenerationResult) -> float | None:
    """Tokens per second over plain decoding's; None when one of them is unknown."""
    plain = plain_tokens_per_second(result)
    return result.tokens_per_second / plain if plain and result.tokens_per_second else None


def drafters_used(steps: Sequence[StepRecord]) -> str:
    """Names of the drafters that drafted, the busiest first; `none` when there were none."""
    drafted: dict[str, int] = {}
    for step in steps:
        if step.drafter is not None and step.num_drafted:
            drafted[step.drafter] = drafted.get(step.drafter, 0) + step.num_drafted
    return ",".join(sorted(drafted, key=lambda name: -drafted[name])) or "none"


def summary_line(engine: Engine, result: GenerationResult) -> str:
    """`142 tokens, 118.2 tok/s, 1.34x plain, 61% of 96 drafted tokens accepted (ngram, pacer); int8 native`."""
    parts = [f"{result.num_tokens} tokens", f"{result.tokens_per_second:.1f} tok/s"]
    ratio = speedup(result)
    if ratio is not None:
        parts.append(f"{ratio:.2f}x plain")
    rate = result.acceptance_rate
    parts.append("nothing drafted" if rate is None else f"{rate:.0%} of {result.num_drafted} drafted tokens accepted")
    info = engine.runner.info
    return f"{', '.join(parts)} ({drafters_used(result.steps)}, {engine.controller.name}); {info.precision} {info.backend}"


def draft_memory(engine: Engine) -> dict[str, int]:
    """Bytes of each drafter's shared stores and own weights."""
    return {drafter.name: drafter.memory_bytes() for drafter in engine.drafters}


def result_document(engine: Engine, result: GenerationResult) -> dict[str, Any]:
    """The object that `--json` prints; the docs page of the command line lists its fields."""
    info = engine.runner.info
    document: dict[str, Any] = {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "num_tokens": result.num_tokens,
        "tokens_per_second": result.tokens_per_second,
        "plain_tokens_per_second": plain_tokens_per_second(result),
        "rounds": result.num_rounds,
        "drafted": result.num_drafted,
        "accepted": result.num_accepted,
        "drafter": drafters_used(result.steps),
        "controller": engine.controller.name,
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "acceptance_rate": result.acceptance_rate,
        "block_efficiency": result.block_efficiency,
        "speedup_vs_plain": speedup(result),
        "num_prompt_tokens": result.num_prompt_tokens,
        "seconds": result.seconds,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "seed": result.seed,
        "precision": info.precision,
        "backend": info.backend,
        "device": info.device,
        "notes": list(result.notes),
        "draft_memory_bytes": {"this_text": result.draft_bytes} | draft_memory(engine),
    }
    if result.logprobs is not None:
        document["logprobs"] = [asdict(item) for item in result.logprobs]
    return document

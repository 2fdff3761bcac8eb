"""Are greedy tokens the same with and without speculation? Every drafter, every draft length, in more than one precision.

    python benchmarks/identity.py --prompts FILE.jsonl --json OUT.json

First every prompt with the defaults (drafters `auto`, the pacer), one by one, in the default precision. Then the shortest prompts
of each category, in ragged batches, with every drafter at every fixed draft length, in each precision. A difference is listed with
the margin between the two most probable tokens of plain decoding at its first token (a logit difference; 0 is a tie).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from paceline.assembly import Target, build_engine, load_target
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.engine import MAX_BATCH, Engine
from paceline.errors import PacelineError
from paceline.execution.base import Segment, prefill
from paceline.study.environment import command, environment
from paceline.study.prompts import BenchPrompt, load_prompts
from paceline.study.report import write_json

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
Ids = list[int]


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer that is not plain decoding's."""

    precision: str
    draft: str
    num_draft: int | None
    """None: the pacer chose."""
    prompt: str
    first_difference: int
    top2_margin: float


def margin_at(engine: Engine, tokens: Sequence[int]) -> float:
    """Largest minus second-largest logit of the target after these tokens."""
    sequence = engine.runner.open()
    prefill(engine.runner, sequence, tokens[:-1])
    logits = engine.runner.forward([Segment(sequence, tokens[-1:])]).logits[0]
    engine.runner.close(sequence)
    best = logits.topk(2).values
    return float(best[0] - best[1])


def encode(engine: Engine, texts: Sequence[str]) -> list[Ids]:
    return [engine.tokenizer.encode(engine.render_chat([{"role": "user", "content": t}]), add_special=False) for t in texts]


def generate(engine: Engine, prompts: Sequence[Ids], params: SamplingParams, *, plain: bool = False) -> list[tuple[int, ...]]:
    """Answers of all prompts, decoded together."""
    answers: list[tuple[int, ...]] = []
    for first in range(0, len(prompts), MAX_BATCH):
        answers += [r.token_ids for r in engine.generate(list(prompts[first : first + MAX_BATCH]), params, plain=plain)]
    return answers


def compare(
    engine: Engine,
    names: Sequence[str],
    prompts: Sequence[Ids],
    want: Sequence[tuple[int, ...]],
    got: Sequence[tuple[int, ...]],
    k: int | None,
) -> Iterator[Difference]:
    for name, prompt, expected, answer in zip(names, prompts, want, got, strict=True):
        if answer != expected:
            first = next(i for i, (a, b) in enumerate(zip((*answer, -1), (*expected, -1), strict=False)) if a != b)
            margin = margin_at(engine, [*prompt, *expected[:first]])
            yield Difference(engine.runner.info.precision, engine.speculation.draft, k, name, first, margin)


def defaults_on_all(target: Target, source: str, params: SamplingParams) -> tuple[dict[str, Any], list[Difference]]:
    engine = build_engine(Engine, target, SpeculationConfig())
    rows = load_prompts(source)
    prompts = encode(engine, [row.text for row in rows])
    fits = [i for i, p in enumerate(prompts) if len(p) + params.max_tokens < engine.runner.info.max_context]
    found: list[Difference] = []
    for i in track(fits, "defaults, prompt by prompt"):
        want = engine.generate(prompts[i], params, plain=True).token_ids
        got = engine.generate(prompts[i], params, task=rows[i].category).token_ids
        found += compare(engine, [rows[i].name], [prompts[i]], [want], [got], None)
    part = {"precision": engine.runner.info.precision, "draft": "auto", "controller": "pacer", "num_prompts": len(fits)}
    return part | {"num_identical": len(fits) - len(found)}, found


def shortest(rows: Sequence[BenchPrompt], limit: int) -> list[BenchPrompt]:
    """The `limit` shortest prompts of each category: reading long ones again and again would take most of the time."""
    by_category: dict[str, list[BenchPrompt]] = {}
    for row in rows:
        by_category.setdefault(row.category, []).append(row)
    return [row for group in by_category.values() for row in sorted(group, key=lambda row: len(row.text))[:limit]]


def every_drafter(
    target: Target, source: str, drafts: Sequence[str], limit: int, count: int, params: SamplingParams
) -> Iterator[tuple[dict[str, Any], list[Difference]]]:
    """A result for each drafter and length, as soon as it is there; a drafter that cannot be made is listed with the reason."""
    rows = shortest(load_prompts(source), limit)[:count]
    base = build_engine(Engine, target, SpeculationConfig())
    prompts = encode(base, [row.text for row in rows])
    names = [row.name for row in rows]
    want = generate(base, prompts, params, plain=True)
    jobs = [(draft, k) for draft in drafts for k in LENGTHS]
    for draft, k in track(jobs, f"{base.runner.info.precision}, every drafter and length"):
        part: dict[str, Any] = {"precision": base.runner.info.precision, "draft": draft, "num_draft": k}
        config = SpeculationConfig(draft=draft, controller="fixed", controller_options={"num_draft": k})
        try:
            engine = build_engine(Engine, target, config)
        except PacelineError as error:
            yield part | {"num_prompts": 0, "num_identical": 0, "left_out": str(error)}, []
            continue
        differing = list(compare(engine, names, prompts, want, generate(engine, prompts, params), k))
        yield part | {"num_prompts": len(prompts), "num_identical": len(prompts) - len(differing)}, differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--limit", type=int, default=2, help="shortest prompts of each category for the second part")
    parser.add_argument("--count", type=int, default=24, help="most prompts for the second part")
    parser.add_argument("--short-tokens", type=int, default=32, help="tokens of an answer in the second part")
    parser.add_argument("--skip-first", action="store_true", help="leave the first part out")
    parser.add_argument("--drafts", default="ngram")
    parser.add_argument("--precisions", default="auto,fp32")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    params, short = SamplingParams(max_tokens=options.max_tokens), SamplingParams(max_tokens=options.short_tokens)
    results: list[dict[str, Any]] = []
    differences: list[Difference] = []

    def keep(part: dict[str, Any], found: Sequence[Difference]) -> None:
        """Written after every part: an interrupted run keeps what it has."""
        results.append(part)
        differences.extend(found)
        compared, same = sum(r["num_prompts"] for r in results), sum(r["num_identical"] for r in results)
        document = {"environment": environment(), "command": command(), "compared": compared, "identical": same}
        write_json(options.json, document | {"results": results, "differences": [asdict(d) for d in differences]})

    for number, precision in enumerate(options.precisions.split(",")):
        target = load_target(options.model, RunnerConfig(precision=precision))
        if number == 0 and not options.skip_first:
            keep(*defaults_on_all(target, options.prompts, params))
        drafts = options.drafts.split(",")
        for part, found in every_drafter(target, options.prompts, drafts, options.limit, options.count, short):
            keep(part, found)
    print(f"{len(differences)} differences; see {options.json}")


if __name__ == "__main__":
    main()

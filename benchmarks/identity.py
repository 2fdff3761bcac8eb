"""Are greedy tokens the same with and without speculation? Every drafter, every draft length, in more than one precision.

    python benchmarks/identity.py --prompts FILE.jsonl --json OUT.json
    python benchmarks/identity.py --prompts FILE.jsonl --skip-first --drafts ngram,suffix --precisions fp32 --json PART.json
    python benchmarks/identity.py --join PART.json OTHER.json --json OUT.json

First every prompt with the defaults (drafters `auto`, the pacer), one by one, in the first precision. Then the shortest prompts
of each category, in ragged batches, with every drafter at every fixed draft length, in each precision. A difference is listed with
the margin between the two most probable tokens of plain decoding at its first token (a logit difference; 0 is a tie).

The whole matrix can be recorded in parts, by processes side by side (--threads) or on several machines: choose --drafts (empty:
the first part only), --precisions, --lengths, --skip-first, and --join the files. A part is written after each drafter and length.
"""

from __future__ import annotations

import argparse
import json
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
from paceline.study.methods import split_names
from paceline.study.prompts import BenchPrompt, encode_prompt, encode_prompts, load_prompts
from paceline.study.report import check_writable, write_json

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
    longest = engine.runner.info.max_context - params.max_tokens - 1
    prompts = encode_prompts(engine.tokenizer, load_prompts(source), longest=longest)
    found: list[Difference] = []
    for row, ids in track(prompts, "defaults, prompt by prompt"):
        want = engine.generate(ids, params, plain=True).token_ids
        got = engine.generate(ids, params, task=row.category).token_ids
        found += compare(engine, [row.name], [ids], [want], [got], None)
    part = {"precision": engine.runner.info.precision, "draft": "auto", "controller": "pacer", "num_prompts": len(prompts)}
    return part | {"num_identical": len(prompts) - len(found)}, found


def shortest(rows: Sequence[BenchPrompt], limit: int) -> list[BenchPrompt]:
    """The `limit` shortest prompts of each category: reading long ones again and again would take most of the time."""
    by_category: dict[str, list[BenchPrompt]] = {}
    for row in rows:
        by_category.setdefault(row.category, []).append(row)
    return [row for group in by_category.values() for row in sorted(group, key=lambda row: len(row.text))[:limit]]


def every_drafter(
    target: Target, rows: Sequence[BenchPrompt], drafts: Sequence[str], lengths: Sequence[int], params: SamplingParams
) -> Iterator[tuple[dict[str, Any], list[Difference]]]:
    """A result for each drafter and length, as soon as it is there; a drafter that cannot be made is listed with the reason."""
    base = build_engine(Engine, target, SpeculationConfig())
    prompts = [encode_prompt(base.tokenizer, row.text) for row in rows]
    names = [row.name for row in rows]
    want = generate(base, prompts, params, plain=True)
    jobs = [(draft, k) for draft in drafts for k in lengths]
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


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Parts of the matrix as one document. What several of them hold counts once, as the last one has it."""
    results: dict[tuple[Any, ...], dict[str, Any]] = {}
    differences: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for part in parts:
        for row in part["results"]:
            key = row["precision"], row["draft"], row.get("num_draft")
            results[key] = row
            differences[key] = [d for d in part["differences"] if (d["precision"], d["draft"], d["num_draft"]) == key]
    ordered = sorted(results, key=lambda key: key[2] is not None)  # answers with the defaults first, else as they come
    return {
        "environment": parts[0]["environment"],
        "command": "\n".join(dict.fromkeys(part["command"] for part in parts)),
        **counted([results[key] for key in ordered], [d for key in ordered for d in differences[key]]),
    }


def counted(results: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> dict[str, Any]:
    compared, same = (sum(row[key] for row in results) for key in ("num_prompts", "num_identical"))
    return {"compared": compared, "identical": same, "results": results, "differences": differences}


def record(options: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for; the file is written after every part, so that an interrupted run keeps what it has."""
    params, short = SamplingParams(max_tokens=options.max_tokens), SamplingParams(max_tokens=options.short_tokens)
    about = {"environment": environment(), "command": command()}
    results: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []

    def keep(part: dict[str, Any], found: Sequence[Difference]) -> None:
        results.append(part)
        differences.extend(asdict(difference) for difference in found)
        write_json(options.json, about | counted(results, differences))

    rows = shortest(load_prompts(options.prompts), options.limit)[: options.count]
    drafts, lengths = split_names(options.drafts), [int(k) for k in split_names(options.lengths)]
    for number, precision in enumerate(split_names(options.precisions)):
        target = load_target(options.model, RunnerConfig(precision=precision, threads=options.threads))
        if number == 0 and not options.skip_first:
            keep(*defaults_on_all(target, options.prompts, params))
        if drafts:
            for part, found in every_drafter(target, rows, drafts, lengths, short):
                keep(part, found)
    return counted(results, differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts")
    parser.add_argument("--model", default="default")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--limit", type=int, default=2, help="shortest prompts of each category for the second part")
    parser.add_argument("--count", type=int, default=24, help="most prompts for the second part")
    parser.add_argument("--short-tokens", type=int, default=32, help="tokens of an answer in the second part")
    parser.add_argument("--skip-first", action="store_true", help="leave the first part out")
    parser.add_argument("--drafts", default="ngram", help="by comma, or by semicolon where a name holds a comma")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--precisions", default="auto,fp32")
    parser.add_argument("--threads", type=int, help="of this process; default: all cores")
    parser.add_argument("--join", type=Path, nargs="+", metavar="PART", help="make one file of several instead of running")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.prompts is None and options.join is None:
        parser.error("--prompts FILE.jsonl or --join PART.json ... is needed")
    check_writable(options.json)
    if options.join is not None:
        document = joined([json.loads(path.read_text(encoding="utf-8")) for path in options.join])
        write_json(options.json, document)
    else:
        document = record(options)
    print(f"{document['identical']} of {document['compared']} answers identical; see {options.json}")


if __name__ == "__main__":
    main()

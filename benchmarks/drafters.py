"""Every drafter on the same prompts, under the pacer, against plain decoding: what it emits, what it costs, what it is worth.

    python benchmarks/drafters.py --prompts A.jsonl --prompts B.jsonl --json benchmarks/results/drafters.json

One interleaved run for each temperature: every prompt is answered by every drafter before the next one begins. A drafter that
cannot be made here is listed with the reason. What is done is written every other minute and at the end, Ctrl-C included.
`python benchmarks/make_tables.py` writes the tables into docs/drafting.md.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paceline.assembly import Target, build_engine, load_target
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.drafting.registry import TABLE, names
from paceline.engine import Engine
from paceline.errors import PacelineError
from paceline.study.bench import PLAIN, Sample, run, summarise
from paceline.study.environment import command, environment
from paceline.study.methods import EngineMethod, split_names
from paceline.study.prompts import BenchPrompt, load_prompts
from paceline.study.report import check_writable, plot_results, write_json

JOINED = ("auto", "ngram,suffix", "merged:ngram|suffix", "merged:suffix|token_recycling+tree")
"""Compositions that are measured beside the single drafters."""
WRITE_EVERY = 120.0
"""Seconds between two writes of the result."""
Encoded = list[tuple[BenchPrompt, list[int]]]


@dataclass(slots=True)
class Pass:
    """One interleaved run at one temperature."""

    params: SamplingParams
    samples: list[Sample] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of each drafter's shared stores and weights after its last answer."""

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `paceline bench`, with what drafting costs."""
        return [
            asdict(row)
            | draft_costs([s for s in self.samples if s.method == row.method and row.category in ("all", s.category)])
            | {"memory_bytes": self.memory.get(row.method, 0)}
            for row in summarise(self.samples, self.params)
        ]


def draft_costs(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Milliseconds of drafting for each drafted token and each round, and of the rest of a round outside the forward pass."""
    steps = [step for sample in samples for step in sample.result.steps]
    drafting = 1e3 * sum(step.draft_seconds for step in steps)
    rest = 1e3 * sum(step.round_seconds - step.verify_seconds - step.draft_seconds for step in steps)
    drafted = sum(step.num_drafted for step in steps)
    return {
        "draft_ms_per_token": drafting / drafted if drafted else None,
        "draft_ms_per_round": drafting / len(steps) if steps else None,
        "rest_ms_per_round": rest / len(steps) if steps else None,
    }


def default_drafters() -> list[str]:
    """All that need no argument, and the compositions."""
    return [*(name for name in names() if not TABLE[name.removesuffix("+tree")].argument), *JOINED]


def not_named(drafters: Sequence[str]) -> dict[str, str]:
    """Kinds that take an argument and were not given one."""
    kinds = {name.partition(":")[0] for name in drafters if ":" in name}
    return {kind: f"needs {entry.needs}; see --also" for kind, entry in TABLE.items() if entry.argument and kind not in kinds}


def make_methods(target: Target, drafters: Sequence[str], left_out: dict[str, str]) -> list[EngineMethod]:
    """Plain decoding and a method for each drafter that can be made; `left_out` gets the others with the reason."""
    methods = [EngineMethod(PLAIN, build_engine(Engine, target, SpeculationConfig(draft="none")), plain=True)]
    for name in drafters:
        try:
            methods.append(EngineMethod(name, build_engine(Engine, target, SpeculationConfig(draft=name))))
        except PacelineError as error:
            left_out[name] = str(error)
    return methods


def encode(target: Target, sources: Sequence[str], limit: int | None, room: int) -> Encoded:
    """Prompts of all files as token ids; those that leave less than `room` tokens for an answer are left out."""
    tokenizer = target.source.tokenizer
    prompts = [prompt for source in sources for prompt in load_prompts(source, limit=limit)]
    encoded = [
        (p, tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": p.text}]), add_special=False)) for p in prompts
    ]
    return [(prompt, ids) for prompt, ids in encoded if len(ids) + room < target.runner.info.max_context]


class Report:
    """The result document, written while it grows."""

    def __init__(self, target: Target, options: argparse.Namespace, num_prompts: int) -> None:
        info = asdict(target.runner.info)
        self._path: Path = options.json
        self._fixed: dict[str, Any] = {
            "environment": environment() | {"model": target.source.name, "runner": info},
            "command": command(),
            "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
            "num_prompts": num_prompts,
        }
        self.passes: list[Pass] = []
        self.left_out: dict[str, str] = {}
        self._written = monotonic()

    def document(self, *, complete: bool) -> dict[str, Any]:
        runs = [{"sampling": asdict(p.params), "results": p.rows()} for p in self.passes if p.samples]
        return self._fixed | {"complete": complete, "left_out": self.left_out, "runs": runs}

    def write(self, *, complete: bool = False, now: bool = False) -> None:
        if now or monotonic() - self._written > WRITE_EVERY:
            write_json(self._path, self.document(complete=complete))
            self._written = monotonic()


def measure(target: Target, drafters: Sequence[str], prompts: Encoded, params: SamplingParams, report: Report) -> None:
    """One pass: all drafters on all prompts."""
    methods = make_methods(target, drafters, report.left_out)
    current = Pass(params)
    report.passes.append(current)
    drafting = {method.name: method.engine.drafters for method in methods}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("warming up", total=len(methods) * len(prompts))

        def show(method: str, prompt: BenchPrompt) -> None:
            progress.update(bar, description=f"T = {params.temperature:g}, {prompt.category}: {method}")

        for sample in run(methods, prompts, params, on_start=show):
            current.samples.append(sample)
            current.memory[sample.method] = sum(drafter.memory_bytes() for drafter in drafting[sample.method])
            progress.advance(bar)
            report.write()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", action="append", required=True, help="JSONL file or built-in set; may be given several times")
    parser.add_argument("--drafters", default="", help="instead of all that need no argument: names by comma, or by semicolon")
    parser.add_argument("--also", default="", help="drafters beside those, for example model:FOLDER")
    parser.add_argument("--model", default="default")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each category")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--seed", type=int, default=0, help="of sampled answers, which then must equal plain decoding's; -1: none")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="PNG file; other temperatures than the first add -t1 and so on")
    return parser.parse_args()


def main() -> None:
    options = parse()
    check_writable(options.json)
    target = load_target(options.model, RunnerConfig(precision=options.precision), print)
    drafters = [*(split_names(options.drafters) or default_drafters()), *split_names(options.also)]
    prompts = encode(target, options.prompts, options.limit, options.max_tokens)
    report = Report(target, options, len(prompts))
    report.left_out |= not_named(drafters)
    complete = False
    try:
        for temperature in map(float, options.temperatures.split(",")):
            seed = options.seed if temperature > 0 and options.seed >= 0 else None
            params = SamplingParams(max_tokens=options.max_tokens, temperature=temperature, seed=seed)
            measure(target, drafters, prompts, params, report)
            gc.collect()  # drafters' own copies of weights
        complete = True
    finally:
        report.write(complete=complete, now=True)
    if options.plot is not None:
        for number, part in enumerate(report.document(complete=True)["runs"]):
            suffix = f"-t{part['sampling']['temperature']:g}" if number else ""
            plot_results(part, options.plot.with_stem(options.plot.stem + suffix))


if __name__ == "__main__":
    main()

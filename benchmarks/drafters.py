"""Every drafter on the same prompts, under the pacer, against plain decoding: what it emits, what it costs, what it is worth.

    python benchmarks/drafters.py --prompts A.jsonl --prompts B.jsonl --json benchmarks/results/drafters.json

One interleaved run for each temperature: every prompt is answered by every drafter before the next one begins, after one pass over
it for all. With --repeats each drafter begins anew each time (nothing remembered), and a prompt counts with its median. Two clocks:
the wall, and the accounted one (`study/accounting.py`). A drafter that cannot be made here is listed with the reason. What is done
is written every other minute and at the end, Ctrl-C included. `python benchmarks/make_tables.py` writes the tables into
docs/drafting.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paceline.assembly import Target, build_engine, load_target
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.drafting.registry import TABLE, names
from paceline.engine import Engine
from paceline.errors import PacelineError
from paceline.study.accounting import accounted
from paceline.study.bench import OVERALL, PLAIN, Sample, summarise
from paceline.study.charts import heat_chart
from paceline.study.contest import Contestant, ReadOnce, answered_by_all, hold
from paceline.study.environment import command, environment
from paceline.study.methods import split_names
from paceline.study.prompts import WARM_UP, BenchPrompt, encode_prompt, encode_prompts, load_prompts
from paceline.study.report import Recording, sample_row, speed_panel, table, table_rows

JOINED = ("auto", "ngram,suffix", "merged:ngram|suffix", "merged:suffix|token_recycling+tree")
"""Compositions that are measured beside the single drafters."""
Encoded = list[tuple[BenchPrompt, list[int]]]
Tell = Callable[[], None]


@dataclass(slots=True)
class Pass:
    """One interleaved run at one temperature."""

    params: SamplingParams
    samples: list[Sample] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of each drafter's shared stores and weights after its last answer."""

    def rows(self, pool: Sequence[Sample]) -> list[dict[str, Any]]:
        """The rows of `paceline bench`, with what drafting costs. pool: all answers of the run."""
        samples = accounted(answered_by_all(self.samples), pool)
        return [
            asdict(row)
            | draft_costs([s for s in samples if s.method == row.method and row.category in (OVERALL, s.category)])
            | {"memory_bytes": self.memory.get(row.method, 0)}
            for row in summarise(samples, self.params)
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


def make_contestants(target: Target, drafters: Sequence[str], shared: ReadOnce, left_out: dict[str, str]) -> list[Contestant]:
    """Plain decoding and each drafter that can be made under the pacer; `left_out` gets the others with the reason."""
    made = []
    for name in (PLAIN, *drafters):
        try:
            engine = build_engine(Engine, target, SpeculationConfig(draft="none" if name == PLAIN else name))
        except PacelineError as error:
            left_out[name] = str(error)
        else:
            made.append(Contestant(name, engine, engine.controller, shared, plain=name == PLAIN))
    return made


def document(passes: Sequence[Pass]) -> dict[str, Any]:
    """Tables and answers of all temperatures so far."""
    pool = [sample for p in passes for sample in p.samples]
    runs = [{"sampling": asdict(p.params), "results": table(p.rows(pool))} for p in passes if p.samples]
    answers = [{"temperature": p.params.temperature} | sample_row(s) for p in passes for s in accounted(p.samples, pool)]
    return {"runs": runs, "samples": table(answers)}


def measure(
    target: Target, drafters: Sequence[str], prompts: Encoded, current: Pass, repeats: int, left_out: dict[str, str], tell: Tell
) -> None:
    """One pass: all drafters on all prompts; `tell` is called after each answer."""
    warm_up = encode_prompt(target.source.tokenizer, WARM_UP)
    shared = ReadOnce(target.runner)
    contestants: dict[str, Contestant] = {}

    def make() -> list[Contestant]:
        contestants.clear()
        gc.collect()  # drafters' own copies of weights
        made = make_contestants(target, drafters, shared, left_out)
        contestants.update((contestant.name, contestant) for contestant in made)
        return made

    def keep(sample: Sample) -> None:
        current.samples.append(sample)
        drafting = contestants[sample.method].engine.drafters
        current.memory[sample.method] = sum(drafter.memory_bytes() for drafter in drafting)
        tell()

    label = f"T = {current.params.temperature:g}"
    hold(make, prompts, current.params, warm_up=warm_up, repeats=repeats, label=label, keep=keep)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", action="append", required=True, help="JSONL file or built-in set; may be given several times")
    parser.add_argument("--drafters", default="", help="instead of all that need no argument: names by comma, or by semicolon")
    parser.add_argument("--also", default="", help="drafters beside those, for example model:FOLDER")
    parser.add_argument("--model", default="default")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each category")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1, help="times that every prompt is answered, by fresh drafters")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--seed", type=int, default=0, help="of sampled answers, which then must equal plain decoding's; -1: none")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="PNG file")
    return parser.parse_args()


def main() -> int:
    options = parse()
    target = load_target(options.model, RunnerConfig(precision=options.precision), print)
    drafters = [*(split_names(options.drafters) or default_drafters()), *split_names(options.also)]
    loaded = [prompt for source in options.prompts for prompt in load_prompts(source, limit=options.limit)]
    prompts = encode_prompts(target.source.tokenizer, loaded, longest=target.runner.info.max_context - options.max_tokens - 1)
    passes: list[Pass] = []
    left_out = not_named(drafters)
    about = {
        "environment": environment() | {"model": target.source.name, "runner": asdict(target.runner.info)},
        "command": command(),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "num_prompts": len(prompts),
        "left_out": left_out,
    }
    recording = Recording(options.json, lambda: about | document(passes))
    complete = False
    try:
        for temperature in map(float, options.temperatures.split(",")):
            seed = options.seed if temperature > 0 and options.seed >= 0 else None
            passes.append(Pass(SamplingParams(max_tokens=options.max_tokens, temperature=temperature, seed=seed)))
            measure(target, drafters, prompts, passes[-1], options.repeats, left_out, recording.update)
        complete = True
    except KeyboardInterrupt:
        print("interrupted; the figures cover the prompts that all drafters answered", file=sys.stderr)
    finally:
        runs = recording.write(complete=complete)["runs"]
    if options.plot is not None and runs:
        title = "drafters under the pacer, temperature"
        parts = [(f"{title} {run['sampling']['temperature']:g}", table_rows(run["results"])) for run in runs]
        heat_chart([speed_panel(name, rows, bold="auto") for name, rows in parts], options.plot)
    return 0 if complete else 130


if __name__ == "__main__":
    raise SystemExit(main())

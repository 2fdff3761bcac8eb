"""Every controller on real prompts, in one interleaved run: against plain decoding and the best fixed length in hindsight.

    python benchmarks/controllers.py --prompts FILE.jsonl --draft ngram --json OUT.json --plot OUT.png
    python benchmarks/controllers.py --prompts FILE.jsonl --draft quantized_self --precision fp32 --json OUT.json --plot OUT.png

Each prompt is answered at each temperature by plain decoding, by every fixed length and by every registered controller, in an order
that rotates from prompt to prompt. All share one target and one set of drafters; each has a controller of its own for each
temperature, which keeps what it learnt over the run. Answers have one length (the model's own end is ignored) and, above
temperature 0, one seed, so that all controllers write the same text; with --unseeded each writes its own, under the default rule
for drawn drafts. `best_fixed` of a category is the fixed length with the most tokens a second there. The file is rewritten after
every prompt; until the end it holds raw samples only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.progress import Progress

from paceline.assembly import build_engine, load_target
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.control import registry
from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable
from paceline.engine import Engine
from paceline.errors import OptionError
from paceline.records import DraftFeatures, GenerationResult, Plan, StepRecord
from paceline.study.bench import OVERALL, PLAIN, BenchRow, Sample, rotated, summarise
from paceline.study.environment import command, environment
from paceline.study.prompts import load_prompts
from paceline.study.report import check_writable, write_json

FIXED_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)


class Timed(Controller):
    """Decides as another controller does, and counts the time that this takes."""

    def __init__(self, inner: Controller) -> None:
        self.name = inner.name
        self.inner = inner
        self.seconds = 0.0

    def plan_unseen(self, task: str, batch_size: int) -> Plan | None:
        return self.inner.plan_unseen(task, batch_size)

    def plan(self, context: RoundContext) -> Plan:
        started = perf_counter()
        plan = self.inner.plan(context)
        self.seconds += perf_counter() - started
        return plan

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool:
        started = perf_counter()
        more = self.inner.keep_drafting(request_id, features)
        self.seconds += perf_counter() - started
        return more

    def observe(self, record: StepRecord) -> None:
        started = perf_counter()
        self.inner.observe(record)
        self.seconds += perf_counter() - started

    def finish(self, request_id: int) -> None:
        self.inner.finish(request_id)


@dataclass(slots=True)
class Contestant:
    """One way to decide, at one temperature; a bench method."""

    name: str
    engine: Engine
    controller: Timed
    round_seconds: float = 0.0

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, task: str) -> GenerationResult:
        """Answer one prompt with this contestant's controller in the shared engine."""
        self.engine.controller = self.controller
        result = self.engine.generate(list(prompt_ids), params, plain=self.name == PLAIN, task=task)
        self.round_seconds += sum(step.round_seconds for step in result.steps)
        return result


@dataclass(slots=True)
class Contest:
    """All contestants at one temperature and what they did."""

    params: SamplingParams
    contestants: list[Contestant]
    samples: list[Sample] = field(default_factory=list)


def controller_names() -> tuple[str, ...]:
    """Plain decoding, the fixed lengths, and everything else that is registered."""
    return (PLAIN, *(f"fixed_{k}" for k in FIXED_LENGTHS), *(name for name in registry.names() if name != "fixed"))


def make_controller(name: str, costs: CostTable) -> Controller:
    """A fresh controller with cost figures of its own, as measured before the run."""
    costs = CostTable.from_json(costs.to_json())
    kind, _, length = name.rpartition("_")
    if name == PLAIN:
        return registry.create("fixed", costs, {"num_draft": 0})
    return registry.create("fixed", costs, {"num_draft": int(length)}) if kind == "fixed" else registry.create(name, costs)


def make_contest(engine: Engine, names: Sequence[str], params: SamplingParams) -> Contest:
    return Contest(params, [Contestant(name, engine, Timed(make_controller(name, engine.costs))) for name in names])


def summary(contest: Contest) -> dict[str, Any]:
    """One temperature's table: bench rows, each with its distance from the best fixed length of its category."""
    rows = summarise(contest.samples, contest.params)
    best = best_fixed(rows)
    share = {c.name: c.controller.seconds / c.round_seconds for c in contest.contestants if c.round_seconds}
    return {
        "temperature": contest.params.temperature,
        "results": [asdict(row) | against(row, best) for row in rows],
        "best_fixed": {category: row.method for category, row in best.items()},
        "controller_share_of_round": share,
    }


def best_fixed(rows: Sequence[BenchRow]) -> dict[str, BenchRow]:
    """The fastest fixed length of each category, chosen in hindsight."""
    best: dict[str, BenchRow] = {}
    for row in rows:
        known = best.get(row.category)
        if row.method.startswith("fixed_") and (known is None or row.tokens_per_second > known.tokens_per_second):
            best[row.category] = row
    return best


def against(row: BenchRow, best: dict[str, BenchRow]) -> dict[str, float | None]:
    reference = best.get(row.category)
    return {"speed_vs_best_fixed": row.tokens_per_second / reference.tokens_per_second if reference else None}


def raw(contests: Sequence[Contest]) -> list[list[Any]]:
    """[temperature, method, prompt, category, tokens, decode seconds, drafted, accepted, rounds] of every answer."""
    rows = []
    for contest in contests:
        for s in contest.samples:
            done = s.result
            counts = (done.num_tokens, done.decode_seconds, done.num_drafted, done.num_accepted, done.num_rounds)
            rows.append([contest.params.temperature, s.method, s.prompt, s.category, *counts])
    return rows


def plot(runs: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Heat charts, one for each temperature: speed against plain, categories by controllers; the best fixed length is framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(12, 4.6 * len(runs)), layout="constrained")
    for number, run in enumerate(runs, start=1):
        axes = figure.add_subplot(len(runs), 1, number)
        speed = {(row["category"], row["method"]): row["speedup_vs_plain"] for row in run["results"]}
        categories, methods = (list(dict.fromkeys(key[i] for key in speed)) for i in (0, 1))
        methods.remove(PLAIN)
        grid = [[speed[category, method] for method in methods] for category in categories]
        axes.imshow(grid, cmap="RdYlGn", vmin=0.0, vmax=2.0, aspect="auto")
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6)
            best = methods.index(run["best_fixed"][categories[i]])
            axes.add_patch(Rectangle((best - 0.5, i - 0.5), 1, 1, fill=False, linewidth=1.5))
        axes.set_xticks(range(len(methods)), methods, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(categories)), ["all prompts" if c == OVERALL else c for c in categories], fontsize=7)
        axes.set_title(f"{title}, temperature {run['temperature']:g}: tokens a second, plain = 1", fontsize=9)
    figure.savefig(path, dpi=130)


def report(run: dict[str, Any]) -> None:
    """The rows over all prompts, and where the pacer stands in its worst category."""
    print(f"temperature {run['temperature']:g}; best fixed over all: {run['best_fixed'][OVERALL]}")
    overall = [row for row in run["results"] if row["category"] == OVERALL]
    for row in sorted(overall, key=lambda row: -row["tokens_per_second"]):
        own = run["controller_share_of_round"].get(row["method"], 0.0)
        plain = row["speedup_vs_plain"] or 0.0
        print(f"{row['method']:>16} {row['tokens_per_second']:8.1f} tok/s  {plain:.3f}x plain  own time {own:.2%}")
    pacer = [row for row in run["results"] if row["method"] == "pacer"]
    for reference in ("speedup_vs_plain", "speed_vs_best_fixed"):
        worst = min(pacer, key=lambda row: row[reference], default=None)
        if worst is not None:
            print(f"pacer, worst {reference}: {worst[reference]:.3f}x in {worst['category']}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit", type=int, help="most prompts of each category")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--model", default="default")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--draft", default="ngram")
    parser.add_argument("--controllers", default=",".join(controller_names()), help="names by comma; `plain` and `fixed_K` too")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--unseeded", action="store_true", help="no seed: other rules apply, and texts differ")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    names = options.controllers.split(",")
    if PLAIN not in names or not any(name.startswith("fixed_") for name in names):
        raise OptionError(f"controllers = {options.controllers!r}: `plain` and at least one `fixed_K` are the references")
    return options


def main() -> None:
    options = parse()
    for path in (options.json, options.plot):
        if path is not None:
            check_writable(path)
    target = load_target(options.model, RunnerConfig(precision=options.precision))
    engine = build_engine(Engine, target, SpeculationConfig(draft=options.draft))
    contests = [
        make_contest(
            engine,
            options.controllers.split(","),
            SamplingParams(max_tokens=options.max_tokens, temperature=t, seed=None if options.unseeded else 0, ignore_eos=True),
        )
        for t in map(float, options.temperatures.split(","))
    ]
    prompts = load_prompts(options.prompts, limit=options.limit)
    document: dict[str, Any] = {
        "environment": environment() | {"model": options.model, "runner": asdict(engine.runner.info)},
        "command": command(),
        "complete": False,
        "draft": options.draft,
        "max_tokens": options.max_tokens,
        "costs": engine.costs.to_json(),
    }
    warm_up = engine.tokenizer.encode(prompts[0].text)
    for plain in (True, False):
        engine.generate(warm_up, SamplingParams(max_tokens=16), plain=plain)
    with Progress() as progress:
        bar = progress.add_task("controllers", total=len(prompts) * sum(len(c.contestants) for c in contests))
        for number, prompt in enumerate(prompts):
            ids = engine.tokenizer.encode(engine.render_chat([{"role": "user", "content": prompt.text}]), add_special=False)
            for contest in contests:
                for contestant in rotated(contest.contestants, number):
                    result = contestant.generate(ids, contest.params, prompt.category)
                    contest.samples.append(Sample(contestant.name, number, prompt.category, result))
                    progress.advance(bar)
            write_json(options.json, document | {"samples": raw(contests)})
    runs = [summary(contest) for contest in contests]
    write_json(options.json, document | {"complete": True, "runs": runs, "samples": raw(contests)})
    if options.plot is not None:
        plot(runs, options.plot, f"{options.draft} drafts")
    for run in runs:
        report(run)


if __name__ == "__main__":
    main()

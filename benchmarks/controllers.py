"""Every controller on real prompts, in one interleaved run: against plain decoding and the best fixed length in hindsight.

    python benchmarks/controllers.py --prompts FILE.jsonl --draft ngram --json OUT.json --plot OUT.png
    python benchmarks/controllers.py --prompts FILE.jsonl --draft quantized_self --precision fp32 --limit 1 --json OUT.json

Each prompt is answered at each temperature by plain decoding, by every fixed length and by every registered controller, in an order
that rotates from prompt to prompt. All share one target, one pass over each prompt, and one set of drafters (drafters that remember
texts excepted: each controller has its own). Each has a controller of its own for each temperature, which keeps what it learnt over
the run; with --repeats it begins anew each time, and a prompt counts with its median. Answers have one length (the model's own end
is ignored) and, above temperature 0, one seed, so that all controllers write the same text; with --unseeded each writes its own,
under the default rule for drawn drafts.

Two clocks: the wall clock, and the accounted one (`study/accounting.py`), in which a round costs what such rounds cost over the
whole run. `best_fixed` of a category is the fixed length with the most tokens a second there, by each clock. What is done is
written every other minute and at the end, Ctrl-C included.

`pacer:profile` is the pacer from its second start on (`remember = true`): it begins with the profile that it left after the
24 prompts of the package, none of which is a prompt of a test set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paceline.assembly import Target, build_engine, load_target
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.control import registry
from paceline.control.base import Controller
from paceline.costs import CostTable
from paceline.engine import Engine
from paceline.errors import OptionError
from paceline.study.accounting import accounted
from paceline.study.bench import OVERALL, PLAIN, Sample, summarise
from paceline.study.charts import heat_chart
from paceline.study.contest import Contestant, ReadOnce, answered_by_all, hold, remembers
from paceline.study.environment import command, environment
from paceline.study.prompts import WARM_UP, encode_prompt, encode_prompts, load_prompts
from paceline.study.report import Recording, check_writable, sample_row, speed_panel, table, table_rows

FIXED_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
CLOCKS = {"wall": "tokens_per_second", "accounted": "accounted_tokens_per_second"}
AGAINST = {"wall": "speed_vs_best_fixed", "accounted": "accounted_vs_best_fixed"}
PROFILE = ":profile"
"""Of a controller that begins with what it learnt before the contest."""
Tell = Callable[[], None]
Profiles = Mapping[str, dict[str, Any] | None]


@dataclass(slots=True)
class Contest:
    """All contestants at one temperature and what they did."""

    params: SamplingParams
    samples: list[Sample] = field(default_factory=list)


def controller_names() -> tuple[str, ...]:
    """Plain decoding, the fixed lengths, and everything else that is registered."""
    learning = [name for name in registry.names() if name != "fixed"]
    return (PLAIN, *(f"fixed_{k}" for k in FIXED_LENGTHS), *learning, f"pacer{PROFILE}")


def make_controller(name: str, costs: CostTable, profiles: Profiles) -> Controller:
    """A fresh controller with cost figures of its own, as measured before the run, and with its profile if it has one."""
    costs = CostTable.from_json(costs.to_json())
    kind, _, length = name.rpartition("_")
    if name == PLAIN:
        return registry.create("fixed", costs, {"num_draft": 0})
    if kind == "fixed":
        return registry.create("fixed", costs, {"num_draft": int(length)})
    controller = registry.create(name.removesuffix(PROFILE), costs)
    if (profile := profiles.get(name)) is not None:
        controller.restore(profile)
    return controller


def learn(name: str, engine: Engine, params: SamplingParams) -> dict[str, Any] | None:
    """The profile that a controller leaves after the prompts of the package."""
    engine.controller = make_controller(name, engine.costs, {})
    for prompt, ids in encode_prompts(engine.tokenizer, load_prompts("builtin")):
        engine.generate(list(ids), params, task=prompt.category)
    return engine.controller.snapshot()


def make_contestants(engines: Sequence[Engine], names: Sequence[str], profiles: Profiles, shared: ReadOnce) -> list[Contestant]:
    """A contestant for each name, on the engine of the same place or all on the only one."""
    engines = engines if len(engines) > 1 else [*engines] * len(names)
    return [
        Contestant(name, engine, make_controller(name, engine.costs, profiles), shared, plain=name == PLAIN)
        for name, engine in zip(names, engines, strict=True)
    ]


def make_engines(target: Target, draft: str, count: int) -> list[Engine]:
    """One engine for all or, when its drafters would tell one contestant what another wrote, one for each."""
    engine = build_engine(Engine, target, SpeculationConfig(draft=draft))
    if not any(remembers(drafter) for drafter in engine.drafters):
        return [engine]
    return [engine, *(build_engine(Engine, target, SpeculationConfig(draft=draft)) for _ in range(count - 1))]


def account(samples: Sequence[Sample], pool: Sequence[Sample]) -> list[Sample]:
    """With accounted time; all draft with the same drafters, so what these cost is pooled as well."""
    return accounted(samples, pool, same_drafters=True)


def summary(contest: Contest, pool: Sequence[Sample]) -> dict[str, Any]:
    """One temperature's table: bench rows, each with its distance from the best fixed length of its category, by both clocks."""
    rows = [asdict(row) for row in summarise(account(answered_by_all(contest.samples), pool), contest.params)]
    best = {clock: best_fixed(rows, column) for clock, column in CLOCKS.items()}
    for row in rows:
        for clock, column in CLOCKS.items():
            reference = best[clock].get(row["category"])
            row[AGAINST[clock]] = row[column] / reference[column] if reference else None
    return {
        "temperature": contest.params.temperature,
        "best_fixed": {clock: {category: row["method"] for category, row in rows.items()} for clock, rows in best.items()},
        "controller_share_of_round": {row["method"]: row["control_share"] for row in rows if row["category"] == OVERALL},
        "results": table(rows),
    }


def best_fixed(rows: Sequence[dict[str, Any]], column: str) -> dict[str, dict[str, Any]]:
    """The fastest fixed length of each category, chosen in hindsight."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = best.get(row["category"])
        if row["method"].startswith("fixed_") and (known is None or row[column] > known[column]):
            best[row["category"]] = row
    return best


def report(run: dict[str, Any]) -> None:
    """The rows over all prompts, and where the pacer stands in its worst category."""
    best = {clock: names[OVERALL] for clock, names in run["best_fixed"].items()}
    print(f"temperature {run['temperature']:g}; best fixed over all: {best['wall']} by the wall, {best['accounted']} accounted")
    rows = table_rows(run["results"])
    for row in sorted((r for r in rows if r["category"] == OVERALL), key=lambda row: -row["accounted_tokens_per_second"]):
        own = run["controller_share_of_round"].get(row["method"], 0.0)
        print(
            f"{row['method']:>16} wall {row['tokens_per_second']:6.1f} tok/s {row['speedup_vs_plain']:.3f}x plain, accounted "
            f"{row['accounted_tokens_per_second']:6.1f} {row['accounted_vs_plain']:.3f}x, own time {own:.2%}"
        )
    for name in ("pacer", f"pacer{PROFILE}"):
        pacer = [row for row in rows if row["method"] == name]
        for column in ("speedup_vs_plain", "accounted_vs_plain", *AGAINST.values()):
            worst = min(pacer, key=lambda row: row[column], default=None)
            if worst is not None:
                print(f"{name}, worst {column}: {worst[column]:.3f} in {worst['category']}")


def document(contests: Sequence[Contest]) -> dict[str, Any]:
    """Tables and answers of all temperatures so far."""
    pool = [sample for contest in contests for sample in contest.samples]
    answers = [
        {"temperature": contest.params.temperature} | sample_row(sample)
        for contest in contests
        for sample in account(contest.samples, pool)
    ]
    return {"runs": [summary(contest, pool) for contest in contests if has_references(contest)], "samples": table(answers)}


def has_references(contest: Contest) -> bool:
    """Whether plain decoding and a fixed length have answered yet."""
    answered = {sample.method for sample in contest.samples}
    return PLAIN in answered and any(method.startswith("fixed_") for method in answered)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit", type=int, default=2, help="most prompts of each category")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="times that every prompt is answered, by fresh controllers")
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


def measure(options: argparse.Namespace, target: Target, engines: Sequence[Engine], contests: list[Contest], tell: Tell) -> None:
    """All contests, one after the other; `tell` is called after each answer."""
    names = options.controllers.split(",")
    longest = target.runner.info.max_context - options.max_tokens
    prompts = encode_prompts(target.source.tokenizer, load_prompts(options.prompts, limit=options.limit), longest=longest)
    warm_up = encode_prompt(target.source.tokenizer, WARM_UP)
    shared = ReadOnce(target.runner)
    for temperature in map(float, options.temperatures.split(",")):
        seed = None if options.unseeded else 0
        contest = Contest(SamplingParams(max_tokens=options.max_tokens, temperature=temperature, seed=seed, ignore_eos=True))
        contests.append(contest)
        learner = engines[0] if len(engines) == 1 else make_engines(target, options.draft, 1)[0]  # its drafters keep what it wrote
        profiles = {name: learn(name, learner, contest.params) for name in names if name.endswith(PROFILE)}

        def make(profiles: Profiles = profiles) -> list[Contestant]:
            own = engines if len(engines) == 1 else make_engines(target, options.draft, len(names))
            return make_contestants(own, names, profiles, shared)

        def keep(sample: Sample, contest: Contest = contest) -> None:
            contest.samples.append(sample)
            tell()

        hold(make, prompts, contest.params, warm_up=warm_up, repeats=options.repeats, label=f"T = {temperature:g}", keep=keep)


def main() -> int:
    options = parse()
    if options.plot is not None:
        check_writable(options.plot)
    target = load_target(options.model, RunnerConfig(precision=options.precision), print)
    engines = make_engines(target, options.draft, len(options.controllers.split(",")))
    contests: list[Contest] = []
    about = {
        "environment": environment() | {"model": options.model, "runner": asdict(target.runner.info)},
        "command": command(),
        "draft": options.draft,
        "max_tokens": options.max_tokens,
        "repeats": options.repeats,
        "costs": engines[0].costs.to_json(),
    }
    recording = Recording(options.json, lambda: about | document(contests))
    complete = False
    try:
        measure(options, target, engines, contests, recording.update)
        complete = True
    except KeyboardInterrupt:
        print("interrupted; the figures cover the prompts that all controllers answered", file=sys.stderr)
    runs = recording.write(complete=complete)["runs"]
    if options.plot is not None and runs:
        title = f"{options.draft} drafts, temperature"
        parts = [(f"{title} {run['temperature']:g}", table_rows(run["results"]), run["best_fixed"]["accounted"]) for run in runs]
        heat_chart([speed_panel(name, rows, bold="pacer", best=best) for name, rows, best in parts], options.plot)
    for run in runs:
        report(run)
    return 0 if complete else 130


if __name__ == "__main__":
    raise SystemExit(main())

"""Which drafter is best, by counting instead of timing: all drafters on the same answers, priced by a virtual clock.

    python benchmarks/drafter_clock.py --prompts A.jsonl --prompts agent --json benchmarks/results/drafter-clock.json

Drafts that are chosen (not drawn) change no text, so plain decoding's answers serve all of them: a draft is accepted as far as it
says what the answer says. Rounds, rows and tokens are counted with the real drafters under the real pacer, and priced with two
curves of costs: passes as measured at the start, alone on the machine, and passes as they take in real rounds, after other work has
been in the caches. Looking, deciding and the rest of a round cost what they took in real rounds (`HOST`). The same answers and
curves give the same figures on any machine, so that differences of one percent mean something.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import track

from paceline.assembly import Target, build_engine, load_target
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.control import registry as controllers
from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable, DraftCost
from paceline.drafting.base import Drafter, DrafterContext, SequenceView
from paceline.drafting.registry import create_all
from paceline.engine import Engine
from paceline.records import PLAIN, Draft, Round, Verdict
from paceline.study.environment import command, environment
from paceline.study.prompts import AGENT, encode_prompt, load_prompts
from paceline.study.report import write_json

SINGLE = ("ngram", "suffix", "suffix+tree")
JOINED = ("ngram,suffix", "suffix+tree,ngram", "merged:ngram|suffix+tree")
HOST = {"look": 50e-6, "plan": 50e-6, "drafted": 60e-6, "plain": 20e-6}
"""Seconds of a round on the host: each drafter's look, the pacer's plan, and the rest of rounds with and without a draft."""
LENGTHS = (1, 2, 3, 5, 7, 11, 15)
"""Draft lengths that real passes are timed at."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt and what plain decoding answered."""

    category: str
    prompt: list[int]
    answer: tuple[int, ...]
    max_tokens: int


@dataclass(slots=True)
class Count:
    """Sums over the rounds of a category."""

    seconds: float = 0.0
    plain_seconds: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


def answers_of(target: Target, sources: Sequence[str], limit: int, temperature: float, max_tokens: int) -> list[Answer]:
    """Plain answers; all of the agent set, `limit` prompts of each other category."""
    engine = build_engine(Engine, target, SpeculationConfig(draft="none"))
    tokenizer = target.source.tokenizer
    found = []
    for source in sources:
        length = 2 * max_tokens if source == AGENT else max_tokens
        params = SamplingParams(max_tokens=length, temperature=temperature, seed=0 if temperature else None)
        for prompt in track(
            load_prompts(source, limit=None if source == AGENT else limit), f"{Path(source).stem}, T = {temperature:g}"
        ):
            ids = encode_prompt(tokenizer, prompt.text)
            if len(ids) + length < target.runner.info.max_context:
                category = f"{AGENT}: {prompt.category}" if source == AGENT else prompt.category
                found.append(Answer(category, ids, engine.generate(ids, params, plain=True).token_ids, length))
    return found


def passes_of(target: Target, answers: Iterable[Answer]) -> CostTable:
    """Median seconds of passes over 1, 2, ... rows in real rounds."""
    seconds: dict[int, list[float]] = defaultdict(list)
    for length in LENGTHS:
        engine = build_engine(
            Engine, target, SpeculationConfig(draft="suffix", controller="fixed", controller_options={"num_draft": length})
        )
        for answer in answers:
            for step in engine.generate(answer.prompt, SamplingParams(max_tokens=128)).steps[2:]:
                seconds[step.num_drafted + 1].append(step.verify_seconds)
    known = {rows: median(times) for rows, times in sorted(seconds.items()) if len(times) >= 12}
    return CostTable(rows=list(known), contexts=[1], verify=[list(known.values())])


def accepted_path(draft: Draft, rest: Sequence[int]) -> tuple[int, ...]:
    """Nodes of the draft that say what the answer says."""
    parents = draft.parents or tuple(range(-1, len(draft) - 1))
    path: list[int] = []
    for token in rest:
        above = path[-1] if path else -1
        node = next((i for i, p in enumerate(parents) if p == above and draft.tokens[i] == token), None)
        if node is None:
            break
        path.append(node)
    return tuple(path)


def replay(name: str, answers: Iterable[Answer], passes: CostTable, target: Target, temperature: float) -> dict[str, Count]:
    """Every answer once more with these drafters under the pacer, by the virtual clock."""
    costs = CostTable.from_json(passes.to_json())
    context = DrafterContext(vocab_size=target.runner.info.vocab_size, max_context=target.runner.info.max_context)
    drafters = create_all(name, {}, context)
    for drafter in drafters:
        costs.drafters[drafter.name] = DraftCost(0.0, HOST["look"])
    controller = controllers.create("pacer", costs, {})
    counts: dict[str, Count] = defaultdict(Count)
    for number, answer in enumerate(answers):
        replay_one(number, answer, counts[answer.category], drafters, controller, passes, target, temperature)
        controller.finish(number)
    return counts


def replay_one(
    number: int,
    answer: Answer,
    count: Count,
    drafters: Sequence[Drafter],
    controller: Controller,
    passes: CostTable,
    target: Target,
    temperature: float,
) -> None:
    """One answer, round by round."""
    tokens, whole = list(answer.prompt), [*answer.prompt, *answer.answer]
    params = SamplingParams(max_tokens=answer.max_tokens, temperature=temperature)
    ends = frozenset(target.source.tokenizer.end_ids)
    view = SequenceView(number, tokens, len(tokens), params, 0, ends)
    sessions = {drafter.name: drafter.open(view) for drafter in drafters}
    while len(tokens) < len(whole):
        length = len(tokens)
        remaining = answer.max_tokens - (length - len(answer.prompt))
        step, limit = Round(PLAIN, length), min(16, remaining - 1)
        if limit > 0 and (unseen := controller.plan_unseen(answer.category, 1)) is not None:
            step.plan = unseen
        elif limit > 0:
            outlooks = tuple(session.outlook(limit) for session in sessions.values())
            step.plan = controller.plan(RoundContext(number, length, limit, outlooks, task=answer.category, remaining=remaining))
            step.signal = next((o.signal for o in outlooks if o.drafter == step.plan.drafter), 0)
            step.draft_seconds = HOST["look"] * len(sessions)
            step.control_seconds = HOST["plan"] if any(o.available for o in outlooks) else 0.0
            if step.plan.drafter is not None:
                step.draft = sessions[step.plan.drafter].propose(step.plan.num_draft, lambda _: True)
        path = accepted_path(step.draft, whole[length:])
        emitted = whole[length : length + len(path) + 1]
        tokens += emitted
        rows = len(step.draft) + 1
        verify = passes.t_verify(rows, length)
        seconds = verify + step.draft_seconds + step.control_seconds + HOST["drafted" if step.draft.tokens else "plain"]
        # Where the answer ends within a draft, the token behind is not known; the record says that the round was cut.
        verdict = Verdict(path, (*emitted, 0)[: len(path) + 1])
        batch = (1, rows, len(emitted))
        controller.observe(
            step.record(
                number, verdict, len(emitted), verify_seconds=verify, round_seconds=seconds, batch=batch,
                warmup=length == len(answer.prompt), task=answer.category,
            )
        )  # fmt: skip
        for session_name, session in sessions.items():
            session.observe(verdict if step.draft.tokens and step.draft.drafter == session_name else None, None)
        count.seconds += seconds
        count.plain_seconds += len(emitted) * (passes.t_verify(1, length) + HOST["plain"])
        count.rounds += 1
        count.drafted += len(step.draft)
        count.accepted += min(len(path), len(emitted))
    for session in sessions.values():
        session.close()
    for drafter in drafters:
        drafter.finish_request(tokens, len(answer.prompt))


def speedup(counts: Iterable[Count]) -> float:
    """Plain seconds over seconds."""
    known = list(counts)
    return sum(c.plain_seconds for c in known) / sum(c.seconds for c in known)


def rows_of(replays: dict[str, dict[str, Count]], temperature: float, curve: str) -> list[dict[str, Any]]:
    """A flat row a method, with its worst category against the best single drafter of that category."""
    speeds = {name: {c: speedup([count]) for c, count in counts.items()} for name, counts in replays.items()}
    best = {c: max(speeds[name][c] for name in SINGLE) for c in speeds[SINGLE[0]]}
    rows = []
    for name, counts in replays.items():
        worst = min(best, key=lambda c: speeds[name][c] / best[c])
        agent = [count for category, count in counts.items() if category.startswith(AGENT)]
        rest = [count for category, count in counts.items() if not category.startswith(AGENT)]
        rows.append(
            {
                "temperature": temperature,
                "costs": curve,
                "method": name,
                "speedup": speedup(rest) if rest else None,
                "speedup_agent": speedup(agent) if agent else None,
                "lowest_against_best_single": speeds[name][worst] / best[worst],
                "lowest_category": worst,
                "rounds": sum(c.rounds for c in counts.values()),
                "drafted": sum(c.drafted for c in counts.values()),
                "accepted": sum(c.accepted for c in counts.values()),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", action="append", required=True, help="JSONL file or built-in set; may be given several times")
    parser.add_argument("--limit", type=int, default=6, help="prompts of each category, but for the agent set")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    target = load_target("default", RunnerConfig())
    texts = {t: answers_of(target, options.prompts, options.limit, t, options.max_tokens) for t in (0.0, 1.0)}
    curves = {"alone": target.costs, "in rounds": passes_of(target, texts[0.0][::8])}
    results: list[dict[str, Any]] = []
    for temperature, answers in texts.items():
        for curve, passes in curves.items():
            replays = {n: replay(n, answers, passes, target, temperature) for n in track((*SINGLE, *JOINED), curve)}
            results += rows_of(replays, temperature, curve)
    costs = {name: table.to_json() for name, table in curves.items()}
    write_json(options.json, {"environment": environment(), "command": command(), "costs": costs, "host": HOST, "results": results})
    for row in results:
        print(row)


if __name__ == "__main__":
    main()

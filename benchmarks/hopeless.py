"""What does a draft cost that is never right? Plain decoding against random drafts under the pacer, interleaved.

    python benchmarks/hopeless.py --prompts FILE.jsonl --json OUT.json

The promise: time <= 1.01 x plain + the bank's start (eight plain steps an engine, not a request).
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.progress import track

from paceline.assembly import build_engine, load_target
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.engine import Engine
from paceline.records import Draft, Outlook
from paceline.study.accounting import accounted
from paceline.study.bench import Sample
from paceline.study.environment import command, environment
from paceline.study.prompts import load_prompts
from paceline.study.report import write_json


class RandomDrafter(Drafter):
    """Proposes uniformly random tokens and always claims to have some."""

    name = "random"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @classmethod
    def build(cls, _spec: DrafterSpec, _options: Any, context: DrafterContext) -> RandomDrafter:
        return cls(context.vocab_size)

    def open(self, view: SequenceView) -> DraftSession:
        return RandomSession(self.vocab_size, view.seed)


class RandomSession(DraftSession):
    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._random = random.Random(seed)

    def outlook(self, max_tokens: int) -> Outlook:
        return Outlook("random", max_tokens, 8)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        return Draft(tuple(self._random.randrange(self._vocab_size) for _ in range(num_tokens)), drafter="random")


def accounted_ratio(samples: Sequence[Sample]) -> float:
    """Hopeless over plain seconds with every forward at its price over the whole run (`study.accounting`)."""
    totals = {"plain": 0.0, "hopeless": 0.0}
    for sample in accounted(samples):
        totals[sample.method] += sample.accounted_seconds or 0.0
    return totals["hopeless"] / totals["plain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    target = load_target("default", RunnerConfig())
    engine = build_engine(Engine, target, SpeculationConfig())
    engine.drafters = [RandomDrafter(engine.runner.info.vocab_size)]
    params = SamplingParams(max_tokens=options.max_tokens, ignore_eos=True)
    prompts = [p.text for p in load_prompts(options.prompts, limit=options.limit)]
    engine.generate(prompts[0], SamplingParams(max_tokens=16), plain=True)

    rows: list[dict[str, Any]] = []
    samples: list[Sample] = []
    for number, prompt in enumerate(track(prompts, "plain and hopeless")):
        seconds: dict[bool, list[float]] = {True: [], False: []}
        drafted = 0
        for plain in (True, False, False, True) if number % 2 else (False, True, True, False):
            start = perf_counter()
            result = engine.generate(prompt, params, plain=plain, task="hopeless")
            seconds[plain].append(result.decode_seconds)
            samples.append(Sample("plain" if plain else "hopeless", number, "", result))
            drafted += result.num_drafted
            assert perf_counter() - start >= result.decode_seconds
        rows.append({"prompt": number, "plain": seconds[True], "hopeless": seconds[False], "drafted": drafted})
    plain_total = sum(statistics.mean(r["plain"]) for r in rows)
    hopeless_total = sum(statistics.mean(r["hopeless"]) for r in rows)
    document = {
        "environment": environment(),
        "command": command(),
        "precision": engine.runner.info.precision,
        "num_prompts": len(rows),
        "tokens_each": options.max_tokens,
        "plain_seconds": plain_total,
        "hopeless_seconds": hopeless_total,
        "ratio": hopeless_total / plain_total,
        "accounted_ratio": accounted_ratio(samples),
        "median_ratio": statistics.median(statistics.mean(r["hopeless"]) / statistics.mean(r["plain"]) for r in rows),
        "drafted": sum(r["drafted"] for r in rows),
        "results": rows,
    }
    write_json(options.json, document)
    total, middle = document["ratio"], document["median_ratio"]
    even = document["accounted_ratio"]
    print(f"hopeless / plain = {total:.4f} (accounted {even:.4f}, median of prompts {middle:.4f}), {document['drafted']} drafted")


if __name__ == "__main__":
    main()

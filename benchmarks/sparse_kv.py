"""What drafting over a part of the cache brings in a long context: plain decoding against `sparse_kv`, forced and under the pacer.

    python benchmarks/sparse_kv.py --tokens 6000 --json benchmarks/results/sparse-kv.json

The prompt is this repository's own documentation, cut to length. A run's drafting time is that of its rounds, the choice of rows
included; reading the prompt is not timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import track

from paceline.assembly import build_engine, load_target
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.engine import Engine
from paceline.records import GenerationResult
from paceline.study.environment import command, environment
from paceline.study.report import write_json

DOCS = Path(__file__).resolve().parents[1] / "docs"
METHODS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("ends, 4 tokens", "fixed", {"num_draft": 4}, {"choose": "ends"}),
    ("attended, 4 tokens", "fixed", {"num_draft": 4}, {"choose": "attended"}),
    ("attended, SnapKV alone, 4 tokens", "fixed", {"num_draft": 4}, {"choose": "attended", "recent": 0.0}),
    ("ends, pacer", "pacer", {}, {"choose": "ends"}),
)
"""Name, controller, its options, the drafter's options."""


def row_of(name: str, result: GenerationResult, plain: float) -> dict[str, Any]:
    """A flat row: speeds, and what a round and a drafted token cost in milliseconds. plain: tokens a second."""
    speed = len(result.token_ids) / result.decode_seconds
    drafted = sum(step.num_drafted for step in result.steps)
    draft = sum(step.draft_seconds for step in result.steps if step.num_drafted)
    return {
        "method": name,
        "context": result.num_prompt_tokens,
        "tokens_per_second": speed,
        "speedup_vs_plain": speed / plain,
        "rounds": len(result.steps),
        "drafting_rounds": sum(step.num_drafted > 0 for step in result.steps),
        "drafted": drafted,
        "acceptance_rate": result.num_accepted / drafted if drafted else None,
        "draft_ms_per_token": 1e3 * draft / drafted if drafted else None,
        "pass_ms": 1e3 * median(step.verify_seconds for step in result.steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    target = load_target("default", RunnerConfig())
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    prompt = target.source.tokenizer.encode(text)[: options.tokens]
    params = SamplingParams(max_tokens=options.max_tokens, ignore_eos=True)
    engines = [
        build_engine(
            Engine,
            target,
            SpeculationConfig(draft="sparse_kv", controller=controller, controller_options=controls, drafter_options=settings),
        )
        for _, controller, controls, settings in METHODS
    ]
    runs = [("plain", engines[0], True), *((name, engine, False) for (name, *_), engine in zip(METHODS, engines, strict=True))]
    runs.append(("plain, again", engines[0], True))  # the machine's own drift
    answers = {name: engine.generate(prompt, params, plain=plain) for name, engine, plain in track(runs, "answers")}
    both = [answers["plain"], answers["plain, again"]]
    speed = sum(len(a.token_ids) for a in both) / sum(a.decode_seconds for a in both)
    rows = [row_of(name, answer, speed) | {"same": answer.token_ids == both[0].token_ids} for name, answer in answers.items()]
    write_json(options.json, {"environment": environment(), "command": command(), "results": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()

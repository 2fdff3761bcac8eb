"""What does a precision cost in quality? Perplexity of reference answers under each, against fp32.

    python benchmarks/precision.py --prompts SPEC_BENCH.jsonl --json OUT.json

Needs rows with `turns` and `reference` (Spec-Bench). The target reads the prompt in its chat template and then the reference.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from paceline.execution.base import Segment, prefill
from paceline.execution.native.runner import NativeRunner
from paceline.models.resolve import open_model
from paceline.study.environment import command, environment
from paceline.study.prompts import encode_prompt
from paceline.study.report import write_json

PRECISIONS = ("fp32", "bf16", "int8", "int4")


def pairs(path: Path, per_category: int) -> list[tuple[str, str]]:
    """(prompt, reference) of the first rows of each category that have one."""
    taken: dict[str, int] = {}
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        references = row.get("reference") or [""]
        reference = references[0] if isinstance(references, list) else str(references)
        if reference and taken.setdefault(row["category"], 0) < per_category:
            taken[row["category"]] += 1
            found.append((str(row["turns"][0]), str(reference)))
    return found


def negative_log_likelihood(runner: NativeRunner, prompt: list[int], answer: list[int]) -> tuple[float, torch.Tensor]:
    """Summed nats of the answer, and the most probable token at each of its places."""
    sequence = runner.open()
    prefill(runner, sequence, prompt[:-1])
    logits = runner.forward([Segment(sequence, [prompt[-1], *answer[:-1]])]).logits
    logprobs = torch.log_softmax(logits.double(), -1)
    runner.close(sequence)
    return -float(logprobs.gather(1, torch.tensor(answer)[:, None]).sum()), logits.argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=10, help="rows of each category")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a reference that count")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    source = open_model("default")
    texts = pairs(options.prompts, options.limit)
    tokenizer = source.tokenizer
    ids = [
        (encode_prompt(tokenizer, prompt), tokenizer.encode(reference, add_special=False)[: options.longest])
        for prompt, reference in texts
    ]

    results: list[dict[str, Any]] = []
    reference_choices: list[torch.Tensor] = []
    for precision in PRECISIONS:
        runner = NativeRunner(source, precision)
        nats, count, agree = 0.0, 0, 0
        for i, (prompt, answer) in enumerate(track(ids, precision)):
            loss, choices = negative_log_likelihood(runner, prompt, answer)
            nats, count = nats + loss, count + len(answer)
            if precision == "fp32":
                reference_choices.append(choices)
            agree += int((choices == reference_choices[i]).sum())
        runner.shutdown()
        perplexity = math.exp(nats / count)
        base = results[0]["perplexity"] if results else perplexity
        results.append(
            {
                "precision": precision,
                "perplexity": perplexity,
                "relative_to_fp32": perplexity / base,
                "same_most_probable_token": agree / count,
                "num_tokens": count,
                "num_prompts": len(ids),
            }
        )
        print(
            f"{precision}: perplexity {perplexity:.4f} ({100 * (perplexity / base - 1):+.2f} %), same top token {agree / count:.4f}"
        )
    write_json(options.json, {"environment": environment(), "command": command(), "results": results})


if __name__ == "__main__":
    main()

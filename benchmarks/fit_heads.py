"""Fit the heads of `specdecpp` and `disco` on recorded rounds and judge them on requests held out.

    OPTIONS="--prompts FILE.jsonl --limit 5 --max-tokens 64 --max-draft 8 --survey"
    paceline trace q0.jsonl $OPTIONS --precision fp32 --draft quantized_self
    paceline trace q1.jsonl $OPTIONS --precision fp32 --draft quantized_self --temperature 1
    paceline trace l0.jsonl $OPTIONS --draft layer_skip --drafter-option "skip=[10,20]"
    paceline trace l1.jsonl $OPTIONS --draft layer_skip --drafter-option "skip=[10,20]" --temperature 1
    paceline trace h0.jsonl $OPTIONS --draft layer_skip
    paceline trace h1.jsonl $OPTIONS --draft layer_skip --temperature 1
    python benchmarks/fit_heads.py [qlh][01].jsonl --out src/paceline/control/fitted --json OUT.json

There is a head for each kind of drafter in the traces, and one over all of them, each kind with the same weight, for drafters that
were not recorded. Every fourth request of a trace is held out. A head has to beat always predicting the mean acceptance.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from paceline.control.heads import ANY, HeadSet
from paceline.study.environment import command, environment
from paceline.study.heads import fit_head, hold_out, judge, training_rows
from paceline.study.report import write_json
from paceline.study.trace import Round, read_trace

INPUTS = {
    "specdecpp": ("max_logit", "entropy"),
    "disco": ("max_prob", "second_prob", "entropy", "position", "recent"),
}
_IDS_A_TRACE = 1_000_000
"""Requests of different traces have different ids."""


def by_kind(paths: Sequence[Path]) -> dict[str, tuple[list[Round], list[Round]]]:
    """Rounds to fit on and rounds held out, by kind of drafter."""
    kinds: dict[str, tuple[list[Round], list[Round]]] = {}
    for number, path in enumerate(paths):
        for side, rounds in enumerate(hold_out(read_trace(path).rounds)):
            for finished in rounds:
                kind = (finished.record.drafter or "").partition(":")[0]
                request_id = number * _IDS_A_TRACE + finished.record.request_id
                own = replace(finished, record=replace(finished.record, request_id=request_id))
                if kind:
                    kinds.setdefault(kind, ([], []))[side].append(own)
    return kinds


def balanced(kinds: dict[str, tuple[list[Round], list[Round]]], side: int) -> list[Round]:
    """Rounds of all kinds, those of rarer kinds repeated."""
    most = max(len(pair[side]) for pair in kinds.values())
    return [r for pair in kinds.values() for r in pair[side] * max(1, most // max(len(pair[side]), 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder for specdecpp.json and disco.json")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kinds = by_kind(options.traces)
    kinds[ANY] = (balanced(kinds, 0), balanced(kinds, 1))
    results: list[dict[str, Any]] = []
    for controller, inputs in INPUTS.items():
        heads = {}
        for kind, (fit, held) in kinds.items():
            _, labels = training_rows(fit, inputs)
            repeats = ", those of rarer drafters repeated" if kind == ANY else ""
            note = f"default model; Spec-Bench dev prompts at temperatures 0 and 1; {len(labels)} tokens{repeats}"
            heads[kind] = head = fit_head(fit, inputs, note=note)
            quality = judge(head, held, float(labels.mean()))
            results.append({"controller": controller, "drafter": kind, "fitted_on": len(labels)} | asdict(quality))
            print(
                f"{controller:>10} {kind:>16}: {quality.num_tokens} tokens, accepted {quality.accepted:.3f}, predicted "
                f"{quality.predicted:.3f}, log loss {quality.log_loss:.4f} (constant {quality.constant_log_loss:.4f}), "
                f"AUC {quality.auc:.3f}"
            )
        if options.out is not None:
            write_json(options.out / f"{controller}.json", HeadSet(heads).to_json())
    if options.json is not None:
        write_json(options.json, {"environment": environment(), "command": command(), "results": results})


if __name__ == "__main__":
    main()

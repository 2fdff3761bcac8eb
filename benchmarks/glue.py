"""What do the lean torch path and the Hugging Face definition cost outside their linear layers? ("glue": norms, rotary embedding,
cache, attention, Python)

    python benchmarks/glue.py --json OUT.json

For each backend: milliseconds of a pass, of the linear layers inside it, and the difference. The native backend is one call with
no layers to watch, so it shows whole passes only. Medians of repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from paceline.config import RunnerConfig
from paceline.execution.base import Runner, Segment, prefill
from paceline.execution.factory import create_runner
from paceline.execution.hf import HFRunner
from paceline.execution.lean import LeanRunner
from paceline.models.resolve import open_model
from paceline.study.environment import command, environment
from paceline.study.report import write_json

BACKENDS = (("native", "int4"), ("native", "bf16"), ("lean", "bf16"), ("lean", "int8"), ("lean", "int4"), ("hf", "bf16"))


class Stopwatch:
    """Adds up the milliseconds that linear layers take inside a pass."""

    def __init__(self, runner: Runner) -> None:
        self.total = 0.0
        self.watches = True
        if isinstance(runner, LeanRunner):
            for layer in runner._layers:
                for name in ("qkv", "o", "gate_up", "down"):
                    setattr(layer, name, self._timed(getattr(layer, name)))
            setattr(runner, "_head", self._timed(runner._head))  # noqa: B010
        elif isinstance(runner, HFRunner):
            for module in runner._model.modules():
                if isinstance(module, torch.nn.Linear):
                    setattr(module, "forward", self._timed(module.forward))  # noqa: B010
        else:
            self.watches = False

    def _timed(self, layer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            y = layer(x)
            self.total += 1e3 * (time.perf_counter() - started)
            return y

        return run


def measure(runner: Runner, watch: Stopwatch, context: int, rows: int, repeats: int) -> dict[str, float | None]:
    sequence = runner.open()
    prefill(runner, sequence, [(7 * i + 3) % 1000 for i in range(context)])
    segment = [Segment(sequence, list(range(5, 5 + rows)))]
    passes, inside = [], []
    for _ in range(repeats):
        watch.total = 0.0
        started = time.perf_counter()
        runner.forward(segment)
        passes.append(1e3 * (time.perf_counter() - started))
        inside.append(watch.total)
    runner.close(sequence)
    whole, linears = statistics.median(passes), statistics.median(inside) if watch.watches else None
    return {
        "pass_ms": round(whole, 3),
        "linears_ms": None if linears is None else round(linears, 3),
        "glue_ms": None if linears is None else round(whole - linears, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    source = open_model(options.model)
    results = []
    table = Table("backend", "precision", "rows", "pass ms", "linears ms", "glue ms")
    for backend, precision in BACKENDS:
        runner = create_runner(source, RunnerConfig(backend=backend, precision=precision))
        watch = Stopwatch(runner)
        for rows in (1, 4, 8):
            found = measure(runner, watch, options.context, rows, options.repeats)
            results.append({"backend": backend, "precision": precision, "rows": rows, "context": options.context} | found)
            table.add_row(backend, precision, str(rows), *(f"{x:.2f}" if x is not None else "-" for x in found.values()))
    write_json(options.json, {"environment": environment(), "command": command(), "results": results})
    Console().print(table)


if __name__ == "__main__":
    main()

"""Result documents: writing them whole, reading them back, comparing two, drawing one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paceline.config import SamplingParams
from paceline.errors import OptionError, PacelineError
from paceline.study.bench import OVERALL, PLAIN, Sample, divergences, summarise
from paceline.study.environment import command, environment
from paceline.study.prompts import BenchPrompt


def bench_document(
    samples: Sequence[Sample],
    prompts: Sequence[BenchPrompt],
    params: SamplingParams,
    *,
    settings: dict[str, Any],
    engine: dict[str, Any],
    complete: bool,
) -> dict[str, Any]:
    """`{environment, command, complete, settings, results, prompts, divergences}`: all that a figure needs to be repeated."""
    per_prompt = [
        {
            "method": sample.method,
            "prompt": prompts[sample.prompt].name,
            "category": sample.category,
            "num_tokens": sample.result.num_tokens,
            "num_prompt_tokens": sample.result.num_prompt_tokens,
            "decode_seconds": sample.result.decode_seconds,
            "seconds": sample.result.seconds,
            "finish_reason": sample.result.finish_reason,
        }
        for sample in samples
    ]
    return {
        "environment": environment() | engine,
        "command": command(),
        "complete": complete,
        "settings": settings | {"sampling": asdict(params)},
        "results": [asdict(row) for row in summarise(samples, params)],
        "prompts": per_prompt,
        "divergences": divergences(samples),
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document whole or not at all. Raises PacelineError naming the file when that fails."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise PacelineError(f"result file {str(path)!r}: {error.strerror}; choose a place that can be written") from error


def check_writable(path: Path) -> None:
    """Fail before a long run, not after it: raises PacelineError when `path` cannot be written."""
    folder = path.parent
    if path.is_dir():
        raise OptionError(f"result file {str(path)!r}: is a folder; name a file in it")
    if folder.exists() and not os.access(folder, os.W_OK):
        raise PacelineError(f"result file {str(path)!r}: its folder cannot be written; choose another place")


def read_results(path: Path) -> dict[str, Any]:
    """A result document. Raises OptionError when the file is not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"result file {str(path)!r}: {error.strerror}; give a file that `paceline bench --json` wrote") from None
    except ValueError:
        document = None
    rows = document.get("results") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise OptionError(f"result file {str(path)!r}: holds no `results`; give a file that `paceline bench --json` wrote")
    return document


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and {"method", "category", "tokens_per_second"} <= row.keys()


@dataclass(frozen=True, slots=True)
class Change:
    """One method and category in two result files. A speed is None where a file lacks the row."""

    method: str
    category: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if self.before and self.after is not None else None


def compare_results(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Tokens per second of every row of either document, in the order of the first."""
    old, new = _speeds(before), _speeds(after)
    return [Change(*key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]


def _speeds(document: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["method"], row["category"]): float(row["tokens_per_second"]) for row in document["results"]}


def plot_results(document: dict[str, Any], path: Path) -> None:
    """Bars of the speed-up against plain, a group for each category. Raises PacelineError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PacelineError("--plot: matplotlib is not installed; pip install 'paceline[study]'") from None
    rows = {(row["method"], row["category"]): row.get("speedup_vs_plain") or 0.0 for row in document["results"]}
    methods = [m for m in dict.fromkeys(method for method, _ in rows) if m != PLAIN]
    categories = list(dict.fromkeys(category for _, category in rows))
    if not methods or not any(rows.values()):
        raise OptionError("--plot: nothing to draw; bench `plain` and at least one other method")
    figure = Figure(figsize=(max(6.0, 1.1 * len(categories)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        places = [i + (number - (len(methods) - 1) / 2) * width for i in range(len(categories))]
        axes.bar(places, [rows.get((method, category), 0.0) for category in categories], width, label=method)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(categories)), ["all prompts" if c == OVERALL else c for c in categories], rotation=30, ha="right")
    axes.set_ylabel("tokens per second, plain = 1")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise PacelineError(f"--plot {str(path)!r}: {error.strerror}; choose a place that can be written") from error
    except ValueError as error:
        raise OptionError(f"--plot {str(path)!r}: {error}") from None

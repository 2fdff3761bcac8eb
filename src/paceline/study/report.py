"""Result documents: writing them whole and small, reading them back, comparing two, drawing one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from paceline.config import SamplingParams
from paceline.errors import OptionError, PacelineError
from paceline.study.accounting import accounted
from paceline.study.bench import OVERALL, PLAIN, Sample, divergences, summarise
from paceline.study.charts import Panel, heat_chart, new_figure, save
from paceline.study.environment import command, environment
from paceline.study.prompts import BenchPrompt

_WIDTH = 132
"""Characters up to which nested values stand on one line."""
_DIGITS = 6
"""Of a figure in a result document: machines are noisier."""
_MOST_BARS = 4
"""Methods that bars can show side by side."""


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
    samples = accounted(samples)
    return {
        "environment": environment() | engine,
        "command": command(),
        "complete": complete,
        "settings": settings | {"sampling": asdict(params)},
        "results": [asdict(row) for row in summarise(samples, params)],
        "prompts": [sample_row(sample) | {"prompt": prompts[sample.prompt].name} for sample in samples],
        "divergences": divergences(samples),
    }


def sample_row(sample: Sample) -> dict[str, Any]:
    """One timed answer as a flat row."""
    done = sample.result
    return {
        "method": sample.method,
        "prompt": sample.prompt,
        "category": sample.category,
        "num_tokens": done.num_tokens,
        "num_prompt_tokens": done.num_prompt_tokens,
        "decode_seconds": done.decode_seconds,
        "accounted_seconds": sample.accounted_seconds,
        "seconds": done.seconds,
        "rounds": done.num_rounds,
        "drafted": done.num_drafted,
        "accepted": done.num_accepted,
        "finish_reason": done.finish_reason,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"columns": [...], "rows": [[...], ...]}`: names once, a row a line. All rows have the keys of the first."""
    columns = list(rows[0]) if rows else []
    return {"columns": columns, "rows": [[row[column] for column in columns] for row in rows]}


def table_rows(value: Any) -> list[dict[str, Any]]:
    """The rows of a `table` again, or those of a plain list of rows."""
    if isinstance(value, dict):
        return [dict(zip(value["columns"], row, strict=True)) for row in value["rows"]]
    return list(value)


def as_text(value: Any, indent: int = 0) -> str:
    """JSON in which whatever is short, and every row of plain values, stands on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list, tuple)) or len(line) + indent <= _WIDTH:
        return line
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        if indent and not any(isinstance(item, dict) or _long(item) for item in value.values()):
            return line
        parts = [f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {as_text(item, indent + 1)}" for key, item in value.items()]
    else:
        if not any(isinstance(item, dict) or _long(item) for item in value):
            return line
        parts = [inner + as_text(item, indent + 1) for item in value]
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return opening + "\n" + ",\n".join(parts) + "\n" + " " * indent + closing


def _long(item: object) -> bool:
    """Whether a value in a row is more than a figure or a pair of figures."""
    return isinstance(item, (list, tuple)) and (len(item) > 2 or any(isinstance(part, (list, tuple, dict)) for part in item))


def rounded(value: Any) -> Any:
    """The same document with its floats to six digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document whole or not at all, a row of it a line. Raises PacelineError naming the file when that fails."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(as_text(document) + "\n", encoding="utf-8")
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


def speed_panel(title: str, rows: Sequence[Mapping[str, Any]], *, bold: str, best: Mapping[str, str] | None = None) -> Panel:
    """Speed against plain, methods by categories, by accounted time, the fastest first; the first column is by the wall clock.

    rows: of `BenchRow`. bold: the method that stands out. best: the method to be framed in each category.
    """
    cells = {(row["method"], row["category"]): row for row in rows}
    methods = sorted({method for method, _ in cells}, key=lambda method: -cells[method, OVERALL]["accounted_tokens_per_second"])
    categories = list(dict.fromkeys(category for _, category in cells))
    return Panel(
        f"{title}: tokens a second by accounted time, plain = 1",
        methods,
        ["all by wall clock", *("all prompts" if c == OVERALL else c for c in categories)],
        [[cells[m, OVERALL]["speedup_vs_plain"], *(cells[m, c]["accounted_vs_plain"] for c in categories)] for m in methods],
        framed={(methods.index(best[c]), j) for j, c in enumerate(categories, start=1)} if best else (),
        bold=[bold],
        breaks=[0, 1],
    )


class Recording:
    """A result document that is written while it grows."""

    def __init__(self, path: Path, document: Callable[[], dict[str, Any]], every: float = 120.0) -> None:
        """document: what there is by now; every: seconds between two writes."""
        check_writable(path)
        self._path = path
        self._document = document
        self._every = every
        self._written = monotonic()

    def update(self) -> None:
        """Write an unfinished document if it is time to."""
        if monotonic() - self._written >= self._every:
            self.write(complete=False)

    def write(self, *, complete: bool) -> dict[str, Any]:
        """Write now; returns what was written."""
        document: dict[str, Any] = rounded(self._document() | {"complete": complete})
        write_json(self._path, document)
        self._written = monotonic()
        return document


def plot_results(document: dict[str, Any], path: Path) -> None:
    """Speed-up against plain, by category: bars for a few methods, else a heat chart, the fastest method first.

    Raises PacelineError without matplotlib or where `path` cannot be written, OptionError when there is nothing to draw.
    """
    speed = {(row["method"], row["category"]): row.get("speedup_vs_plain") for row in document["results"]}
    methods = [m for m in dict.fromkeys(method for method, _ in speed) if m != PLAIN]
    categories = list(dict.fromkeys(category for _, category in speed))
    if not methods or not any(speed.values()):
        raise OptionError("--plot: nothing to draw; bench `plain` and at least one other method")
    names = ["all prompts" if c == OVERALL else c for c in categories]
    if len(methods) > _MOST_BARS:
        methods.sort(key=lambda method: -(speed.get((method, OVERALL)) or 0.0))
        values = [[speed.get((method, category)) for category in categories] for method in methods]
        heat_chart([Panel(str(document.get("title", "tokens a second, plain = 1")), methods, names, values, breaks=[0])], path)
        return
    figure = new_figure(max(6.0, 0.8 * len(categories)), 3.6)
    axes = figure.add_subplot()
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        places = [i + (number - (len(methods) - 1) / 2) * width for i in range(len(categories))]
        axes.bar(places, [speed.get((method, category)) or 0.0 for category in categories], width, label=method)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(categories)), names, rotation=30, ha="right")
    axes.set_ylabel("tokens per second, plain = 1")
    figure.legend(loc="outside upper center", ncols=_MOST_BARS, fontsize="small")
    save(figure, path)

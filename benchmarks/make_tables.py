"""Write the tables of recorded results between the markers of README.md, docs/benchmarks.md and docs/drafting.md.

    python benchmarks/make_tables.py            # write
    python benchmarks/make_tables.py --check    # fail when a page is out of date

Every number comes from benchmarks/results/*.json; nothing is typed by hand. A new file appears by itself: results of `paceline
bench` and of the scripts in `SECTIONS` in a form of their own, any other list of flat results as it is. Unfinished runs are left
out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DRAFTERS = ("<!-- drafters:begin -->", "<!-- drafters:end -->")
NOTHING = "No results are recorded yet."
MOST_FLAT = 40
"""Rows up to which a list of flat results is shown as it is."""

Row = Mapping[str, Any]
Document = dict[str, Any]
Columns = Sequence[tuple[str, str, str]]
"""(title, key, format) of each column of a table."""

NAME = "`{}`"
RATIO = "{:.2f}x"
SPEEDS: Columns = (("tokens/s", "tokens_per_second", "{:.1f}"), ("against plain", "speedup_vs_plain", RATIO))
BENCH: Columns = (
    ("category", "category", "{}"),
    ("method", "method", NAME),
    *SPEEDS,
    ("acceptance", "acceptance_rate", "{:.0%}"),
    ("tokens a round", "block_efficiency", "{:.2f}"),
    ("same ids", "same", "{}"),
)
COSTS: Columns = (
    ("drafter", "method", NAME),
    ("tokens a round", "block_efficiency", "{:.2f}"),
    ("draft ms a token", "draft_ms_per_token", "{:.3f}"),
    ("draft ms a round", "draft_ms_per_round", "{:.3f}"),
    *SPEEDS,
    ("same ids", "same", "{}"),
    ("MB", "megabytes", "{:.1f}"),
)
CONTROLLERS: Columns = (
    ("controller", "method", NAME),
    *SPEEDS,
    ("worst category", "worst_plain", RATIO),
    ("against best fixed length", "speed_vs_best_fixed", RATIO),
    ("worst category", "worst_fixed", RATIO),
    ("own time", "own", "{:.1%}"),
)
IDENTITY: Columns = (
    ("precision", "precision", "{}"),
    ("drafter", "draft", NAME),
    ("draft lengths", "lengths", "{}"),
    ("answers", "num_prompts", "{}"),
    ("same ids", "num_identical", "{}"),
)
HOPELESS: Columns = (
    ("prompts", "num_prompts", "{}"),
    ("tokens each", "tokens_each", "{}"),
    ("plain s", "plain_seconds", "{:.2f}"),
    ("with random drafts s", "hopeless_seconds", "{:.2f}"),
    ("time against plain", "ratio", "{:.3f}x"),
    ("median of prompts", "median_ratio", "{:.3f}x"),
    ("drafted tokens", "drafted", "{}"),
)
FOOTPRINT: Columns = (
    ("start", "start", "{}"),
    ("loaded after s", "load_seconds", "{:.2f}"),
    ("first token after s", "first_token_seconds", "{:.2f}"),
    ("peak memory GB", "peak_memory_gb", "{:.2f}"),
    ("weights MB", "weight_mb", "{:.1f}"),
    ("pacer us a round", "plan_microseconds", "{:.0f}"),
    ("pacer, share of a round", "pacer_share", "{:.2%}"),
)
REPLAY: Columns = (
    ("controller", "controller", NAME),
    ("against plain (geometric mean)", "mean", RATIO),
    ("worst regime", "worst", RATIO),
    ("time over the best fixed length", "regret", "{:+.1%}"),
    ("over the best choice of every round", "hindsight", "{:+.1%}"),
    ("own us a round", "own", "{:.1f}"),
)


def grid(columns: Columns, rows: Iterable[Row]) -> str:
    """A table; what a row lacks is left empty."""
    lines = [f"| {' | '.join(title for title, _, _ in columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = ["" if row.get(key) is None else form.format(row[key]).replace("|", "\\|") for _, key, form in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(row: Row) -> Row:
    """A bench row with the cells that are made of two figures."""
    same = None if row["num_identical"] is None else f"{row['num_identical']}/{row['num_prompts']}"
    return {**row, "same": same, "megabytes": row.get("memory_bytes", 0) / 1e6}


def where(document: Document) -> str:
    """The machine, and what ran on it if the file says so."""
    environment = document["environment"]
    machine, runner = environment["machine"], environment.get("runner")
    on = f"{machine['cpu']}, {machine['cores']} cores" if runner is None or runner["device"] == "cpu" else runner["device"]
    return on if runner is None else f"{environment['model']}, {runner['precision']} {runner['backend']}, {on}"


def heading(name: str, document: Document, sampling: Row, rows: Sequence[Row]) -> str:
    """What a table of answers is about."""
    how = "greedy" if sampling["temperature"] == 0 else f"temperature {sampling['temperature']:g}"
    prompts = max(row["num_prompts"] for row in rows)
    return f"**{name}**: {where(document)}; {how}, at most {sampling['max_tokens']} tokens, {prompts} prompts"


def command(document: Document) -> str:
    return f"```\n{document['command']}\n```"


def recorded() -> dict[str, Document]:
    """All finished results by file name."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    return {name: d for name, d in found.items() if isinstance(d, dict) and d.get("complete", True)}


# ---------- one kind of result each ----------


def bench(name: str, document: Document, *, categories: bool = True) -> list[str]:
    """`paceline bench`; without `categories`, only what holds over all prompts, and no command."""
    rows = [shown(row) for row in document["results"] if categories or row["category"] == "all"]
    title = heading(name, document, document["settings"]["sampling"], rows)
    return [title, *([command(document)] if categories else []), grid(BENCH, rows)]


def drafters(name: str, document: Document) -> list[str]:
    """`benchmarks/drafters.py`: each drafter over all prompts, and its speed by category, for each temperature."""
    parts = []
    for run in document["runs"]:
        rows = [shown(row) for row in run["results"]]
        parts.append(heading(name, document, run["sampling"], rows))
        parts += [grid(COSTS, [row for row in rows if row["category"] == "all"]), by_category(rows)]
    parts.insert(1, command(document))
    return [*parts, *(f"Not measured: `{left}` ({reason})" for left, reason in document["left_out"].items())]


def by_category(rows: Sequence[Row]) -> str:
    """Speed against plain decoding, a line for each method and a column for each category."""
    categories = dict.fromkeys(row["category"] for row in rows if row["category"] != "all")
    speeds: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["method"] != "plain":
            speeds.setdefault(row["method"], {"method": row["method"]})[row["category"]] = row["speedup_vs_plain"]
    return grid([("against plain", "method", NAME), *((c, c, "{:.2f}") for c in categories)], speeds.values())


def controllers(name: str, document: Document) -> list[str]:
    """`benchmarks/controllers.py`: every controller over all prompts and in its worst category, the fastest first."""
    parts = []
    for run in document["runs"]:
        rows = []
        for row in run["results"]:
            if row["category"] == "all":
                own = [r for r in run["results"] if r["method"] == row["method"] and r["category"] != "all"]
                worst = {
                    "worst_plain": min((r["speedup_vs_plain"] for r in own), default=None),
                    "worst_fixed": min((r["speed_vs_best_fixed"] for r in own), default=None),
                }
                rows.append({**row, **worst, "own": run["controller_share_of_round"].get(row["method"])})
        sampling = {"temperature": run["temperature"], "max_tokens": document["max_tokens"]}
        title = f"{heading(name, document, sampling, rows)}; drafts of `{document['draft']}`"
        parts += [title, grid(CONTROLLERS, sorted(rows, key=lambda row: -row["tokens_per_second"]))]
    parts.insert(1, command(document))
    return parts


def identity(name: str, document: Document) -> list[str]:
    """`benchmarks/identity.py`: answers that equal plain decoding's, a line for each precision and drafter."""
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for (precision, draft), group in groupby(document["results"], lambda row: (row["precision"], row["draft"])):
        own = list(group)
        left_out |= {f"{draft} in {precision}": row["left_out"] for row in own if "left_out" in row}
        lengths = ", ".join(str(row["num_draft"]) if "num_draft" in row else row["controller"] for row in own)
        counts = {key: sum(row[key] for row in own) for key in ("num_prompts", "num_identical")}
        if counts["num_prompts"]:
            rows.append({"precision": precision, "draft": draft, "lengths": lengths, **counts})
    same = f"{document['identical']} of {document['compared']} greedy answers have the ids of plain decoding"
    margins = [difference["top2_margin"] for difference in document["differences"]]
    if margins:
        same += f"; where the others leave it, plain decoding's two best logits are at most {max(margins):.2g} apart"
    parts = [f"**{name}**: {where(document)}; {same}", command(document), grid(IDENTITY, rows)]
    return [*parts, *(f"Not measured: `{left}` ({reason})" for left, reason in left_out.items())]


def hopeless(name: str, document: Document) -> list[str]:
    """`benchmarks/hopeless.py`: what drafts cost that are never right."""
    return [f"**{name}**: {document['precision']}, {where(document)}", command(document), grid(HOPELESS, [document])]


def footprint(name: str, document: Document) -> list[str]:
    """`benchmarks/footprint.py`: what a newcomer pays."""
    rows = [{"start": "first, empty cache", **document["cold"]}] if "cold" in document else []
    rows.append({"start": f"later ones (median of {len(document['runs'])})", **document["median"]})
    return [
        f"**{name}**: {where(document)}, {rows[-1]['precision']} {rows[-1]['backend']}",
        command(document),
        grid(FOOTPRINT, rows),
    ]


def replay(name: str, document: Document) -> list[str]:
    """`paceline replay` over synthetic regimes: a line for each controller, the fastest first."""
    by_controller: dict[str, list[Row]] = {}
    for row in document["results"]:
        by_controller.setdefault(row["controller"], []).append(row)
    rows = [
        {
            "controller": controller,
            "mean": geometric_mean(row["speedup_vs_plain"] for row in own),
            "worst": min(row["speedup_vs_plain"] for row in own),
            "regret": fmean(row["regret_vs_best_fixed"] for row in own),
            "hindsight": fmean(row["regret_vs_best_k_in_hindsight"] for row in own),
            "own": fmean(row["controller_us_per_round"] for row in own),
        }
        for controller, own in by_controller.items()
    ]
    regimes = len({row["regime"] for row in document["results"]})
    title = f"**{name}**: {regimes} synthetic regimes ([control](control.md#comparing-controllers)), no model"
    return [title, command(document), grid(REPLAY, sorted(rows, key=lambda row: -row["mean"]))]


def flat(name: str, document: Document) -> list[str]:
    """Any other list of results whose values are plain: as it is."""
    rows = document["results"]
    keys = dict.fromkeys(key for row in rows for key in row)
    digits = {key: "{:.4g}" if any(isinstance(row.get(key), float) for row in rows) else "{}" for key in keys}
    columns = [(key.replace("_", " "), key, digits[key]) for key in keys]
    return [f"**{name}**: {where(document)}", command(document), grid(columns, rows)]


# ---------- pages ----------

SECTIONS: dict[str, Callable[[str, Document], list[str]]] = {
    "controllers": controllers,
    "identity": identity,
    "hopeless": hopeless,
    "footprint": footprint,
    "replay": replay,
}
"""Results that are no bench results, by the first word of their file names."""


def is_bench(document: Document) -> bool:
    return "sampling" in document.get("settings", {})


def is_flat(document: Document) -> bool:
    rows = document.get("results")
    return (
        isinstance(rows, list)
        and 0 < len(rows) <= MOST_FLAT
        and not any(isinstance(v, (list, dict)) for r in rows for v in r.values())
    )


def headlines(found: dict[str, Document]) -> str:
    """For the README: bench results named `headline*`, over all prompts."""
    chosen = {name: d for name, d in found.items() if name.startswith("headline") and is_bench(d)}
    return "\n\n".join(part for name, d in chosen.items() for part in bench(name, d, categories=False)) or NOTHING


def all_results(found: dict[str, Document]) -> str:
    """For the page of benchmarks: bench results, then all others with their commands."""
    parts = [part for name, document in found.items() if is_bench(document) for part in bench(name, document)]
    for name, document in found.items():
        make = SECTIONS.get(name.split("-")[0])
        if make is not None:
            parts += make(name, document)
        elif not is_bench(document) and is_flat(document):
            parts += flat(name, document)
    return "\n\n".join(parts) or NOTHING


def all_drafters(found: dict[str, Document]) -> str:
    """For the page of drafters."""
    return "\n\n".join(drafters("drafters", found["drafters"])) if "drafters" in found else NOTHING


def filled(text: str, content: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """The page with the part between its markers replaced."""
    begin, end = markers
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", flags=re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"a page lacks the markers {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def main() -> int:
    found = recorded()
    parts = (
        (ROOT / "README.md", (BEGIN, END), headlines(found)),
        (ROOT / "docs" / "benchmarks.md", (BEGIN, END), all_results(found)),
        (ROOT / "docs" / "drafting.md", DRAFTERS, all_drafters(found)),
    )
    stale = []
    for page, markers, content in parts:
        before = page.read_text(encoding="utf-8")
        after = filled(before, content, markers)
        if before != after:
            stale.append(page.name)
            if "--check" not in sys.argv[1:]:
                page.write_text(after, encoding="utf-8")
    if "--check" in sys.argv[1:] and stale:
        print(f"out of date: {', '.join(stale)}; run python benchmarks/make_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

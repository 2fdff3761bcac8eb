"""Write the tables of recorded results between the markers of README.md, docs/benchmarks.md and docs/drafting.md.

    python benchmarks/make_tables.py            # write
    python benchmarks/make_tables.py --check    # fail when a page is out of date

Every number comes from benchmarks/results/*.json; nothing is typed by hand. A new file appears by itself: results of `paceline
bench` and of the scripts in `SECTIONS` in a form of their own, any other list of flat results as it is. What few readers need
(every category, every controller) is folded away. Unfinished runs are left out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from paceline.study.report import table_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DRAFTERS = ("<!-- drafters:begin -->", "<!-- drafters:end -->")
NOTHING = "No results are recorded yet."
MOST_FLAT = 40
"""Rows up to which a list of flat results is shown as it is."""
LEADERS = 5
"""Lines of a long table that are shown; the rest is folded away, but for the references."""

Row = Mapping[str, Any]
Document = dict[str, Any]
Columns = Sequence[tuple[str, str, str]]
"""(title, key, format) of each column of a table."""

NAME = "`{}`"
RATIO = "{:.2f}x"
SPEEDS: Columns = (("tokens/s", "tokens_per_second", "{:.1f}"), ("against plain", "speedup_vs_plain", RATIO))
BENCH: Columns = (
    ("method", "method", NAME),
    *SPEEDS,
    ("worst category", "worst", "{}"),
    ("accounted", "accounted_vs_plain", RATIO),
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
    ("worst category", "worst", "{}"),
    ("accounted", "accounted_vs_plain", RATIO),
    ("worst category", "worst_accounted", "{}"),
    ("same ids", "same", "{}"),
    ("MB", "megabytes", "{:.1f}"),
)
CONTROLLERS: Columns = (
    ("controller", "method", NAME),
    *SPEEDS,
    ("against best fixed length, worst category", "worst_fixed", "{}"),
    ("accounted against plain", "accounted_vs_plain", RATIO),
    ("worst category", "worst_accounted", "{}"),
    ("accounted against best fixed length", "accounted_vs_best_fixed", RATIO),
    ("worst category", "worst_accounted_fixed", "{}"),
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
    ("pacer us a round", "pacer_microseconds", "{:.0f}"),
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
    """A table; what a row lacks is left empty, a column that no row has is left out."""
    rows = list(rows)
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    lines = [f"| {' | '.join(title for title, _, _ in columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = ["" if row.get(key) is None else form.format(row[key]).replace("|", "\\|") for _, key, form in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def leaders(columns: Columns, rows: Sequence[Row], key: str, kept: Container[str]) -> list[str]:
    """A long table whose rows stand in order: the first ones and the references that are `kept`, then the others, folded away."""
    few = [row for i, row in enumerate(rows) if i < LEADERS or row[key] in kept]
    others = [row for row in rows if row not in few]
    return [grid(columns, few), *([folded(f"the other {len(others)}", grid(columns, others))] if others else [])]


def first_fixed(rows: Sequence[Row], key: str) -> str:
    """The best fixed length of rows that stand in order."""
    return next((row[key] for row in rows if row[key].startswith("fixed_")), "")


WORST = {
    "worst": "speedup_vs_plain",
    "worst_fixed": "speed_vs_best_fixed",
    "worst_accounted": "accounted_vs_plain",
    "worst_accounted_fixed": "accounted_vs_best_fixed",
}
"""Cells that show the lowest figure of any category, and which."""


def overall(results: Any) -> list[Row]:
    """Bench rows over all prompts, with the cells that are made of several figures."""
    rows = table_rows(results)
    return [shown(row, rows) for row in rows if row["category"] == "all"]


def shown(row: Row, rows: Sequence[Row]) -> Row:
    same = None if row["num_identical"] is None else f"{row['num_identical']}/{row['num_prompts']}"
    own = [r for r in rows if r["method"] == row["method"] and r["category"] != "all"]
    worst = {cell: worst_of(own, key) for cell, key in WORST.items() if row["method"] != "plain" or "fixed" in cell}
    return {**row, **worst, "same": same, "megabytes": row.get("memory_bytes", 0) / 1e6}


def worst_of(rows: Sequence[Row], key: str) -> str | None:
    low = min((row for row in rows if row.get(key) is not None), key=lambda row: row[key], default=None)
    return None if low is None else f"{low[key]:.2f}x {low['category']}"


VECTORS = {"amx_tile": "AMX", "avx512_vnni": "AVX-512", "avx2": "AVX2"}
"""What a processor is best at, the best first: names alone do not tell."""


def where(document: Document) -> str:
    """The machine, and what ran on it if the file says so."""
    environment = document["environment"]
    machine, runner = environment["machine"], environment.get("runner")
    wide = next((name for flag, name in VECTORS.items() if flag in machine.get("instruction_sets", ())), None)
    cpu = machine["cpu"] if wide is None else f"{machine['cpu']} ({wide})"
    on = f"{cpu}, {machine['cores']} cores" if runner is None or runner["device"] == "cpu" else runner["device"]
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
    """`paceline bench`: what holds over all prompts; with `categories`, the command and the speeds by category, too."""
    rows = overall(document["results"])
    title = heading(name, document, document["settings"]["sampling"], rows)
    if not categories:
        return [title, grid(BENCH, rows)]
    return [title, command(document), grid(BENCH, rows), by_category(document["results"])]


def drafters(name: str, document: Document) -> list[str]:
    """`benchmarks/drafters.py`: each drafter over all prompts, and its speed by category, for each temperature."""
    parts = []
    for run in document["runs"]:
        rows = overall(run["results"])
        parts += [heading(name, document, run["sampling"], rows), grid(COSTS, rows), by_category(run["results"])]
    parts.insert(1, command(document))
    left_out: dict[str, list[str]] = {}
    for left, reason in document["left_out"].items():
        left_out.setdefault(reason.removeprefix(f"draft = {left!r}: "), []).append(f"`{left}`")
    return [*parts, *(f"Not measured: {', '.join(names)} ({reason})" for reason, names in left_out.items())]


def by_category(results: Any) -> str:
    """Speed against plain decoding, a line for each method and a column for each category, by each clock that the file has."""
    rows = [row for row in table_rows(results) if row["category"] != "all"]
    categories = dict.fromkeys(row["category"] for row in rows)
    tables = []
    for title, key in (("against plain", "speedup_vs_plain"), ("accounted", "accounted_vs_plain")):
        speeds: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["method"] != "plain" and row.get(key) is not None:
                speeds.setdefault(row["method"], {"method": row["method"]})[row["category"]] = row[key]
        if speeds:
            tables.append(grid([(title, "method", NAME), *((c, c, "{:.2f}") for c in categories)], speeds.values()))
    return folded("by category", "\n\n".join(tables))


def controllers(name: str, document: Document) -> list[str]:
    """`benchmarks/controllers.py`: controllers over all prompts and in their worst category, the fastest first."""
    parts = []
    for run in document["runs"]:
        rows = [{**row, "own": run["controller_share_of_round"].get(row["method"])} for row in overall(run["results"])]
        rows.sort(key=lambda row: -(row.get("accounted_tokens_per_second") or row["tokens_per_second"]))
        sampling = {"temperature": run["temperature"], "max_tokens": document["max_tokens"]}
        references = {"plain", "pacer", first_fixed(rows, "method")}
        parts.append(f"{heading(name, document, sampling, rows)}; drafts of `{document['draft']}`")
        parts += leaders(CONTROLLERS, rows, "method", references)
    parts.insert(1, command(document))
    return parts


def identity(name: str, document: Document) -> list[str]:
    """`benchmarks/identity.py`: answers that equal plain decoding's, a line for each precision and drafter."""
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in document["results"]:
        groups.setdefault((row["precision"], row["draft"]), []).append(row)
    for (precision, draft), own in groups.items():
        left_out |= {f"{draft} in {precision}": row["left_out"] for row in own if "left_out" in row}
        chosen = sorted(row["num_draft"] for row in own if "num_draft" in row)
        lengths = ", ".join([*(row["controller"] for row in own if "num_draft" not in row), *map(str, chosen)])
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
    rows.sort(key=lambda row: -row["mean"])
    references = {"plain", "pacer", first_fixed(rows, "controller")}
    return [title, command(document), *leaders(REPLAY, rows, "controller", references)]


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
    """For the page of drafters: one machine after another, the newest record first."""
    names = [name for name in sorted(found, reverse=True) if name.split("-")[0] == "drafters"]
    return "\n\n".join(part for name in names for part in drafters(name, found[name])) or NOTHING


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

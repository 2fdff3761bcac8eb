"""Write the tables of recorded results between the markers of README.md and docs/benchmarks.md.

    python benchmarks/make_tables.py            # write
    python benchmarks/make_tables.py --check    # fail when a page is out of date

Every number comes from benchmarks/results/*.json; nothing is typed by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DRAFTERS = ("<!-- drafters:begin -->", "<!-- drafters:end -->")
NOTHING = "No results are recorded yet."


def cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def method_cell(name: str) -> str:
    """A method's name in a table: a bar would end the cell."""
    return f"`{name.replace('|', chr(92) + '|')}`"


def table(document: dict[str, Any], *, categories: bool) -> str:
    """Markdown rows of one bench result; without `categories`, only those over all prompts."""
    lines = [
        "| category | method | tokens/s | against plain | acceptance | tokens a round | same ids |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["results"]:
        if not categories and row["category"] != "all":
            continue
        same = "" if row["num_identical"] is None else f"{row['num_identical']}/{row['num_prompts']}"
        cells = (
            row["category"],
            method_cell(row["method"]),
            cell(row["tokens_per_second"], "{:.1f}"),
            cell(row["speedup_vs_plain"], "{:.2f}x"),
            cell(row["acceptance_rate"], "{:.0%}"),
            cell(row["block_efficiency"], "{:.2f}"),
            same,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(name: str, document: dict[str, Any]) -> str:
    environment = document["environment"]
    machine, runner = environment["machine"], environment["runner"]
    where = runner["device"] if runner["device"] != "cpu" else f"{machine['cpu']}, {machine['cores']} cores"
    sampling = document["settings"]["sampling"]
    how = "greedy" if sampling["temperature"] == 0 else f"temperature {sampling['temperature']:g}"
    return (
        f"**{name}**: {environment['model']}, {runner['precision']} {runner['backend']}, {where}; {how}, "
        f"at most {sampling['max_tokens']} tokens, {max(row['num_prompts'] for row in document['results'])} prompts"
    )


def documents() -> dict[str, dict[str, Any]]:
    """Finished bench results by file name; other JSON files in the folder are left alone."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    return {
        name: d for name, d in found.items() if isinstance(d, dict) and d.get("complete") and "sampling" in d.get("settings", {})
    }


def sections(found: dict[str, dict[str, Any]], *, long: bool) -> str:
    """All results with their commands for the benchmarks page; for the README those marked by their name `headline*`."""
    parts = []
    for name, document in found.items():
        if long:
            parts.append(f"{heading(name, document)}\n\n```\n{document['command']}\n```\n\n{table(document, categories=True)}")
        elif name.startswith("headline"):
            parts.append(f"{heading(name, document)}\n\n{table(document, categories=False)}")
    return "\n\n".join(parts) or NOTHING


def drafter_sections() -> str:
    """The tables of `benchmarks/drafters.py`: each drafter over all prompts, and its speed by category, for each temperature."""
    path = RESULTS / "drafters.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not document.get("complete"):
        return NOTHING
    parts = []
    for part in document["runs"]:
        shown = heading("drafters", document | {"settings": {"sampling": part["sampling"]}, "results": part["results"]})
        parts += [shown, drafter_table(part["results"]), category_table(part["results"])]
    parts.insert(1, f"```\n{document['command']}\n```")
    parts += [f"Not measured: `{name}` ({reason})" for name, reason in document["left_out"].items()]
    return "\n\n".join(parts)


def drafter_table(rows: list[dict[str, Any]]) -> str:
    """A line for each drafter over all prompts."""
    lines = [
        "| drafter | tokens a round | draft ms a token | draft ms a round | tokens/s | against plain | same ids | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["category"] == "all":
            same = "" if row["num_identical"] is None else f"{row['num_identical']}/{row['num_prompts']}"
            cells = (
                method_cell(row["method"]),
                cell(row["block_efficiency"], "{:.2f}"),
                cell(row["draft_ms_per_token"], "{:.3f}"),
                cell(row["draft_ms_per_round"], "{:.3f}"),
                cell(row["tokens_per_second"], "{:.1f}"),
                cell(row["speedup_vs_plain"], "{:.2f}x"),
                same,
                f"{row['memory_bytes'] / 1e6:.1f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def category_table(rows: list[dict[str, Any]]) -> str:
    """Speed against plain decoding, a line for each drafter and a column for each category."""
    speeds = {(row["method"], row["category"]): row["speedup_vs_plain"] for row in rows}
    categories = [category for category in dict.fromkeys(category for _, category in speeds) if category != "all"]
    lines = [f"| against plain | {' | '.join(categories)} |", "|---" * (len(categories) + 1) + "|"]
    for method in dict.fromkeys(method for method, _ in speeds):
        if method != "plain":
            cells = [cell(speeds.get((method, category)), "{:.2f}") for category in categories]
            lines.append(f"| {method_cell(method)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(text: str, content: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """The page with the part between its markers replaced."""
    begin, end = markers
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", flags=re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"a page lacks the markers {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def main() -> int:
    found = documents()
    parts = (
        (ROOT / "README.md", (BEGIN, END), sections(found, long=False)),
        (ROOT / "docs" / "benchmarks.md", (BEGIN, END), sections(found, long=True)),
        (ROOT / "docs" / "drafting.md", DRAFTERS, drafter_sections()),
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

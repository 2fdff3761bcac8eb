"""The script that compares greedy tokens with and without speculation: parts of its matrix, joined."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from scripts import loaded_script


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with loaded_script("identity") as module:
        yield module


def part(command: str, *rows: dict[str, Any], differences: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"environment": {"machine": command}, "command": command, "results": list(rows), "differences": list(differences)}


def row(draft: str, k: int | None, identical: int) -> dict[str, Any]:
    how = {"controller": "pacer"} if k is None else {"num_draft": k}
    return {"precision": "int4", "draft": draft, **how, "num_prompts": 4, "num_identical": identical}


def test_parts_are_joined_and_what_two_hold_counts_once(script: ModuleType) -> None:
    old = {"precision": "int4", "draft": "ngram", "num_draft": 2, "prompt": "old"}
    new = old | {"prompt": "new"}
    whole = script.joined(
        [
            part("first", row("ngram", 1, 4), row("ngram", 2, 2), differences=(old,)),
            part("second", row("auto", None, 4), row("ngram", 2, 3), differences=(new,)),
        ]
    )
    assert whole["results"] == [row("auto", None, 4), row("ngram", 1, 4), row("ngram", 2, 3)]
    assert (whole["compared"], whole["identical"]) == (12, 11)
    assert whole["differences"] == [new]
    assert whole["command"] == "first\nsecond"


def test_the_shortest_prompts_of_each_category_are_taken(script: ModuleType) -> None:
    rows = [
        script.BenchPrompt(str(i), category, "x" * length)
        for i, (category, length) in enumerate([("a", 9), ("b", 5), ("a", 3), ("a", 4)])
    ]
    assert [r.name for r in script.shortest(rows, 2)] == ["2", "3", "1"]

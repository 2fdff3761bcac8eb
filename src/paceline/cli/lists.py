"""`paceline controllers` and `paceline drafters`: what the registries hold."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from paceline.cli.generate import AsJson


def controllers(as_json: AsJson = False) -> None:
    """List the controllers: what decides how much to draft. With --json, also their options and defaults."""
    from paceline.control import registry

    rows = []
    for name in registry.names():
        entry = registry.info(name)
        rows.append(
            {
                "name": name,
                "lossless": entry.lossless,
                "trained": entry.trained,
                "reads": entry.reads,
                "summary": entry.summary,
                "options": _options(registry.controller_class(name).options_type),
            }
        )
    _print("controllers", rows, as_json)


def drafters(as_json: AsJson = False) -> None:
    """List the drafters: what proposes tokens."""
    from paceline.drafting import registry

    rows = [
        {
            "name": name + (f":{entry.argument}" if entry.argument else ""),
            "samples": entry.samples,
            "tree": entry.tree,
            "needs": entry.needs,
            "summary": entry.summary,
        }
        for name, entry in registry.TABLE.items()
    ]
    _print("drafters", rows, as_json)


def _options(options_type: type[Any]) -> dict[str, Any]:
    """Names and defaults of a component's options."""
    defaults = options_type()
    return {item.name: getattr(defaults, item.name) for item in fields(options_type)}


def _cell(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _print(kind: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({kind: rows}, default=str))
        return
    table = Table(show_edge=False)
    columns = [column for column in rows[0] if column != "options"]
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    Console().print(table)

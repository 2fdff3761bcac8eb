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
    """List the controllers: what decides how much to draft."""
    from paceline.control import registry

    rows = []
    for name in registry.names():
        entry = registry.info(name)
        rows.append(
            {
                "name": name,
                "summary": entry.summary,
                "reads": entry.reads,
                "lossless": entry.lossless,
                "trained": entry.trained,
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
            "summary": entry.summary,
            "needs": entry.needs,
            "samples": entry.samples,
            "tree": entry.tree,
        }
        for name, entry in registry.TABLE.items()
    ]
    _print("drafters", rows, as_json)


def _options(options_type: type[Any]) -> dict[str, Any]:
    """Names and defaults of a component's options."""
    defaults = options_type()
    return {item.name: getattr(defaults, item.name) for item in fields(options_type)}


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return " ".join(f"{name}={default}" for name, default in value.items())
    return str(value)


def _print(kind: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({kind: rows}, default=str))
        return
    table = Table(show_edge=False)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)

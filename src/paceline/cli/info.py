"""`paceline info`: this machine, these versions, and how the model would be run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paceline.cli import loading
from paceline.cli.generate import AsJson
from paceline.cli.options import Settings, takes_settings
from paceline.cli.output import draft_memory
from paceline.config import RunnerConfig, SpeculationConfig
from paceline.errors import PacelineError


@takes_settings(SpeculationConfig, RunnerConfig)
def info(
    as_json: AsJson = False,
    load: Annotated[bool, typer.Option("--load/--no-load", help="Load the model, to tell which fast paths are on.")] = True,
    *,
    settings: Settings,
) -> None:
    """Show machine, versions, cache, and for the model: precision, fast paths, lost ones and why, measured costs."""
    from paceline.models.cachedir import cache_root
    from paceline.study.environment import environment

    facts: dict[str, Any] = environment()
    facts["cache"] = {"folder": str(cache_root()), "bytes": _folder_bytes(cache_root())}
    facts["accelerators"] = _accelerators()
    facts["model"] = _model_facts(settings) if load else {"name": settings.model, "loaded": False}
    if as_json:
        typer.echo(json.dumps(facts, default=str))
        return
    table = Table(show_header=False, show_edge=False)
    for name, value in facts.items():
        table.add_row(name, escape(_text(value)))
    Console().print(table)


def _folder_bytes(folder: Any) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _accelerators() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _model_facts(settings: Settings) -> dict[str, Any]:
    """What the engine became; a model that cannot be loaded is a fact too, since `info` is there to find out why."""
    try:
        with loading.open_engine(settings) as engine:
            context = min(512, engine.runner.info.max_context)
            return {
                "name": loading.source_name(engine),
                "loaded": True,
                **asdict(engine.runner.info),
                "draft": settings.speculation.draft,
                "draft_memory_bytes": draft_memory(engine),
                "controller": engine.controller.name,
                "plain_ms": round(1e3 * engine.costs.t_plain(context), 3),
                "verify_8_against_plain": round(engine.costs.t_verify(8, context) / engine.costs.t_plain(context), 3),
                "cost_context": context,
                "notes": list(engine.notes),
            }
    except PacelineError as error:
        return {"name": settings.model, "loaded": False, "error": str(error)}


def _text(value: Any) -> str:
    """Nested facts, one a line."""
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None or value == "" else str(value)

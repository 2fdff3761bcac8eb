"""From settings to an engine: source, runner, costs, drafters, controller."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.config import RunnerConfig, SpeculationConfig
from paceline.control import registry as controllers
from paceline.costs import CostTable, DraftCost
from paceline.drafting import registry as drafters
from paceline.drafting.base import Drafter, DrafterContext
from paceline.errors import ModelError
from paceline.execution.base import Runner
from paceline.execution.factory import create_runner
from paceline.execution.measure import load_or_measure, machine_key
from paceline.models.base import ModelSource
from paceline.models.cachedir import cache_root, read_json
from paceline.models.compat import compare_tokenizers
from paceline.models.resolve import open_model
from paceline.verification import registry as rules

if TYPE_CHECKING:
    from paceline.engine import Engine

_LOOKUP_SECONDS = 20e-6
"""First guess of what a draft without a model costs; the pacer learns the truth from its first rounds."""


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded model and what its steps cost here. Engines with other drafters and controllers may share one, in turn."""

    source: ModelSource
    runner: Runner
    config: RunnerConfig
    costs: CostTable
    notes: tuple[str, ...] = ()


def load_target(model: str, config: RunnerConfig, progress: Callable[[str], None] | None = None) -> Target:
    """Load a model and measure it, or recall its measurement. Raises ModelError, OptionError, CacheError."""
    say = progress or (lambda _: None)
    source = open_model(model, progress=progress)
    say(f"loading {source.name}")
    runner = create_runner(source, config)
    say("measuring what steps cost here")
    costs, note = load_or_measure(runner, source.fingerprint)
    return Target(source, runner, config, costs, (note,) if note else ())


def assemble(
    cls: type[Engine],
    model: str,
    runner_config: RunnerConfig,
    speculation: SpeculationConfig,
    progress: Callable[[str], None] | None,
) -> Engine:
    """Build an engine. Raises ModelError, OptionError, CacheError."""
    check_speculation(speculation)
    return build_engine(cls, load_target(model, runner_config, progress), speculation, progress)


def check_speculation(speculation: SpeculationConfig) -> None:
    """Refuse unknown drafters and controllers before a model is loaded. Raises OptionError."""
    drafters.parse_spec(speculation.draft)
    controllers.info(speculation.controller)
    if speculation.rule != rules.AUTO:
        rules.create(speculation.rule)


def build_engine(
    cls: type[Engine], target: Target, speculation: SpeculationConfig, progress: Callable[[str], None] | None = None
) -> Engine:
    """Drafters, a controller and a cost table of its own over a loaded target. Raises ModelError, OptionError."""
    costs = CostTable.from_json(target.costs.to_json())
    drafts: dict[str, tuple[Runner, CostTable]] = {}

    def open_draft(name: str) -> Runner:
        draft_source = open_model(name, progress=progress)
        fit = compare_tokenizers(target.source.tokenizer, draft_source.tokenizer)
        if not fit.same:
            raise ModelError(f"draft {name!r}: {fit.message}")
        draft_runner = create_runner(draft_source, target.config)
        drafts[name] = draft_runner, load_or_measure(draft_runner, draft_source.fingerprint)[0]
        return draft_runner

    def open_self(precision: str) -> Runner:
        draft_runner = create_runner(target.source, replace(target.config, precision=precision, backend="auto"))
        drafts[precision] = draft_runner, load_or_measure(draft_runner, target.source.fingerprint)[0]
        return draft_runner

    info = target.runner.info
    context = DrafterContext(
        vocab_size=min(info.vocab_size, target.source.tokenizer.vocab_size),
        max_context=info.max_context,
        open_model=open_draft,
        open_self=open_self,
        target=target.runner,
    )
    made = drafters.create_all(speculation.draft, speculation.drafter_options, context)
    for drafter in made:
        costs.drafters[drafter.name] = _draft_cost(drafter, drafts, costs)
    controller = controllers.create(speculation.controller, costs, speculation.controller_options)
    profile = _profile_path(target, speculation) if speculation.remember else None
    if profile is not None and (known := read_json(profile)) is not None:
        with suppress(KeyError, TypeError, ValueError):  # of another version: learn anew
            controller.restore(known)
    return cls(
        target.runner,
        costs=costs,
        controller=controller,
        profile=profile,
        drafters=made,
        tokenizer=target.source.tokenizer,
        source=target.source,
        speculation=speculation,
        notes=target.notes,
    )


def _profile_path(target: Target, speculation: SpeculationConfig) -> Path:
    """Where a controller's profile lies: one for each machine, model, precision, controller and set of drafters."""
    info = target.runner.info
    what = [machine_key(info.device), target.source.fingerprint, info.precision, speculation.controller, speculation.draft]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    return cache_root() / "profiles" / f"{digest}.json"


def _draft_cost(drafter: Drafter, drafts: dict[str, tuple[Runner, CostTable]], target: CostTable) -> DraftCost:
    """First figures of a drafter: its own model's measured step, its share of the target's, or a look-up's few microseconds."""
    share = drafter.share_of_target
    if share is not None:
        return DraftCost(per_token=share * target.t_plain(target.contexts[0]))
    for runner, table in drafts.values():
        if getattr(drafter, "runner", None) is runner:
            step = table.t_plain(table.contexts[0])
            return DraftCost(per_token=step, per_catch_up=step / 4)
    return DraftCost(fixed=_LOOKUP_SECONDS)

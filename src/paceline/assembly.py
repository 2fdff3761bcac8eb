"""From settings to an engine: source, runner, costs, drafters, controller."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from paceline.config import RunnerConfig, SpeculationConfig
from paceline.control import registry as controllers
from paceline.costs import CostTable, DraftCost
from paceline.drafting import registry as drafters
from paceline.drafting.base import DrafterContext
from paceline.errors import ModelError
from paceline.execution.base import Runner
from paceline.execution.factory import create_runner
from paceline.execution.measure import load_or_measure
from paceline.models.compat import compare_tokenizers
from paceline.models.resolve import open_model

if TYPE_CHECKING:
    from paceline.engine import Engine

_LOOKUP_SECONDS = 20e-6
"""First guess of what a draft without a model costs; the pacer learns the truth from its first rounds."""


def assemble(
    cls: type[Engine],
    model: str,
    runner_config: RunnerConfig,
    speculation: SpeculationConfig,
    progress: Callable[[str], None] | None,
) -> Engine:
    """Build an engine. Raises ModelError, OptionError, CacheError."""
    say = progress or (lambda _: None)
    names = drafters.parse_spec(speculation.draft)  # refuse a bad specification before the model loads
    controllers.info(speculation.controller)
    source = open_model(model, progress=progress)
    say(f"loading {source.name}")
    runner = create_runner(source, runner_config)
    say("measuring what steps cost here")
    costs, note = load_or_measure(runner, source.fingerprint)
    drafts: dict[str, tuple[Runner, CostTable]] = {}

    def open_draft(name: str) -> Runner:
        draft_source = open_model(name, progress=progress)
        fit = compare_tokenizers(source.tokenizer, draft_source.tokenizer)
        if not fit.same:
            raise ModelError(f"draft {name!r}: {fit.message}")
        draft_runner = create_runner(draft_source, runner_config)
        drafts[name] = draft_runner, load_or_measure(draft_runner, draft_source.fingerprint)[0]
        return draft_runner

    context = DrafterContext(vocab_size=runner.info.vocab_size, max_context=runner.info.max_context, open_model=open_draft)
    made = drafters.create_all(speculation.draft, speculation.drafter_options, context)
    for drafter in made:
        costs.drafters[drafter.name] = _draft_cost(drafter.name, drafts)
    return cls(
        runner,
        costs=costs,
        controller=controllers.create(speculation.controller, costs, speculation.controller_options),
        drafters=made if names else (),
        tokenizer=source.tokenizer,
        source=source,
        speculation=speculation,
        notes=(note,) if note else (),
    )


def _draft_cost(name: str, drafts: dict[str, tuple[Runner, CostTable]]) -> DraftCost:
    """First figures of a drafter: a second model's own measured step, or a look-up's few microseconds."""
    for path, (_, table) in drafts.items():
        if path in name:
            step = table.t_plain(table.contexts[0])
            return DraftCost(per_token=step, per_catch_up=step / 4)
    return DraftCost(fixed=_LOOKUP_SECONDS)

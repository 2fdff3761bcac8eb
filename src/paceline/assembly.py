"""From settings to an engine: source, runner, costs, drafters, controller."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.control import registry as controllers
from paceline.control.base import Controller
from paceline.costs import CostTable, DraftCost
from paceline.drafting import registry as drafters
from paceline.drafting.base import Drafter, DrafterContext
from paceline.errors import ModelError, OptionError
from paceline.execution.base import Runner
from paceline.execution.factory import create_graded, create_runner
from paceline.execution.measure import load_or_measure, machine_key
from paceline.models.base import ModelSource, Tokenizer
from paceline.models.cachedir import cache_root, read_json
from paceline.models.compat import compare_tokenizers
from paceline.models.resolve import open_model
from paceline.verification import registry as rules

if TYPE_CHECKING:
    from paceline.engine import Engine

_LOOKUP_SECONDS = 20e-6
"""First guess of what a draft without a model costs; the pacer learns the truth from its first rounds."""
_CHECK_TEXT = "Write a short letter to a friend about a walk along the sea."
_CHECK_TOKENS = 32
_LEAST_ACCEPTANCE = 0.1
"""A head below this is reported: trained heads have their first token right in well over half of the rounds."""


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
    _check_context(config, source.max_context, source.name)
    say(f"loading {source.name}")
    runner = create_runner(source, config)
    _check_context(config, runner.info.max_context, source.name)  # a backend may hold less than the model names
    say("measuring what steps cost here")
    costs, note = load_or_measure(runner, source.fingerprint)
    return Target(source, runner, config, costs, (note,) if note else ())


def _check_context(config: RunnerConfig, limit: int, name: str) -> None:
    """Refuse a longer context than there is: answers would end where nobody expects them to. Raises OptionError."""
    if config.max_context is not None and config.max_context > limit:
        raise OptionError(
            f"max_context = {config.max_context}: {name} holds {limit} tokens, prompt and answer together; "
            f"choose {limit} or less, or leave it out"
        )


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
    models = _DraftModels(target, progress)
    notes = list(target.notes)
    made = drafters.create_all(speculation.draft, speculation.drafter_options, _drafter_context(target, models), notes.append)
    for drafter in made:
        costs.drafters[drafter.name] = models.cost_of(drafter, costs)
    notes += [note for drafter in made if drafter.wants_hidden and (note := _check_head(cls, target, drafter, costs))]
    profile = _profile_path(target, speculation) if speculation.remember else None
    return cls(
        target.runner,
        costs=costs,
        controller=_make_controller(speculation, costs, profile),
        profile=profile,
        drafters=made,
        tokenizer=target.source.tokenizer,
        source=target.source,
        speculation=speculation,
        notes=notes,
    )


class _DraftModels:
    """Models that drafters open beside a target, each loaded once for all that share it, and what their steps cost here."""

    def __init__(self, target: Target, progress: Callable[[str], None] | None) -> None:
        self._target = target
        self._source_of = cache(partial(open_model, progress=progress))
        self._loaded: dict[str, tuple[Runner, CostTable]] = {}

    def open_foreign(self, name: str) -> tuple[Runner, Tokenizer]:
        """A model by its name, whatever its tokenizer."""
        source = self._source_of(name)
        if name not in self._loaded:
            self._load(name, create_runner(source, self._target.config), source)
        return self._loaded[name][0], source.tokenizer

    def open_same(self, name: str) -> Runner:
        """A model by its name. Raises ModelError when its tokenizer is not the target's."""
        fit = compare_tokenizers(self._target.source.tokenizer, self._source_of(name).tokenizer, name)
        if not fit.same:
            raise ModelError(fit.message)
        return self.open_foreign(name)[0]

    def open_self(self, precision: str) -> Runner:
        """The target once more, in another precision."""
        if precision not in self._loaded:
            config = replace(self._target.config, precision=precision, backend="auto")
            self._load(precision, create_runner(self._target.source, config), self._target.source)
        return self._loaded[precision][0]

    def open_graded(self, narrow: str, wide: str, set_up: Callable[[Runner], str]) -> Runner:
        """The target once more, every layer in two precisions; `set_up` chooses and says which. Each caller has its own."""
        runner = create_graded(self._target.source, self._target.config, narrow, wide)
        runner.info.extra["grades"] = set_up(runner)
        return self._load(f"{narrow}+{wide}", runner, self._target.source)

    def cost_of(self, drafter: Drafter, costs: CostTable) -> DraftCost:
        """First figures of a drafter: its own model's measured step, its share of the target's, or a look-up's few microseconds."""
        share = drafter.share_of_target
        if share is not None:
            return DraftCost(per_token=share * costs.t_plain(costs.contexts[0]))
        table = self._table_of(drafter)
        if table is None:
            return DraftCost(fixed=_LOOKUP_SECONDS)
        step = table.t_plain(table.contexts[0])
        most = table.rows[-1]
        row = (table.t_verify(most, table.contexts[0]) - step) / (most - 1) if most > 1 else step
        return DraftCost(per_token=step, per_catch_up=min(row, step))

    def level_costs(self, upper: Drafter, lower: Drafter) -> CostTable:
        """What drafting costs where one drafter drafts for another: the upper one is the target of the lower one."""
        own = CostTable.from_json((self._table_of(upper) or self._target.costs).to_json())
        own.scale = upper.share_of_target or 1.0
        own.drafters[lower.name] = self.cost_of(lower, own)
        return own

    def _load(self, name: str, runner: Runner, source: ModelSource) -> Runner:
        self._loaded[name] = runner, load_or_measure(runner, source.fingerprint)[0]
        return runner

    def _table_of(self, drafter: Drafter) -> CostTable | None:
        """Measured costs of the model that a drafter runs; None when it runs none, or the target."""
        runner = getattr(drafter, "runner", None)
        return next((table for loaded, table in self._loaded.values() if loaded is runner), None)


def _drafter_context(target: Target, models: _DraftModels) -> DrafterContext:
    """What drafters may ask for when they are made."""
    info = target.runner.info
    return DrafterContext(
        vocab_size=min(info.vocab_size, target.source.tokenizer.vocab_size),
        max_context=info.max_context,
        open_model=models.open_same,
        open_foreign=models.open_foreign,
        tokenizer=target.source.tokenizer,
        open_self=models.open_self,
        open_graded=models.open_graded,
        target=target.runner,
        source=target.source,
        row_cost=target.costs.row_cost(),
        level_costs=models.level_costs,
    )


def _make_controller(speculation: SpeculationConfig, costs: CostTable, profile: Path | None) -> Controller:
    """A controller that begins with what the profile holds, if there is one."""
    controller = controllers.create(speculation.controller, costs, speculation.controller_options)
    if profile is not None and (known := read_json(profile)) is not None:
        with suppress(KeyError, TypeError, ValueError):  # of another version: learn anew
            controller.restore(known)
    return controller


def _check_head(cls: type[Engine], target: Target, drafter: Drafter, costs: CostTable) -> str | None:
    """Let a head draft one token a round for a short greedy text: what a token costs goes into `costs`, and a head whose drafts are
    hardly ever right gets a note. Heads of other targets, and files read in a wrong way, load cleanly and draft nonsense."""
    tokenizer = target.source.tokenizer
    text = tokenizer.render_chat([{"role": "user", "content": _CHECK_TEXT}]) if tokenizer.has_chat_template else _CHECK_TEXT
    prompt = tokenizer.encode(text, add_special=not tokenizer.has_chat_template)[: target.runner.info.max_context // 2]
    controller = controllers.create("fixed", costs, {"num_draft": 1})
    trial = cls(target.runner, costs=costs, controller=controller, drafters=[drafter], tokenizer=tokenizer)
    steps = trial.generate(prompt, SamplingParams(max_tokens=_CHECK_TOKENS, ignore_eos=True)).steps
    drafted = [step for step in steps if step.num_drafted]
    if not drafted:
        return None
    costs.drafters[drafter.name] = DraftCost(per_token=median(step.draft_seconds for step in drafted))
    right = sum(step.num_accepted for step in drafted) / len(drafted)
    if right >= _LEAST_ACCEPTANCE:
        return None
    return (
        f"{drafter.name}: only {right:.0%} of {len(drafted)} drafted tokens were right in a short check; "
        "is it a head of this very target, and was it trained with its chat template?"
    )


def _profile_path(target: Target, speculation: SpeculationConfig) -> Path:
    """Where a controller's profile lies: one for each machine, model, precision, controller and set of drafters."""
    info = target.runner.info
    what = [machine_key(info.device), target.source.fingerprint, info.precision, speculation.controller, speculation.draft]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    return cache_root() / "profiles" / f"{digest}.json"

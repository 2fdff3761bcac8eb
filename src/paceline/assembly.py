"""From settings to an engine: source, runner, costs, drafters, controller."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.control import registry as controllers
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
    drafts: dict[str, tuple[Runner, CostTable]] = {}

    @cache
    def source_of(name: str) -> ModelSource:
        return open_model(name, progress=progress)

    def open_foreign(name: str) -> tuple[Runner, Tokenizer]:
        source = source_of(name)
        if name not in drafts:  # several drafters may share it
            draft_runner = create_runner(source, target.config)
            drafts[name] = draft_runner, load_or_measure(draft_runner, source.fingerprint)[0]
        return drafts[name][0], source.tokenizer

    def open_draft(name: str) -> Runner:
        fit = compare_tokenizers(target.source.tokenizer, source_of(name).tokenizer, name)
        if not fit.same:
            raise ModelError(fit.message)
        return open_foreign(name)[0]

    def open_self(precision: str) -> Runner:
        if precision in drafts:  # several drafters may share it
            return drafts[precision][0]
        draft_runner = create_runner(target.source, replace(target.config, precision=precision, backend="auto"))
        drafts[precision] = draft_runner, load_or_measure(draft_runner, target.source.fingerprint)[0]
        return draft_runner

    def open_graded(narrow: str, wide: str, set_up: Callable[[Runner], str]) -> Runner:
        draft_runner = create_graded(target.source, target.config, narrow, wide)
        draft_runner.info.extra["grades"] = set_up(draft_runner)
        drafts[f"{narrow}+{wide}"] = draft_runner, load_or_measure(draft_runner, target.source.fingerprint)[0]
        return draft_runner

    def level_costs(upper: Drafter, lower: Drafter) -> CostTable:
        table = next((table for runner, table in drafts.values() if getattr(upper, "runner", None) is runner), target.costs)
        own = CostTable.from_json(table.to_json())
        own.scale = upper.share_of_target or 1.0
        own.drafters[lower.name] = _draft_cost(lower, drafts, own)
        return own

    info = target.runner.info
    context = DrafterContext(
        vocab_size=min(info.vocab_size, target.source.tokenizer.vocab_size),
        max_context=info.max_context,
        open_model=open_draft,
        open_foreign=open_foreign,
        tokenizer=target.source.tokenizer,
        open_self=open_self,
        open_graded=open_graded,
        target=target.runner,
        source=target.source,
        level_costs=level_costs,
    )
    notes = list(target.notes)
    made = drafters.create_all(speculation.draft, speculation.drafter_options, context, notes.append)
    for drafter in made:
        costs.drafters[drafter.name] = _draft_cost(drafter, drafts, costs)
    notes += [note for drafter in made if drafter.wants_hidden and (note := _check_head(cls, target, drafter, costs))]
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
        notes=notes,
    )


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


def _draft_cost(drafter: Drafter, drafts: dict[str, tuple[Runner, CostTable]], target: CostTable) -> DraftCost:
    """First figures of a drafter: its own model's measured step, its share of the target's, or a look-up's few microseconds."""
    share = drafter.share_of_target
    if share is not None:
        return DraftCost(per_token=share * target.t_plain(target.contexts[0]))
    for runner, table in drafts.values():
        if getattr(drafter, "runner", None) is runner:
            step = table.t_plain(table.contexts[0])
            most = table.rows[-1]
            row = (table.t_verify(most, table.contexts[0]) - step) / (most - 1) if most > 1 else step
            return DraftCost(per_token=step, per_catch_up=min(row, step))
    return DraftCost(fixed=_LOOKUP_SECONDS)

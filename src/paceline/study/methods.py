"""Names of bench methods, and what they stand for.

`plain`                          the engine without speculation
`DRAFT[@CONTROLLER[:NAME=VALUE]]`  the engine with these drafters and this controller: `auto`, `ngram@fixed:num_draft=4`,
                                 `model:FOLDER`, `ngram,model:FOLDER`
`transformers`, ...              peers, see `study/peers.py`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from paceline.config import SamplingParams, SpeculationConfig
from paceline.errors import OptionError
from paceline.records import GenerationResult
from paceline.study.bench import PLAIN, Method

if TYPE_CHECKING:
    from paceline.engine import Engine

EngineFactory = Callable[[SpeculationConfig], "Engine"]


@dataclass(frozen=True, slots=True)
class EngineMethod:
    """Our engine, plain or speculative."""

    name: str
    engine: Engine
    plain: bool = False

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, task: str) -> GenerationResult:
        """Answer one prompt; `task` keeps what the controller learns apart by category."""
        return self.engine.generate(list(prompt_ids), params, plain=self.plain, task=task)

    def forget(self) -> None:
        """Let the drafters give up the answers of earlier prompts, which they would draft from when asked again."""
        for drafter in self.engine.drafters:
            drafter.forget()


def split_names(text: str) -> list[str]:
    """Methods of a list: separated by semicolons if it has one (then a method may hold commas), else by commas."""
    return [name.strip() for name in text.split(";" if ";" in text else ",") if name.strip()]


def parse_speculation(name: str) -> SpeculationConfig:
    """`ngram@fixed:num_draft=4` -> drafters, controller and its options. Raises OptionError for an option without `=`."""
    draft, _, control = name.partition("@")
    if not draft or name.endswith("@"):
        raise OptionError(f"method {name!r}: write DRAFT or DRAFT@CONTROLLER")
    controller, *pairs = control.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise OptionError(f"method {name!r}: write the controller's options as NAME=VALUE, not {pair!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    config = SpeculationConfig(draft=draft, controller_options=options)
    return replace(config, controller=controller) if controller else config


def make_methods(names: Sequence[str], engine_for: EngineFactory) -> list[Method]:
    """Methods by name; `plain` and the peers use the first engine's model.

    Raises OptionError for no names, a name given twice or one that cannot be parsed; also what making an engine or a peer raises.
    """
    from paceline.study.peers import PEERS

    if not names or len(set(names)) != len(names):
        raise OptionError(f"methods = {','.join(names)!r}: name at least one, each once")
    ours = {name: parse_speculation(name) for name in names if name != PLAIN and name not in PEERS}
    engines = {name: engine_for(config) for name, config in ours.items()}
    base = next(iter(engines.values()), None) or engine_for(SpeculationConfig())
    made: list[Method] = []
    for name in names:
        if name in PEERS:
            made.append(PEERS[name](name, base))
        elif name == PLAIN:
            made.append(EngineMethod(name, base, plain=True))
        else:
            made.append(EngineMethod(name, engines[name]))
    return made

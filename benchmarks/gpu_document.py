"""What the benchmarks on a GPU share: the document that they write, and the machine's name in it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paceline.costs import CostTable
from paceline.drafting import registry as drafters
from paceline.drafting.base import Drafter, DrafterContext
from paceline.execution.base import Runner
from paceline.models.base import Tokenizer
from paceline.study.environment import command, environment

GIB = 1 << 30


def shown_command() -> str:
    """The command line, with files by their names alone."""
    return shlex.join(Path(word).name if "/" in word else word for word in shlex.split(command()))


def begin(output: Path) -> tuple[dict[str, Any], Callable[[], None]]:
    """A document that says where it was measured, and what writes it as it is by then to a file."""
    document: dict[str, Any] = {"command": shown_command(), "gpu": torch.cuda.get_device_name(), **environment()}

    def save() -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n")

    return document, save


def default_drafter(runner: Runner, tokenizer: Tokenizer, costs: CostTable) -> Drafter:
    """What drafts by default on a target with these costs."""
    info = runner.info
    context = DrafterContext(
        vocab_size=info.vocab_size, max_context=info.max_context, tokenizer=tokenizer, row_cost=costs.row_cost()
    )
    (drafter,) = drafters.create_all("auto", {}, context)
    return drafter

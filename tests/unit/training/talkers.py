"""Engines over toy languages that can hold a conversation: byte-level tokens, the small chat template, turns that end soon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable, DraftCost
from paceline.drafting import registry as drafting
from paceline.drafting.base import DrafterContext
from paceline.engine import Engine
from paceline.models.base import Tokenizer
from tiny_models import END, TEMPLATE, byte_level_tokenizer, byte_vocabulary
from toys import Language, ToyRunner, random_language

VOCABULARY = byte_vocabulary()
LETTERS = [VOCABULARY.index(letter) for letter in "abcdefgh"]
NEWLINE = VOCABULARY.index("Ċ")


def chatty_language(seed: int = 0) -> Language:
    """Some letters in random order; an end now and then, though never right at the beginning of a turn."""
    base = random_language(len(VOCABULARY), order=2, seed=seed)

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        values = np.full(len(VOCABULARY), -50.0)
        values[LETTERS] = base(tokens)[LETTERS]
        if tokens[-1] != NEWLINE:
            values[END] = 0.0
        return values

    return logits


class Listening(Engine):
    """An engine that notes what it was asked, and can be interrupted."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.asked: list[tuple[list[str], SamplingParams]] = []
        self.interrupt_at: int | None = None
        """Number of the call, from 0, that Ctrl-C breaks off."""

    def generate(self, prompt: Any, params: SamplingParams | None = None, **settings: Any) -> Any:
        if len(self.asked) == self.interrupt_at:
            raise KeyboardInterrupt
        self.asked.append(([self.tokenizer.decode(ids, skip_special=False) for ids in prompt], params or SamplingParams()))
        return super().generate(prompt, params, **settings)


def make_talker(
    language: Language | None = None,
    *,
    draft: str = "none",
    template: str | None = TEMPLATE,
    max_context: int = 4096,
) -> Listening:
    language = language or chatty_language()
    tokenizer: Tokenizer = byte_level_tokenizer(template)
    drafters = drafting.create_all(draft, {}, DrafterContext(vocab_size=len(VOCABULARY), max_context=max_context))
    costs = CostTable([1, 2, 17], [1], [[1e-3, 1.05e-3, 1.5e-3]], drafters={d.name: DraftCost(fixed=1e-6) for d in drafters})
    return Listening(
        ToyRunner(language, len(VOCABULARY), max_context=max_context),
        costs=costs,
        controller=controllers.create("fixed", costs, {"num_draft": 4}),
        drafters=drafters,
        tokenizer=tokenizer,
    )


def likeliest_after(language: Language, tokens: Sequence[int]) -> int:
    return int(np.argmax(language(tuple(tokens))))

"""What most tests of drafters share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.records import DraftFeatures
from toys import Language


def always(_: DraftFeatures) -> bool:
    """A controller's answer: go on."""
    return True


def greedy_text(language: Language, tokens: Sequence[int], count: int) -> list[int]:
    """What plain decoding writes after these tokens."""
    text = list(tokens)
    for _ in range(count):
        text.append(int(np.argmax(language(tuple(text)))))
    return text[len(tokens) :]

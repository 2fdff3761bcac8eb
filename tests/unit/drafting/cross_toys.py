"""Two small tokenizers over the same letters, and models of them."""

from __future__ import annotations

import tokenizers
from tokenizers import models

from paceline.models.tokenizer import FastTokenizer

LETTERS = ("a", "b", "ab", "c")
"""Target ids 0..3, as in the worked example of drafting.md section 7."""
OTHERS = ("c", "bc", "b", "abc", "d", "a")
"""Draft ids 0..5 of the same example."""


def merging(entries: tuple[str, ...], *merges: tuple[str, str], end: str | None = None) -> FastTokenizer:
    """A tokenizer of these entries, in the order of their ids. end: name of a special token that ends a text, the last id."""
    backend = tokenizers.Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, list(merges)))
    if end is not None:
        backend.add_special_tokens([end])
    return FastTokenizer(backend, end_ids=frozenset() if end is None else frozenset({len(entries)}))


def target_letters(end: str | None = None) -> FastTokenizer:
    return merging(LETTERS, ("a", "b"), end=end)


def draft_letters(end: str | None = None) -> FastTokenizer:
    return merging(OTHERS, ("b", "c"), ("a", "bc"), end=end)

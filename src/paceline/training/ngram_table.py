"""Count n-grams of a model's own answers into the table that `suffix+tree` drafts from (`drafting.ngram_table`).

Chances are smoothed by absolute discounting: every count of a context gives up `DISCOUNT`, and what is given up goes to the chances
of the context that is one token shorter (Ney, Essen, Kneser 1994, in its interpolated form). An answer counts once for each n-gram
in it, since a model that repeats itself says nothing new, and a repetition is found in the text itself. A context is kept when it
is frequent enough and tells something that the next shorter one does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paceline.drafting.ngram_table import MOST_ORDERS, WIDTH, NgramTable, context_keys, from_contexts
from paceline.drafting.options import number, whole
from paceline.errors import OptionError

DISCOUNT = 0.75
_BREAK = -1
_MOST_IDS = 1 << 20
_FLOOR = 1e-4
"""Chance of a token after a context of no tokens: nothing is counted there."""
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """How large and how sure a table becomes."""

    orders: int = 4
    """Tokens of the longest context."""
    min_count: int = 3
    """How often a context must be counted: once in each answer for each token that follows it there."""
    min_gain: float = 0.08
    """By how much a context's best chance must differ from that after the next shorter context, when both name the same token."""
    max_contexts: int = 500_000
    """Contexts that are kept, the most frequent ones first; 17 bytes each in memory, 11 to 17 on disk."""

    def __post_init__(self) -> None:
        whole("orders", self.orders, 1, MOST_ORDERS)
        whole("min_count", self.min_count, 1, 1 << 30)
        number("min_gain", self.min_gain, 0.0, 1.0)
        whole("max_contexts", self.max_contexts, 1, 1 << 28)


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids of a text, of which those from `first` on were written by the model; the ones before are context only."""

    tokens: Sequence[int]
    first: int
    likeliest: Sequence[int] | None = None
    """What the model found most probable at each of those positions, where that is known of a sampled text."""

    def __post_init__(self) -> None:
        if not 0 <= self.first <= len(self.tokens):
            raise OptionError(f"first = {self.first}: must be from 0 to {len(self.tokens)}, the number of tokens")
        if self.likeliest is not None and len(self.likeliest) != self.num_written:
            raise OptionError(f"likeliest: holds {len(self.likeliest)} ids for {self.num_written} tokens; give one for each")

    @property
    def num_written(self) -> int:
        """Tokens of the model's own."""
        return len(self.tokens) - self.first


@dataclass(slots=True)
class _Level:
    """Contexts of one length: their keys, and for all pairs of a context and a next token the chance."""

    of_label: npt.NDArray[np.uint64]
    """[L]: key of the context before each counted token."""
    pairs: npt.NDArray[np.uint64]
    """[P], sorted: key of a context above the next token, which takes 20 bits."""
    chances: Floats
    """[P]."""
    keys: npt.NDArray[np.uint64]
    """[C], sorted."""
    counts: Ints
    """[C]: answers."""
    tokens: Ints
    """[C, WIDTH]: likeliest first."""
    best: Floats
    """[C, WIDTH]; 0 where there is no such token."""


def count_ngrams(answers: Sequence[Answer], options: TableOptions, vocabulary: str) -> NgramTable:
    """The table of some answers, of ids below 2^20; vocabulary: `vocabulary_digest` of their tokenizer. Raises OptionError."""
    tokens, counted, labels, texts = _flatten(answers)
    begins = np.maximum.accumulate(np.where(tokens == _BREAK, np.arange(len(tokens)), 0))
    kept: list[tuple[npt.NDArray[np.uint64], Ints, Ints, Floats]] = []
    below: _Level | None = None
    for order in range(1, options.orders + 1):
        whole_context = (np.arange(len(tokens)) - begins > order)[counted]
        if not whole_context.any():
            break  # no answer is that long
        keys = context_keys(tokens, order)[counted]
        level = _count(keys, labels, texts, whole_context, below)
        tells = level.counts >= options.min_count
        if below is not None:
            at = _shorter(level, below, whole_context)
            same = level.tokens[:, 0] == below.tokens[at, 0]
            tells &= ~(same & (np.abs(level.best[:, 0] - below.best[at, 0]) < options.min_gain))
        kept.append((level.keys[tells], level.counts[tells], level.tokens[tells], level.best[tells]))
        below = level
    if not kept:
        raise OptionError("answers: no token that the model wrote has one before it; give longer answers, or their prompts")
    all_keys, counts, following, chances = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    most = np.argsort(-counts, kind="stable")[: options.max_contexts]
    return from_contexts(all_keys[most], following[most], chances[most], options.orders, vocabulary)


def _flatten(answers: Sequence[Answer]) -> tuple[Ints, npt.NDArray[np.bool_], Ints, Ints]:
    """All answers in a row [N], each before a break; which tokens count; and of those, [L], the labels and each one's answer."""
    tokens, counted, labels, text = [np.array([_BREAK])], [np.array([False])], [], []
    for i, answer in enumerate(answers):
        ids = _checked(answer.tokens)
        tokens += [ids, np.array([_BREAK])]
        counted += [np.arange(len(ids)) >= answer.first, np.array([False])]
        labels.append(ids[answer.first :] if answer.likeliest is None else _checked(answer.likeliest))
        text.append(np.full(len(labels[-1]), i))
    if not sum(map(len, labels)):
        raise OptionError("answers: hold no token that the model wrote; give texts with an answer in them")
    return np.concatenate(tokens), np.concatenate(counted), np.concatenate(labels), np.concatenate(text)


def _checked(tokens: Sequence[int]) -> Ints:
    ids = np.asarray(tokens, dtype=np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < _MOST_IDS:
        raise OptionError(f"answers: token ids from {ids.min()} to {ids.max()}; must be from 0 to {_MOST_IDS - 1}")
    return ids


def _count(keys: npt.NDArray[np.uint64], labels: Ints, texts: Ints, usable: npt.NDArray[np.bool_], below: _Level | None) -> _Level:
    """Count the labels [L] after their contexts, and smooth the chances by those after the shorter contexts `below`."""
    at = np.flatnonzero(usable)
    pair_of = keys[at] << np.uint64(20) | labels[at].astype(np.uint64)
    order = np.lexsort((texts[at], pair_of))
    ordered, written = pair_of[order], texts[at][order]
    new_pair = np.r_[True, ordered[1:] != ordered[:-1]]
    in_new_text = new_pair | np.r_[True, written[1:] != written[:-1]]
    pairs, first = ordered[new_pair], at[order[new_pair]]
    pair_counts = np.add.reduceat(in_new_text.astype(np.int64), np.flatnonzero(new_pair))

    contexts = pairs >> np.uint64(20)
    new_context = np.r_[True, contexts[1:] != contexts[:-1]]
    begins, context_of = np.flatnonzero(new_context), np.cumsum(new_context) - 1
    counts = np.add.reduceat(pair_counts, begins)
    given_up = DISCOUNT * np.diff(np.r_[begins, len(pairs)]) / counts
    shorter = np.full(len(pairs), _FLOOR)
    if below is not None:
        wanted = below.of_label[first] << np.uint64(20) | pairs & np.uint64((1 << 20) - 1)
        shorter = below.chances[np.searchsorted(below.pairs, wanted)]
    chances = (pair_counts - DISCOUNT) / counts[context_of] + given_up[context_of] * shorter

    tokens, best = np.zeros((len(begins), WIDTH), np.int64), np.zeros((len(begins), WIDTH))
    likeliest = np.lexsort((-chances, context_of))
    rank = np.arange(len(pairs)) - begins[context_of[likeliest]]
    top, rank = likeliest[rank < WIDTH], rank[rank < WIDTH]
    tokens[context_of[top], rank] = (pairs[top] & np.uint64((1 << 20) - 1)).astype(np.int64)
    best[context_of[top], rank] = chances[top]
    level = _Level(keys, pairs, chances, contexts[begins], counts, tokens, best)
    if below is not None:
        _fill(level, below, first[begins], given_up)
    return level


def _fill(level: _Level, below: _Level, label: Ints, given_up: Floats) -> None:
    """Let in what never followed a context but is likely after the shorter one. label [C]: a counted token after each context."""
    at = np.searchsorted(below.keys, below.of_label[label])
    seen = ((below.tokens[at][:, :, None] == level.tokens[:, None, :]) & (level.best[:, None, :] > 0.0)).any(axis=2)
    tokens = np.concatenate([level.tokens, below.tokens[at]], axis=1)
    best = np.concatenate([level.best, np.where(seen, 0.0, below.best[at] * given_up[:, None])], axis=1)
    order = np.argsort(-best, axis=1, kind="stable")[:, :WIDTH]
    level.tokens, level.best = np.take_along_axis(tokens, order, axis=1), np.take_along_axis(best, order, axis=1)


def _shorter(level: _Level, below: _Level, usable: npt.NDArray[np.bool_]) -> Ints:
    """[C]: where each context's next shorter one is among those of `below`."""
    at = np.flatnonzero(usable)
    _, first = np.unique(level.of_label[at], return_index=True)
    found: Ints = np.searchsorted(below.keys, below.of_label[at[first]])
    return found

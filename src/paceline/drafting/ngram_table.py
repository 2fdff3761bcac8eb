"""What a model tends to say next after its last few tokens: an n-gram model of its own answers, as a table on disk.

Counted by `training.ngram_table` from texts that the model wrote. For every context of 1 to `orders` tokens that is kept, the
table has the `WIDTH` likeliest next tokens with their chances, smoothed by shorter contexts when it was made; so the longest known
context alone is asked. A context is known by 32 bits of a hash: the upper 16 choose a bucket, the lower 16 are kept and compared.
One in thousands of unknown contexts is mistaken for another, which costs a wrong draft and never a wrong text. (Ours; N-Grammys,
2411.03786, draft from n-grams of the model, too, which they read off its own distributions.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from paceline.errors import CacheError, OptionError
from paceline.execution.native.arena import zeros
from paceline.models.base import Tokenizer, first_line
from paceline.models.cachedir import atomic_write

WIDTH = 3
"""Next tokens of a context."""
MOST_ORDERS = 8
_FORMAT = 1
_UNREADABLE = (ValueError, KeyError, EOFError, TypeError, AttributeError, BadZipFile)
"""What numpy raises over a file that is no archive of such arrays."""
_ALIGN = 64
_FACTOR, _MIX, _WORD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, (1 << 64) - 1


def context_key(context: Sequence[int]) -> int:
    """32 bits that stand for a context of token ids, oldest first; contexts of other lengths have other keys."""
    value = len(context)
    for token in context:
        value = value * _FACTOR + token + 1 & _WORD
    value = (value ^ value >> 31) * _MIX & _WORD
    return value >> 32


def context_keys(tokens: npt.NDArray[np.int64], order: int) -> npt.NDArray[np.uint64]:
    """`context_key` of the `order` tokens before each position; [N] tokens to [N] keys, of which the first `order` mean nothing."""
    value = np.full(len(tokens), order, dtype=np.uint64)
    for back in range(order, 0, -1):
        before = np.zeros(len(tokens), dtype=np.uint64)
        before[back:] = tokens[:-back].astype(np.uint64) + np.uint64(1)
        value = value * np.uint64(_FACTOR) + before
    value = (value ^ value >> np.uint64(31)) * np.uint64(_MIX)
    return value >> np.uint64(32)


@dataclass(frozen=True, slots=True, eq=False)
class NgramTable:
    """The contexts of all lengths, sorted by key; C reads these arrays as they are."""

    orders: int
    """Tokens of the longest context."""
    starts: npt.NDArray[np.uint32]
    """[65537]: where each bucket begins."""
    checks: npt.NDArray[np.uint16]
    """[N]: the lower half of each key."""
    tokens: npt.NDArray[np.uint32]
    """[N, WIDTH]: next tokens, likeliest first."""
    chances: npt.NDArray[np.uint8]
    """[N, WIDTH]: in 256ths, rounded down; 0 where there is no such token."""
    vocabulary: str = ""
    """Digest of the vocabulary whose ids these are."""

    def after(self, context: Sequence[int]) -> list[tuple[int, float]]:
        """Next tokens and their chances after the end of a text; from the longest of its contexts that is known."""
        for order in range(min(self.orders, len(context)), 0, -1):
            key = context_key(context[len(context) - order :])
            first, last = self.starts[key >> 16], self.starts[(key >> 16) + 1]
            found = np.flatnonzero(self.checks[first:last] == key & 0xFFFF)
            if len(found):
                at = int(first) + int(found[0])
                pairs = zip(self.tokens[at].tolist(), self.chances[at].tolist(), strict=True)
                return [(token, (chance + 0.5) / 256.0) for token, chance in pairs if chance]
        return []

    def memory_bytes(self) -> int:
        """Bytes that the table holds."""
        return sum(part.nbytes for part in (self.starts, self.checks, self.tokens, self.chances))

    def save(self, path: Path) -> None:
        """Write it down, whole or not at all. Raises CacheError."""
        narrow = np.uint16 if int(self.tokens.max(initial=0)) < 1 << 16 else np.uint32
        parts: dict[str, Any] = {
            "format": np.int64(_FORMAT),
            "orders": np.int64(self.orders),
            "starts": self.starts,
            "checks": self.checks,
            "tokens": self.tokens.astype(narrow),
            "chances": self.chances,
            "vocabulary": np.array(self.vocabulary),
        }
        file = BytesIO()
        np.savez(file, **parts)
        atomic_write(path, file.getvalue())


def from_contexts(
    keys: npt.NDArray[np.uint64], tokens: npt.NDArray[np.int64], chances: npt.NDArray[np.float64], orders: int, vocabulary: str
) -> NgramTable:
    """A table of contexts by their keys [N], with [N, WIDTH] next tokens and chances (0 to 1). Of equal keys the first is kept."""
    keys, first = np.unique(keys, return_index=True)
    counts = np.bincount((keys >> np.uint64(16)).astype(np.int64), minlength=1 << 16)
    return NgramTable(
        orders,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
        (keys & np.uint64(0xFFFF)).astype(np.uint16),
        np.ascontiguousarray(tokens[first], dtype=np.uint32),
        np.ascontiguousarray(np.clip(chances[first] * 256.0, 0.0, 255.0), dtype=np.uint8),
        vocabulary,
    )


@cache
def load_table(path: Path) -> NgramTable:
    """Read a table; the same file is read once. Raises OptionError when there is none, CacheError when it is damaged,
    ResourceError when memory runs out."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as parts:
            if int(parts["format"]) != _FORMAT:
                raise ValueError(f"format {int(parts['format'])}, expected {_FORMAT}")
            table = NgramTable(
                int(parts["orders"]),
                parts["starts"],
                parts["checks"],
                parts["tokens"].astype(np.uint32),
                parts["chances"],
                str(parts["vocabulary"]),
            )
    except FileNotFoundError as error:
        raise OptionError(f"n-gram table {str(path)!r}: not found; make one with `paceline train ngrams`") from error
    except OSError as error:
        raise CacheError(f"n-gram table {path}: cannot be read ({error.strerror or first_line(error)})") from error
    except _UNREADABLE as error:  # whose words are not passed on: numpy advises to unpickle
        raise CacheError(f"n-gram table {path}: damaged or of another version; make it again") from error
    _check_shapes(table, path)
    return _on_large_pages(table)


def _on_large_pages(table: NgramTable) -> NgramTable:
    """The same arrays side by side: a look-up jumps about in them, and each page walk would take as long as what it reads."""
    parts = {name: getattr(table, name) for name in ("starts", "checks", "tokens", "chances")}
    room = zeros((sum(part.nbytes + _ALIGN for part in parts.values()),), np.uint8)
    at = 0
    for name, part in parts.items():
        place = room[at : at + part.nbytes].view(part.dtype).reshape(part.shape)
        place[...] = part
        parts[name] = place
        at += -(-part.nbytes // _ALIGN) * _ALIGN
    return replace(table, **parts)


def _check_shapes(table: NgramTable, path: Path) -> None:
    """C trusts these arrays. Raises CacheError."""
    entries = len(table.checks)
    shaped = table.tokens.shape == table.chances.shape == (entries, WIDTH) and table.starts.shape == ((1 << 16) + 1,)
    typed = table.starts.dtype == np.uint32 and table.checks.dtype == np.uint16 and table.chances.dtype == np.uint8
    if not (shaped and typed and 1 <= table.orders <= MOST_ORDERS):
        raise CacheError(f"n-gram table {path}: damaged (arrays do not fit together); make it again")
    if int(table.starts[-1]) != entries or int(table.starts[0]) or np.any(np.diff(table.starts.astype(np.int64)) < 0):
        raise CacheError(f"n-gram table {path}: damaged (buckets do not cover its entries); make it again")


@lru_cache(maxsize=4)
def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """Tells vocabularies apart: a table's ids mean other text under another one. Engines that share a target ask once: listing a
    vocabulary takes as long as a dozen steps."""
    entries = "\0".join(entry or "" for entry in tokenizer.token_strings())
    return hashlib.sha256(entries.encode("utf-8", "surrogatepass")).hexdigest()


def find_shipped(tokenizer: Tokenizer) -> NgramTable | None:
    """The table of the package that fits a vocabulary, if there is one."""
    paths = sorted((Path(__file__).parent / "tables").glob("*.npz"))
    if not paths:
        return None
    digest = vocabulary_digest(tokenizer)
    return next((table for path in paths if (table := load_table(path)).vocabulary == digest), None)

"""The index of `suffix_index`, compiled: the same proposals, in microseconds (`suffix_index.c`)."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence
from ctypes import byref, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import cast

from paceline import compiled
from paceline.drafting.evidence import chance_signal
from paceline.drafting.options import whole
from paceline.drafting.speculation import (
    AGREED,
    CONTESTED,
    MOST_TOKENS,
    MOST_UNKNOWN,
    NOTHING,
    UNKNOWN,
    Limits,
    Speculation,
    signal,
)
from paceline.drafting.suffix_index import SuffixIndex, TokenIndex
from paceline.errors import ResourceError

_SOURCES = compiled.Sources(
    name="suffix",
    folder=Path(__file__).parent,
    files=("suffix_index.c", "suffix_index.h", "suffix_walks.h", "ngram_table.h"),
    flags=("-O2", "-ffp-contract=off"),
    abi=("paceline_suffix_abi", 4),
)
_MOST_PLACES = 64
"""Room that the C code has for places."""


class _Table(ctypes.Structure):
    _fields_ = (*((name, c_void_p) for name in ("starts", "checks", "tokens", "chances")), ("orders", c_int32))


class _Query(ctypes.Structure):
    _fields_ = (
        *((name, c_double) for name in ("factor", "offset", "min_prob", "contested", "agreed", "past_weight", "unknown")),
        ("end_ids", c_void_p),
        ("table", c_void_p),
        *((name, c_int32) for name in ("num_end_ids", "max_match", "max_places", "tree", "most_unknown")),
    )


class _Found(ctypes.Structure):
    _fields_ = (
        ("confidences", c_double * MOST_TOKENS),
        ("chances", c_double * MOST_TOKENS),
        ("score", c_double),
        ("tokens", c_int32 * MOST_TOKENS),
        ("parents", c_int32 * MOST_TOKENS),
        ("count", c_int32),
        ("matched", c_int32),
    )


@cache
def load_library() -> ctypes.CDLL | str:
    """The compiled index, or the reason why there is none."""
    library = compiled.load(_SOURCES, ctypes.PyDLL)
    if isinstance(library, str):
        return library
    for name, result, arguments in (
        ("open", c_void_p, [c_int]),
        ("close", None, [c_void_p]),
        ("length", c_int64, [c_void_p]),
        ("bytes", c_int64, [c_void_p]),
        ("extend", c_int, [c_void_p, c_void_p, c_int64]),
        ("end_sequence", c_int, [c_void_p]),
        ("drop_to", None, [c_void_p, c_int64]),
        ("search", c_int, [c_void_p, c_void_p, c_void_p, c_int, c_double, c_void_p]),
        ("vote", None, [c_void_p, c_void_p, c_void_p, c_int, c_void_p]),
        ("look", c_int, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int, c_void_p]),
    ):
        function = getattr(library, f"paceline_suffix_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def open_index(table_bits: int = 13) -> TokenIndex:
    """An empty index, compiled where that is possible. table_bits: the chains' heads take 2^table_bits * 12 bytes (Python: 24)."""
    library = load_library()
    return SuffixIndex(table_bits) if isinstance(library, str) else NativeIndex(library, table_bits)


class NativeIndex(TokenIndex):
    """The index in C. Raises ResourceError where memory runs out."""

    def __init__(self, library: ctypes.CDLL, table_bits: int) -> None:
        handle = library.paceline_suffix_open(table_bits)
        if handle is None:
            raise ResourceError(f"suffix index: no memory for {12 << table_bits} bytes; lower store_tokens")
        self._handle: int = handle
        self._library = library
        self._look = library.paceline_suffix_look
        self._limits: Limits | None = None
        self._query, self._ends, self._found = _Query(), array("i"), _Found()
        self._chances = cast("Sequence[float]", self._found.chances)
        self._table = _Table()
        self._query_at, self._found_at = byref(self._query), byref(self._found)
        weakref.finalize(self, library.paceline_suffix_close, handle)

    def __len__(self) -> int:
        return int(self._library.paceline_suffix_length(self._handle))

    def extend(self, new: Sequence[int]) -> None:
        values = array("i", new)
        address, count = values.buffer_info()
        self._check(self._library.paceline_suffix_extend(self._handle, address, count))

    def end_sequence(self) -> None:
        self._check(self._library.paceline_suffix_end_sequence(self._handle))

    def drop_to(self, num_tokens: int) -> None:
        self._library.paceline_suffix_drop_to(self._handle, num_tokens)

    def look(self, new: Sequence[int], past: NativeIndex, limits: Limits, max_tokens: int) -> tuple[int, int]:
        # All in one call, and what was found stays in C until it is asked for: after a forward pass no cache holds any of this
        # code, and each further step of it would cost more than the search.
        if self._limits is not limits:
            self._prepare(limits)
        values = array("i", new)
        address, count = values.buffer_info()
        packed = self._look(self._handle, address, count, past._handle, self._query_at, max_tokens, self._found_at)
        if packed <= 0:
            self._check(packed + 1)
            return 0, 0
        if limits.tree:
            return packed & 0xFF, chance_signal(packed >> 8)
        return packed & 0xFF, signal(packed >> 10, (packed >> 8 & 3) - 1)

    def chances(self, count: int) -> Sequence[float]:
        return self._chances

    def proposal(self, most: int = MOST_TOKENS) -> Speculation:
        return self._unpack(most)

    def search(self, text: NativeIndex, limits: Limits, max_tokens: int, best: Speculation = NOTHING) -> Speculation:
        if text._limits is not limits:
            text._prepare(limits)
        search = self._library.paceline_suffix_search
        if not search(self._handle, text._handle, text._query_at, max_tokens, best.score, text._found_at):
            return best
        return text._unpack()

    def vote(self, past: NativeIndex, limits: Limits, max_tokens: int) -> Speculation:
        if self._limits is not limits:
            self._prepare(limits)
        self._library.paceline_suffix_vote(self._handle, past._handle, self._query_at, max_tokens, self._found_at)
        return self._unpack() if self._found.count else NOTHING

    def _unpack(self, most: int = MOST_TOKENS) -> Speculation:
        found = self._found
        count = min(found.count, most)
        parents = tuple(found.parents[:count]) if self._query.tree else None
        tokens, shares, chances = (tuple(part[:count]) for part in (found.tokens, found.confidences, found.chances))
        return Speculation(tokens, parents, shares, chances, found.score, found.matched)

    def memory_bytes(self) -> int:
        return int(self._library.paceline_suffix_bytes(self._handle))

    def _prepare(self, limits: Limits) -> None:
        """Write the limits down as C wants them. They lie with the text that is searched for, since an index may serve many."""
        whole("max_places", limits.max_places, 1, _MOST_PLACES)
        self._limits, self._ends = limits, array("i", sorted(limits.end_ids))
        address, count = self._ends.buffer_info()
        query = self._query
        query.factor, query.offset, query.min_prob = limits.factor, limits.offset, limits.min_prob
        query.contested, query.agreed, query.past_weight = CONTESTED, AGREED, limits.past_weight
        query.unknown, query.most_unknown = UNKNOWN, MOST_UNKNOWN
        query.end_ids, query.num_end_ids = address, count
        query.table = self._table_of(limits)
        query.max_match, query.max_places, query.tree = limits.max_match, limits.max_places, limits.tree

    def _table_of(self, limits: Limits) -> int | None:
        """Address of the limits' table as C reads it, whose arrays the limits keep alive."""
        table = limits.table
        if table is None:
            return None
        for name in ("starts", "checks", "tokens", "chances"):
            setattr(self._table, name, getattr(table, name).ctypes.data)
        self._table.orders = table.orders
        return ctypes.addressof(self._table)

    def _check(self, done: int) -> None:
        if not done:
            raise ResourceError(f"suffix index: no memory beyond {self.memory_bytes()} bytes; lower store_tokens")

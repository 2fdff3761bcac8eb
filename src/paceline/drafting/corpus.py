"""A corpus of token ids on disk that can be searched by context: the store of REST (2311.08252).

REST sorts suffixes and searches once for every length of context. Here positions are sorted by the tokens *before* them, read
backwards, so that one search finds the longest context and all its places lie side by side (ours). Both arrays are mapped into
memory, not loaded; ids are 32 bits wide, so that any vocabulary fits.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from paceline.drafting.speculation import BREAK, Place, Tokens
from paceline.errors import CacheError, OptionError
from paceline.models.base import Tokenizer

DEPTH = 16
"""Tokens of context by which positions are sorted; a power of two."""
_FORMAT = 1


def build_corpus(files: Sequence[Path], tokenizer: Tokenizer, out: Path) -> int:
    """Tokenise text files and write a corpus folder; returns its number of tokens.

    A `.jsonl` file holds one document a line, in the field `text`; any other file is one document of UTF-8 text. An existing corpus
    at `out` is replaced once the new one is complete. Raises OptionError for unreadable or empty input, and for an `out` that is
    something else.
    """
    return write_corpus((tokenizer.encode(text, add_special=False) for file in files for text in _documents(file)), out)


def _documents(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            yield from (str(json.loads(line)["text"]) for line in text.splitlines() if line.strip())
        else:
            yield text
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"corpus file {file}: {error}; give UTF-8 text, or .jsonl with a field 'text'") from error


def write_corpus(documents: Iterable[Sequence[int]], out: Path) -> int:
    """Write a corpus folder of documents given as token ids; returns its number of tokens. Raises OptionError, CacheError."""
    if out.exists() and not (out / "corpus.json").is_file():
        raise OptionError(f"out = {str(out)!r}: exists and is no corpus; name a new folder")
    tokens = array("i")
    for document in documents:
        tokens.extend(document)
        tokens.append(BREAK)
    values = np.frombuffer(tokens, dtype=np.int32) if tokens else np.zeros(0, dtype=np.int32)
    if not (values != BREAK).any():
        raise OptionError("corpus: the files hold no text; name files with text")
    summary = {"format": _FORMAT, "num_tokens": len(values), "largest_id": int(values.max(initial=BREAK))}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            np.save(folder / "tokens.npy", values)
            np.save(folder / "order.npy", context_order(values))
            (folder / "corpus.json").write_text(json.dumps(summary), encoding="utf-8")
            shutil.rmtree(out, ignore_errors=True)
            os.replace(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise CacheError(f"corpus {out}: cannot be written ({error}); free space, or name another folder") from error
    return len(values)


def context_order(tokens: np.ndarray) -> np.ndarray:
    """Positions with a token at them, sorted by the `DEPTH` tokens before them, nearest first (prefix doubling). int64 [P]."""
    length = len(tokens)
    rank = np.zeros(length, dtype=np.int64)  # of the context before each position; 0 where there is none
    rank[1:] = tokens[:-1].astype(np.int64) + 2
    width = 1
    while width < DEPTH:
        farther = np.zeros(length, dtype=np.int64)
        farther[width:] = rank[:-width] if length > width else 0
        span = int(farther.max(initial=0)) + 1
        _, rank = np.unique(rank * span + farther, return_inverse=True)
        width *= 2
    order = np.argsort(rank, kind="stable")
    kept: np.ndarray = order[(tokens[order] != BREAK) & (order > 0)]
    return kept


class Corpus:
    """A corpus folder, open for search."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """Raises OptionError when there is no corpus, or one of another vocabulary; CacheError when it is damaged."""
        try:
            summary = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(f"corpus {str(folder)!r}: not found or unreadable; make one with `paceline corpus build`") from error
        try:
            self._arrays = [np.load(folder / name, mmap_mode="r") for name in ("tokens.npy", "order.npy")]
            intact = summary["format"] == _FORMAT and len(self._arrays[0]) == summary["num_tokens"]
            largest = int(summary["largest_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"corpus {folder}: damaged ({error}); build it again") from error
        if not intact:
            raise CacheError(f"corpus {folder}: damaged or of another version; build it again")
        if largest >= vocab_size:
            raise OptionError(f"corpus {folder}: holds token {largest}, the target knows {vocab_size}; build it with its tokenizer")
        self._tokens, self._order = (memoryview(values) for values in self._arrays)

    @property
    def tokens(self) -> Tokens:
        """All documents, each ended by `BREAK`."""
        return self._tokens

    def places(self, tail: array[int], limit: int) -> Iterator[list[Place]]:
        """The places of the longest context at the end of `tail`, spread evenly when there are more than `limit`."""
        wanted = list(reversed(tail[-DEPTH:]))
        at = bisect_left(self._order, wanted, key=self._context)
        near = [self._context(self._order[i]) for i in (at - 1, at) if 0 <= i < len(self._order)]
        matched = max((_agreement(context, wanted) for context in near), default=0)
        if not matched:
            return
        first = bisect_left(self._order, wanted[:matched], key=lambda i: self._context(i)[:matched])
        last = bisect_right(self._order, wanted[:matched], lo=first, key=lambda i: self._context(i)[:matched])
        step = max(1, -(-(last - first) // limit))
        yield [Place(matched, self._order[i]) for i in range(first, last, step)]

    def _context(self, position: int) -> list[int]:
        """The tokens before a position, nearest first."""
        return self._tokens[max(0, position - DEPTH) : position].tolist()[::-1]

    def memory_bytes(self) -> int:
        """Bytes of the mapped files (the system keeps in memory what is used)."""
        return sum(int(values.nbytes) for values in self._arrays)


def _agreement(context: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(context, wanted, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(context), len(wanted)))

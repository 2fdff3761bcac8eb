"""A tokenizer as a code of bytes, so that two of them can be compared and translated whatever their spelling conventions (ours).

Byte-level BPE writes a space as Ġ and bytes as letters of its own alphabet; SentencePiece writes ▁ and <0xNN>, and may put a space
before a text. Here an id stands for the bytes that it adds in the middle of a text, and a special token for its name.
"""

from __future__ import annotations

from collections.abc import Iterable

from paceline.errors import OptionError
from paceline.models.base import Tokenizer

_SPACE = "▁"
_ANCHOR = "\n"
"""Stands before a text that is encoded as the continuation of another, where a beginning would get a space."""
_PROBES = 64
"""Entries of the vocabulary on which the code is tried out."""


class Vocabulary:
    """What each id of a tokenizer means."""

    def __init__(self, tokenizer: Tokenizer, model: str) -> None:
        """Raises OptionError when texts are not the bytes of their tokens. model: whose tokenizer it is, for the message."""
        self._tokenizer = tokenizer
        entries = tokenizer.token_strings()
        self.spellings = [None if entry is None else _bytes_of(tokenizer, i, entry) for i, entry in enumerate(entries)]
        """Bytes of each id; None for special tokens and unused ids."""
        self.specials = {i: entry for i, entry in enumerate(entries) if entry is not None and self.spellings[i] is None}
        """Names of the special tokens."""
        self.end_ids = tokenizer.end_ids
        probes = self._probes()
        encoded = [(text.encode(), self.join(tokenizer.encode(text, add_special=False))) for text in probes]
        kept = sum(found in (text, b" " + text) for text, found in encoded)
        if 2 * kept < len(encoded) or not encoded:
            raise OptionError(
                f"tokenizer of {model!r}: its texts are not the bytes of its tokens ({kept} of {len(encoded)} entries come back), "
                "so that it cannot be translated; use a draft without a model (ngram), or a model of the target's tokenizer"
            )
        self.adds_space = 2 * sum(found == b" " + text for text, found in encoded) > kept
        """Whether a text gets a space before it that it does not have."""
        self.begin = _begin_ids(tokenizer, probes[0])
        """Ids that open a text, such as a begin token."""

    def join(self, ids: Iterable[int]) -> bytes:
        """Text of ids in the middle of a text, as UTF-8 bytes."""
        return b"".join(map(self.spell, ids))

    def spell(self, token: int) -> bytes:
        """Bytes of one id; the name of a special token, nothing for ids that are not in use."""
        known = self.spellings[token] if token < len(self.spellings) else None
        return known if known is not None else self.specials.get(token, "").encode()

    def encode(self, text: str) -> list[int]:
        """Ids of a whole text, those that open it included."""
        return [*self.begin, *self._tokenizer.encode(text, add_special=False)]

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text that continues another one: nothing is put before it."""
        if self.adds_space:
            anchor = self._tokenizer.encode(_ANCHOR, add_special=False)
            ids = self._tokenizer.encode(_ANCHOR + text, add_special=False)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return self._tokenizer.encode(text, add_special=False)

    def names_in(self, other: Vocabulary) -> dict[int, str]:
        """What special tokens of this vocabulary are called in another one.

        Those of one name in both, and the two end tokens where each has one only.
        """
        known = set(other.specials.values())
        names = {token: name for token, name in self.specials.items() if name in known}
        if len(self.end_ids) == len(other.end_ids) == 1:
            (end,), (its,) = self.end_ids, other.end_ids
            if its in other.specials:
                names[end] = other.specials[its]
        return names

    def _probes(self) -> list[str]:
        """Some entries that are whole characters and begin with no space."""
        usable = [spelling for spelling in self.spellings if spelling and not spelling.startswith(b" ")]
        texts = (spelling.decode(errors="ignore") for spelling in usable[:: max(1, len(usable) // _PROBES)])
        return [text for text in texts if text]


def _bytes_of(tokenizer: Tokenizer, token: int, entry: str) -> bytes | None:
    known = tokenizer.token_bytes(token)
    if known is None:
        if token in tokenizer.byte_fallback_ids:
            return bytes([int(entry[3:5], 16)])  # <0xNN>
        known = entry.replace(_SPACE, " ").encode()
    return known or None


def _begin_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    whole, bare = tokenizer.encode(text), tokenizer.encode(text, add_special=False)
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])


def shared_ids(target: Vocabulary, draft: Vocabulary, target_size: int, draft_size: int) -> list[tuple[int, int]]:
    """Pairs (target id, draft id) of one meaning: the intersection of the vocabularies (TLI, 2502.05202, section 4).

    Each id is in one pair at most. Of several ids with the same bytes the highest counts, which is a piece rather than a byte.
    Ids from target_size and draft_size on, rows that a model lacks, are left out.
    """
    names = draft.names_in(target)
    meanings: dict[bytes | str, int] = {}
    for token in range(min(draft_size, len(draft.spellings))):
        meaning = draft.spellings[token] or names.get(token)
        if meaning is not None:
            meanings[meaning] = token
    pairs: dict[int, int] = {}
    for token in range(min(target_size, len(target.spellings))):
        match = meanings.get(target.spellings[token] or target.specials.get(token, ""))
        if match is not None:
            pairs[match] = token
    return sorted((token, match) for match, token in pairs.items())

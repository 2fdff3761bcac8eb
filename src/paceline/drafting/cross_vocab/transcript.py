"""A sequence's committed text in the draft's ids, kept up to date as the target's tokens come in.

Source: universal assisted generation in transformers (a window of text is encoded again and aligned with the earlier ids). Ours:
tokens are read as bytes, which is exact across tokenizers, and an alignment is believed only if the lengths of the texts agree.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from paceline.drafting.cross_vocab.alignment import align
from paceline.drafting.cross_vocab.vocabulary import Vocabulary

_LOOK_BEHIND_CHARS = 48
_LOOK_BEHIND_IDS = 16


class Transcript:
    """`ids` are the draft's encoding of all text that was read and encoded so far."""

    def __init__(self, target: Vocabulary, draft: Vocabulary) -> None:
        self._target = target
        self._draft = draft
        self.ids: list[int] = list(draft.begin)
        self.num_read = 0
        """Target tokens that were read."""
        self.num_encoded = 0
        """Those of them that `ids` cover."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        """What `ids` stand for."""
        self._fresh: list[str] = []
        """Read, not encoded."""

    @property
    def in_character(self) -> bool:
        """Whether the tokens that were read end within a character: nothing sensible can follow in another vocabulary."""
        return bool(self._utf8.getstate()[0])

    def read(self, tokens: Sequence[int]) -> None:
        """Take note of the target's tokens from `num_read` on. Cheap: nothing is encoded. tokens: all of the sequence."""
        start = self.num_read
        if start == 0:
            begin = self._target.begin
            start = len(begin) if tuple(tokens[: len(begin)]) == begin else 0
        added = self._target.join(tokens[start:])
        if self.num_read == 0 and self._target.adds_space:
            added = added.removeprefix(b" ")
        self.num_read = len(tokens)
        self._fresh.append(self._utf8.decode(added))

    def catch_up(self, withdraw: Callable[[int], object]) -> None:
        """Encode what was read. withdraw: called with a length before the ids from there on are replaced.

        Apart from the first time, the end of the old text is encoded again with the new one, a window long enough for tokenizers to
        fall into step; where that fails, the whole text is.
        """
        piece = "".join(self._fresh)
        self._fresh = []
        self.num_encoded = self.num_read
        if not piece:
            return
        kept, follow = self._follow_on(piece) or self._begin_anew(piece)
        self._text += piece
        if kept < len(self.ids):
            withdraw(kept)
        self.ids[kept:] = follow

    def _follow_on(self, piece: str) -> tuple[int, list[int]] | None:
        """(kept, follow) such that `ids[:kept] + follow` is the encoding of all text, from a window; None where that fails."""
        start = self._window_start()
        if start == 0:
            return None
        old = self.ids[-_LOOK_BEHIND_IDS:]
        found = align(old, self._draft.encode_inside(self._text[start:] + piece))
        if found is None:
            return None
        follow = found.replace + found.append
        dropped = self._draft.join(old[len(old) - found.discard :])
        in_step = len(dropped) + len(piece.encode()) == len(self._draft.join(follow))
        return (len(self.ids) - found.discard, follow) if in_step else None

    def _begin_anew(self, piece: str) -> tuple[int, list[int]]:
        """As `_follow_on`, from the beginning of the text."""
        whole = self._draft.encode(self._text + piece)
        kept = 0
        for ours, theirs in zip(self.ids, whole, strict=False):
            if ours != theirs:
                break
            kept += 1
        return kept, whole[kept:]

    def _window_start(self) -> int:
        """Where the window begins: at a space behind a letter if there is one near, since no common tokenizer merges across it."""
        start = max(0, len(self._text) - _LOOK_BEHIND_CHARS)
        middle = len(self._text) - _LOOK_BEHIND_CHARS // 2
        for i in range(start + 1, middle):
            if self._text[i] == " " and self._text[i - 1].isalnum() and self._text[i + 1].isalnum():
                return i
        return start

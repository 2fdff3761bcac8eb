"""Drafting through text: the draft's tokens become text, the text becomes tokens of the target, which are compared one by one.

Sources: universal assisted generation (`uag`, as in transformers); string-level exact match (`slem`, 2502.05202, section 3). Both
are point-mass drafts to the verification: an accepted token is the target's own, so that they are lossless at any temperature.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from paceline.drafting.base import KeepDrafting, SequenceView
from paceline.drafting.cross_vocab.base import TranslatedDrafter, TranslatedOptions, TranslatedSession
from paceline.execution.base import Runner
from paceline.records import Draft, DraftFeatures


class SlemDrafter(TranslatedDrafter):
    """`slem:PATH`: text drawn from the draft (at temperature 0 its most probable text), matched token by token.

    Cost: a forward of the draft for each of its tokens, and two encodings of a few words a round (some tens of microseconds).
    Memory: the draft's weights and cache, and the spellings of both vocabularies.
    """

    options_type: type[Any] = TranslatedOptions

    def drafting_runner(self) -> Runner:
        return self.runner

    @cached_property
    def names(self) -> dict[int, str]:
        """What special tokens of the draft are called in the target; those without a name there end a draft."""
        return self.draft_vocabulary.names_in(self.target_vocabulary)

    @cached_property
    def _stops(self) -> frozenset[int]:
        draft = self.draft_vocabulary
        return draft.end_ids | (draft.specials.keys() - self.names.keys())

    def stop_ids(self, view: SequenceView) -> frozenset[int]:
        return self._stops

    def open(self, view: SequenceView) -> StringSession:
        return StringSession(self, view)

    def spell(self, token: int) -> bytes | None:
        """What a draft token says to the target; None for a special token that it does not have."""
        if token in self.draft_vocabulary.specials:
            return self.names[token].encode() if token in self.names else None
        return self.draft_vocabulary.spell(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class UagOptions:
    """`uag` has no settings."""

    temperature: ClassVar[float] = 0.0


class UagDrafter(SlemDrafter):
    """`uag:PATH`: as `slem`, with the draft's most probable text at any temperature."""

    options_type = UagOptions


class StringSession(TranslatedSession):
    """Drafts text for one sequence."""

    _drafter: SlemDrafter

    def translated(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        ratio = self.ratio

        def keep(features: DraftFeatures) -> bool:
            """A draft id is not a token: the controller is told which token it helps to spell."""
            position = min(max(1, int(features.position / ratio)), num_tokens)
            return keep_drafting(replace(features, position=position))

        drafted = self.draft_ids(max(1, round(num_tokens * ratio)), keep)
        pieces: list[bytes] = []
        for token in drafted.tokens:
            piece = self._drafter.spell(token)
            if piece is None:
                break
            pieces.append(piece)
        tokens = self._tokens(b"".join(pieces))[:num_tokens]
        sizes = [len(self._drafter.target_vocabulary.spell(token)) for token in tokens]
        confidences = spread(drafted.confidences, [len(piece) for piece in pieces], sizes)
        return Draft(tuple(tokens), confidences=confidences, drafter=self._drafter.name)

    def _tokens(self, spelled: bytes) -> list[int]:
        """The target's ids of a text behind the committed one, up to an unfinished character, an end or an id without a row."""
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(spelled)
        tokens: list[int] = []
        for token in self._drafter.target_vocabulary.encode_inside(text) if text else ():
            if token >= self._drafter.vocab_size:
                break
            tokens.append(token)
            if token in self._view.end_ids:
                break
        return tokens


def spread(confidences: Sequence[float], sizes: Sequence[int], target_sizes: Sequence[int]) -> tuple[float, ...]:
    """Confidence of each target token: the product of those of the draft tokens that begin in it, 1 where none does.

    confidences and sizes (bytes): of the draft's tokens; target_sizes: bytes of the target's tokens of the same text.
    """
    found: list[float] = []
    taken = begun = end = 0
    for size in target_sizes:
        end += size
        confidence = 1.0
        while taken < len(sizes) and begun < end:
            confidence *= confidences[taken]
            begun += sizes[taken]
            taken += 1
        found.append(confidence)
    return tuple(found)

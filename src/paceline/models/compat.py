"""Do two models speak the same ids? A draft's token ids only mean something to a target with the same tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.models.base import Tokenizer

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  leading, doubled  and trailing spaces \t\n\n\nblank lines\r\n",
    "Numbers: 0 7 42 1999 3.14159 1,000,000 -5e-10 0xFF",
    "def area(radius: float) -> float:\n    return 3.14 * radius ** 2  # round\n",
    '{"key": [1, 2, {"nested": null}], "text": "a\\nb"}',
    "Don't, won't, it's; I'LL — “quoted” … (maybe?)",
    "Größe, naïve, Ελληνικά, русский, العربية, हिन्दी, 日本語、中文, 한국어",
    "😀 👩‍👩‍👧 é e\u0301 ½ ² \u200b \u00a0",
)
"""Texts that tokenizers with one vocabulary but other splitting or normalising rules encode differently."""


@dataclass(frozen=True, slots=True)
class Compatibility:
    """Outcome of a comparison."""

    same: bool
    """True when every id stands for the same entry and texts are split alike: drafts need no translation."""
    shared: int
    """Ids that stand for the same entry in both."""
    message: str
    """One line for the user; says what to do where they differ."""


def compare_tokenizers(target: Tokenizer, draft: Tokenizer, draft_name: str = "draft") -> Compatibility:
    """Compare vocabularies entry by entry, and encodings on PROBES.

    Ids beyond the shorter vocabulary and unused ids are taken for padding and ignored. draft_name: for the message.
    """
    target_strings, draft_strings = target.token_strings(), draft.token_strings()
    pairs = list(zip(target_strings, draft_strings, strict=False))
    shared = sum(ours == theirs and ours is not None for ours, theirs in pairs)
    differing = sum(ours != theirs and ours is not None and theirs is not None for ours, theirs in pairs)
    if differing or not shared:
        sizes = f"{len(draft_strings)} vs {len(target_strings)} entries"
        percent = 100 * shared / max(1, len(target_strings))
        return Compatibility(
            False,
            shared,
            f"draft {draft_name!r} has another tokenizer than the target ({sizes}, {percent:.0f} % shared): "
            f"its ids mean other text; name it as tli:{draft_name}, slem:{draft_name} or uag:{draft_name}, which translate, or "
            "use a draft of the same family",
        )
    for text in PROBES:
        if target.encode(text, add_special=False) != draft.encode(text, add_special=False):
            return Compatibility(
                False,
                shared,
                f"draft {draft_name!r} has the target's vocabulary but splits text otherwise (such as {text[:24]!r}): "
                f"its drafts would rarely be accepted; name it as slem:{draft_name} or uag:{draft_name}, which go through text, or "
                "use a draft of the same family",
            )
    return Compatibility(True, shared, f"draft {draft_name!r} shares the target's tokenizer ({shared} entries)")

"""Several model-free drafters in one tree (SpecInfer's merge, 2305.09781, with other sources; ours).

`merged:A|B` joins what A and B propose: one pass of the target then tests all of it. Exact whatever is joined, since every part is
point-mass. With `+tree` the parts take their own tree forms where they have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.drafting import registry
from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.trees import best_path_first, merge, path_scores, select
from paceline.errors import OptionError
from paceline.records import Draft, Outlook, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedOptions:
    """`merged` has no settings of its own; its parts have their defaults."""


class MergedDrafter(Drafter):
    """Joins the drafts of its parts."""

    options_type = MergedOptions

    def __init__(self, parts: Sequence[Drafter], name: str = "merged") -> None:
        self.name = name
        self.parts = list(parts)
        self.wants_logits = any(part.wants_logits for part in parts)

    @classmethod
    def build(cls, spec: DrafterSpec, _: MergedOptions, context: DrafterContext) -> MergedDrafter:
        kinds = spec.argument.split("|")
        for kind in kinds:
            entry = registry.TABLE.get(kind)
            if entry is None or entry.samples or entry.argument:
                able = ", ".join(sorted(k for k, e in registry.TABLE.items() if not e.samples and not e.argument))
                raise OptionError(f"draft = '{spec}': cannot merge {kind!r}; parts that can be merged: {able}")
        names = [f"{kind}+tree" if spec.tree and registry.TABLE[kind].tree else kind for kind in kinds]
        return cls([registry.create(name, {}, context) for name in names], str(spec))

    def open(self, view: SequenceView) -> MergedSession:
        return MergedSession(self, view)

    def memory_bytes(self) -> int:
        return sum(part.memory_bytes() for part in self.parts)

    def finish_request(self, tokens: Sequence[int], num_prompt: int) -> None:
        for part in self.parts:
            part.finish_request(tokens, num_prompt)

    def forget(self) -> None:
        for part in self.parts:
            part.forget()


class MergedSession(DraftSession):
    """The parts' sessions of one sequence."""

    def __init__(self, drafter: MergedDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._parts = [part.open(view) for part in drafter.parts]

    def outlook(self, max_tokens: int) -> Outlook:
        parts = [part.outlook(max_tokens) for part in self._parts]
        together = min(max_tokens, sum(outlook.available for outlook in parts))
        return Outlook(self._drafter.name, together, max(outlook.signal for outlook in parts))

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        drafts = [part.propose(num_tokens, keep_drafting) for part in self._parts]
        union = merge([draft for draft in drafts if draft.tokens], self._drafter.name, num_tokens)
        return select(union, best_path_first(union.parents or (), path_scores(union.parents or (), union.confidences)))

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        if verdict is not None and target_logits is not None:
            kept = list(verdict.rows)
            # Rows of the best path lie in front (`best_path_first`), where no copy is needed.
            target_logits = target_logits[: len(kept)] if kept[-1] == len(kept) - 1 else target_logits[kept]
        for part, drafter in zip(self._parts, self._drafter.parts, strict=True):
            part.observe(None, target_logits if drafter.wants_logits else None)

    def memory_bytes(self) -> int:
        return sum(part.memory_bytes() for part in self._parts)

    def close(self) -> None:
        for part in self._parts:
            part.close()

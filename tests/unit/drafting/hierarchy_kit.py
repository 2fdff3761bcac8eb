"""Hierarchies of drafters over toy models."""

from __future__ import annotations

from paceline.drafting.base import DrafterContext
from paceline.drafting.hierarchy import CascadeDrafter
from paceline.drafting.registry import create
from toys import Language, ToyRunner, noisy_language

VOCAB = 5
SPECS = {
    1: ("cascade:ngram>model:0.4", "cascade:model:0.9>model:0.4", "cascade:suffix+tree>model:0.4", "cascade:stand>model:0.4"),
    2: (
        "cascade:ngram>model:0.9>model:0.4",
        "cascade:model:0.9+tree>model:0.7>model:0.4",
        "cascade:stand+tree>model:0.9>model:0.4",
    ),
    3: ("cascade:token_recycling>model:1.2>model:0.9>model:0.4", "cascade:model:1.5>model:1.2>model:0.9>model:0.4"),
}
"""By depth; a model's name is the noise between it and the target."""


def make(spec: str, target: Language, vocab: int = VOCAB, *, max_context: int = 512, **options: object) -> CascadeDrafter:
    def open_model(noise: str) -> ToyRunner:
        # Noises of their own: along one direction a level lies between its neighbours, and some rejections never happen.
        return ToyRunner(noisy_language(target, float(noise), seed=round(10 * float(noise))), vocab, max_context=max_context)

    context = DrafterContext(vocab_size=vocab, max_context=512, open_model=open_model)
    made = create(spec, {"controller": "fixed", **options}, context)
    assert isinstance(made, CascadeDrafter)
    return made

"""A mapping whose values are loaded each time they are asked for: a model's tensors, without the model's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def stored_name(name: str, stored: Iterable[str]) -> str:
    """The name under which a parameter is stored: a tied output head is stored as the embedding."""
    return EMBEDDING if name == HEAD and HEAD not in stored else name


class LazyTensors(Mapping[str, "torch.Tensor"]):
    """Tensors under Hugging Face's names; `load(stored name)` runs at every access and nothing is kept.

    A checkpoint without `lm_head.weight` has a tied head: both names then give the embedding.
    """

    def __init__(self, stored: Iterable[str], load: Callable[[str], torch.Tensor]) -> None:
        self._stored = tuple(stored)
        self._load = load
        tied = EMBEDDING in self._stored and HEAD not in self._stored
        self._names = dict.fromkeys((*self._stored, HEAD) if tied else self._stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._load(stored_name(name, self._stored))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

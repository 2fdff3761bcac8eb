"""One budget for weights, keys and values, buffers and graphs (ours)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.errors import ResourceError

GIB = 1 << 30
_RESERVE = GIB
"""Graphs, compiled kernels, the library's workspaces, and the temporary tensors of long prompts."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of one device, and who gets them."""

    total: int
    """What this model may use."""
    weights: int
    buffers: int
    """Activations and the parts of attention's sums."""
    cache: int

    @property
    def used(self) -> int:
        """Bytes of weights, buffers, and keys and values."""
        return self.weights + self.buffers + self.cache

    def __str__(self) -> str:
        rest = self.total - self.used
        parts = (("weights", self.weights), ("buffers", self.buffers), ("keys and values", self.cache), ("reserve", rest))
        return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts) + f" of {self.total / GIB:.2f} GiB"


def plan(total: int, weights: int, buffers: int, page_bytes: int, wanted_pages: int, least_pages: int) -> Budget:
    """Give the cache what is left after weights, buffers and a reserve, `wanted_pages` at most.

    Raises ResourceError, with the whole budget, when fewer than `least_pages` fit (a sequence of full length).
    """
    left = total - weights - buffers - _RESERVE
    pages = min(wanted_pages, left // page_bytes)
    if pages < least_pages:
        sequence = least_pages * page_bytes
        parts = {"weights": weights, "buffers": buffers, "reserve": _RESERVE, "keys and values of one sequence": sequence}
        listed = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items())
        raise ResourceError(
            f"memory: {listed} make {sum(parts.values()) / GIB:.2f} GiB, and {total / GIB:.2f} GiB are free; "
            "lower max_context, choose precision int8 or int4, or leave the draft model out"
        )
    return Budget(total, weights, buffers, pages * page_bytes)


class Holder(Protocol):
    """A runner that holds memory of a device."""

    budget: Budget

    @property
    def device(self) -> str: ...

    @property
    def is_offloaded(self) -> bool: ...

    def offload(self) -> int: ...


_holders: weakref.WeakSet[Any] = weakref.WeakSet()


def register(holder: Holder) -> None:
    """Count a runner in, for as long as it lives."""
    _holders.add(holder)


def unregister(holder: Holder) -> None:
    """Its memory was given back."""
    _holders.discard(holder)


def held(device: str) -> int:
    """Bytes that all runners of this process hold on a device."""
    return sum(h.budget.used for h in _holders if h.device == device)


def make_room(asking: Holder) -> int:
    """Offload the weights of the smallest runner of the same device that is smaller than the asking one, most probably a draft.

    A draft never drives its target out: it is left out of the request instead. Returns the bytes, 0 for none.
    """
    near = [h for h in _holders if h is not asking and h.device == asking.device and not h.is_offloaded]
    smaller = [h for h in near if h.budget.weights < asking.budget.weights]
    return int(min(smaller, key=lambda h: h.budget.weights).offload()) if smaller else 0

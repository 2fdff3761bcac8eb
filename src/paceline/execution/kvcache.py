"""One sequence's keys and values for the torch runners: written behind the committed length, taken back by setting it.

Slot = committed length + index in the segment; position = committed length + depth (+ shift, in a cache that keeps only some
rows). On a chain both agree and `accept` only
sets the length; on a tree the accepted rows are moved to consecutive slots unless they already are (methods of tree
verification: SpecInfer, arXiv 2305.09781, section 4; the in-place rule is ours).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.errors import OptionError

_FIRST_CAPACITY = 256


class KVCache:
    """Keys and values of one sequence: per layer [Hkv, capacity, D], growing geometrically. A `SequenceHandle`.

    Buffers are made at a layer's first write, in that write's dtype, device, heads and head size.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        """max_length: no buffer is made larger than this many slots."""
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._max_length = max_length
        self._length = 0
        self._capacity = 0
        self._staged: list[int] = []
        self.shift = 0
        """Position less slot: above 0 in a cache that was gathered from a longer one."""
        self.windowed: set[int] = set()
        """Layers that were attended through a sliding window."""
        self.closed = False
        self.moved_rows = 0
        """Rows that `accept` had to move so far, over all layers: stays 0 on chains."""

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self._length

    def stage(self, parents: Sequence[int]) -> None:
        """Announce new tokens by their parents (-1: none): earlier uncommitted ones are forgotten, room is made."""
        self._staged = list(parents)
        need = self._length + len(parents)
        if need > self._capacity:
            self._capacity = min(max(need, 2 * self._capacity, _FIRST_CAPACITY), max(self._max_length, need))

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the staged tokens' keys and values of a layer, both [Hkv, T, D].

        Returns views over the committed prefix and the new tokens, [Hkv, length + T, D].
        """
        end = self._length + keys.shape[1]
        stored_keys = self._roomy(self._keys, layer, keys)
        stored_values = self._roomy(self._values, layer, values)
        stored_keys[:, self._length : end] = keys
        stored_values[:, self._length : end] = values
        return stored_keys[:, :end], stored_values[:, :end]

    def accept(self, rows: Sequence[int]) -> None:
        """Commit these staged rows, a root-to-leaf path, and forget the others. Raises OptionError for anything else."""
        rows = list(rows)
        previous = -1
        for row in rows:
            if not previous < row < len(self._staged) or self._staged[row] != previous:
                raise OptionError(f"rows = {rows}: not a root-to-leaf path of the last segment (parents {self._staged})")
            previous = row
        in_place = next((i for i, row in enumerate(rows) if row != i), len(rows))
        if in_place < len(rows):
            self._move(rows[in_place:], in_place)
        self._length += len(rows)
        self._staged = []

    def truncate(self, length: int) -> None:
        """Forget committed tokens from `length` on, and staged ones."""
        if not 0 <= length <= self._length:
            raise OptionError(f"length = {length}: a sequence of {self._length} tokens can be cut to 0 .. {self._length}")
        self._length = length
        self._staged = []

    def fork(self) -> KVCache:
        """A copy of the committed part."""
        copy = self._like(self._length)
        copy._capacity = self._capacity
        copy._keys = [None if k is None else self._copied(k, self._capacity) for k in self._keys]
        copy._values = [None if v is None else self._copied(v, self._capacity) for v in self._values]
        return copy

    def gather(self, rows: torch.Tensor) -> KVCache:
        """A cache of these committed rows only; see `Runner.gather`. rows: [K], or [layers, Hkv, K], int64."""
        copy = self._like(rows.shape[-1])
        copy._capacity = copy._length
        copy.shift = self.shift + self._length - copy._length
        last = torch.arange(self._length - copy._length, self._length)
        for layer in range(len(self._keys)):
            stored = self.committed(layer)
            if stored is not None:
                chosen = last if layer in self.windowed else rows if rows.dim() == 1 else rows[layer]
                copy._keys[layer], copy._values[layer] = (_pick(part, chosen) for part in stored)
        return copy

    def follow(self, whole: KVCache) -> None:
        """Append what `whole` has committed behind this cache's last position. Raises OptionError when there is less."""
        first = self._length + self.shift - whole.shift
        if first > whole.length:
            raise OptionError(f"sequence: has {whole.length} tokens, its copy has seen {first}; truncate the copy first")
        self.stage(range(-1, whole.length - first - 1))
        for layer in range(len(self._keys)):
            stored = whole.committed(layer)
            if stored is not None:
                self.write(layer, stored[0][:, first:], stored[1][:, first:])
        self._length += whole.length - first
        self._staged = []

    def close(self) -> None:
        """Release the buffers."""
        self._keys = [None] * len(self._keys)
        self._values = [None] * len(self._values)
        self._length = self._capacity = 0
        self._staged = []
        self.closed = True

    def committed(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Views of a layer's committed keys and values, [Hkv, length, D]; None before the layer's first write."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            return None
        return keys[:, : self._length], values[:, : self._length]

    def _like(self, length: int) -> KVCache:
        copy = KVCache(len(self._keys), self._max_length)
        copy._length, copy.shift, copy.windowed = length, self.shift, set(self.windowed)
        return copy

    def _roomy(self, buffers: list[torch.Tensor | None], layer: int, like: torch.Tensor) -> torch.Tensor:
        buffer = buffers[layer]
        if buffer is None:
            buffer = like.new_empty((like.shape[0], self._capacity, like.shape[2]))
        elif buffer.shape[1] < self._capacity:
            buffer = self._copied(buffer, self._capacity)
        buffers[layer] = buffer
        return buffer

    def _copied(self, buffer: torch.Tensor, capacity: int) -> torch.Tensor:
        """A buffer of this capacity with the same committed part."""
        copy = buffer.new_empty((buffer.shape[0], capacity, buffer.shape[2]))
        copy[:, : self._length] = buffer[:, : self._length]
        return copy

    @torch.inference_mode()
    def _move(self, rows: list[int], first: int) -> None:
        """Gather staged rows to the slots from length + first on. Rotations stay right: they belong to the position."""
        start = self._length + first
        for buffers in (self._keys, self._values):
            for buffer in buffers:
                if buffer is not None:
                    slots = torch.tensor(rows, device=buffer.device) + self._length
                    buffer[:, start : start + len(rows)] = buffer.index_select(1, slots)
                    self.moved_rows += len(rows)


def _pick(part: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of [Hkv, S, D], the same for all heads ([K]) or each head's own ([Hkv, K])."""
    rows = rows.to(part.device)
    if rows.dim() == 1:
        return part.index_select(1, rows)
    return part.gather(1, rows[..., None].expand(-1, -1, part.shape[2]))

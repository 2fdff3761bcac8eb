"""Memory that a pass reads from end to end, on large pages where the system has them.

Weights are streamed once a token, in one stretch and in the order of a pass: contiguous memory lets the prefetcher run across
matrices, large pages spare it the page walks. Of a cache of keys and values, a little of every region is read at a time.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from paceline.errors import ResourceError

_ALIGN = 64
_LARGE_PAGE = 2 << 20


class Arena:
    """Grows by appending; addresses stay valid as long as the arena lives."""

    def __init__(self, capacity: int) -> None:
        """capacity: upper bound in bytes; what is not used costs address space only. Raises ResourceError."""
        self._bytes = _large_pages(capacity + _LARGE_PAGE, "weights")
        self._used = 0

    def add(self, data: npt.NDArray[np.uint8]) -> int:
        """Copy an array in; returns its address (a multiple of 64)."""
        flat = np.ascontiguousarray(data).reshape(-1)
        self._bytes[self._used : self._used + flat.size] = flat
        address = int(self._bytes.ctypes.data) + self._used
        self._used += (flat.size + _ALIGN - 1) // _ALIGN * _ALIGN
        return address


def zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """As numpy's, on large pages where it fills some. Raises ResourceError."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < _LARGE_PAGE:
        return np.zeros(shape, dtype)
    return _large_pages(size, "keys and values").view(dtype).reshape(shape)


def _large_pages(size: int, purpose: str) -> npt.NDArray[np.uint8]:
    """Bytes from the start of a large page on. Private memory: what processes share is never on large pages by default."""
    try:
        memory = mmap.mmap(-1, size + 2 * _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError) as error:
        raise ResourceError(f"memory: no room for {size / 1e9:.1f} GB of {purpose}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # advice only
            memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _LARGE_PAGE
    return np.frombuffer(memory, np.uint8, count=size, offset=start)

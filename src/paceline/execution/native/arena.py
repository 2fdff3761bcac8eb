"""One stretch of memory for all weights, in the order in which a pass reads them, on large pages where the system has them.

Weights are streamed once a token: contiguous memory lets the prefetcher run across matrices, large pages spare it the page walks.
"""

from __future__ import annotations

import ctypes
import mmap
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
        try:
            self._memory = mmap.mmap(-1, capacity + 2 * _LARGE_PAGE)
        except (OSError, ValueError) as error:
            raise ResourceError(f"memory: no room for {capacity / 1e9:.1f} GB of weights") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # advice only
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._used = -self._base % _LARGE_PAGE

    def add(self, data: npt.NDArray[np.uint8]) -> int:
        """Copy an array in; returns its address (a multiple of 64)."""
        flat = np.ascontiguousarray(data).reshape(-1)
        place = np.frombuffer(self._memory, np.uint8, count=flat.size, offset=self._used)
        place[:] = flat
        address = self._base + self._used
        self._used += (flat.size + _ALIGN - 1) // _ALIGN * _ALIGN
        return address

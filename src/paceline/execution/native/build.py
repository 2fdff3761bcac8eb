"""The compiled CPU kernels. Without a compiler the torch operators of `execution.lean` serve."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from paceline import compiled

ABI_VERSION = 10
_HEADERS = ("attention", "draw", "grades", "heads", "layer", "linear", "model", "pool", "share", "tiles")
_VECTORS = ("vec", "vec_any", "vec_avx2", "vec_avx512")
KERNELS = compiled.Sources(
    name="kernels",
    folder=Path(__file__).parent,
    files=("kernel.c", *(f"{name}.h" for name in _HEADERS + _VECTORS)),
    flags=("-O3", "-march=native", "-ffp-contract=off", "-Wno-psabi"),
    libraries=("-lm", "-lpthread"),
    abi=("paceline_abi", ABI_VERSION),
)


def kernels_name() -> str:
    """Name of the loaded kernels, which tells their sources, flags, compiler and processor; empty if there are none."""
    library = load_library()
    return "" if isinstance(library, str) else name_of(library)


def name_of(library: ctypes.CDLL) -> str:
    """Name of the file that was loaded, without its folder."""
    return Path(library._name).stem


@cache
def load_library() -> ctypes.CDLL | str:
    """The loaded kernels, or the reason why there are none. Compiles on first use (about 8 s)."""
    return compiled.load(KERNELS)

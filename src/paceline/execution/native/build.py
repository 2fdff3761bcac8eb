"""Compile the CPU kernels once a machine, with the C compiler that is there.

The library lies in the cache folder under a name that holds the hash of sources, flags, compiler and processor, so a changed
kernel or another machine builds its own. Without a compiler the torch operators of `execution.lean` serve.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from paceline.errors import CacheError
from paceline.models.cachedir import atomic_write, cache_root

_FOLDER = Path(__file__).parent
_SOURCES = ("kernel.c", "attention.h", "linear.h", "vec.h")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-Wno-psabi", "-std=gnu11", "-shared", "-fPIC")
ABI_VERSION = 2


def find_compiler() -> list[str] | None:
    """The command of a C compiler: $CC, cc, gcc, clang, or the `ziglang` wheel; None if there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    return None


def _processor() -> str:
    """What -march=native depends on."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def _compile(compiler: list[str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="paceline-") as folder:
        out = Path(folder) / "kernel.so"
        command = [*compiler, *_FLAGS, str(_FOLDER / "kernel.c"), "-o", str(out), "-lm", "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise OSError(f"{compiler[0]} refused the kernels: {first}")
        return out.read_bytes()


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    if library.paceline_abi() != ABI_VERSION:
        raise OSError(f"{path.name} has another interface version")
    return library


@cache
def load_library() -> ctypes.CDLL | str:
    """The loaded kernels, or the reason why there are none. Compiles on first use (about 3 s)."""
    if os.environ.get("PACELINE_NATIVE", "1") == "0":
        return "switched off by PACELINE_NATIVE=0"
    if sys.platform == "win32":
        return "the native kernels need POSIX threads"
    compiler = find_compiler()
    if compiler is None:
        return "no C compiler was found (install gcc or clang, or `pip install ziglang`)"
    text = "".join((_FOLDER / name).read_text() for name in _SOURCES)
    key = hashlib.sha256("\0".join([text, *_FLAGS, *compiler, _processor()]).encode()).hexdigest()[:16]
    path = cache_root() / "native" / f"kernel-{key}.so"
    try:
        if path.exists():
            return _open(path)
        binary = _compile(compiler)
        try:
            atomic_write(path, binary)
            return _open(path)
        except CacheError:  # a read-only cache costs the compilation each time, not the speed
            with tempfile.NamedTemporaryFile(suffix=".so", prefix="paceline-") as file:
                file.write(binary)
                file.flush()
                return _open(Path(file.name))
    except (OSError, subprocess.TimeoutExpired, AttributeError) as error:
        return str(error).splitlines()[0]

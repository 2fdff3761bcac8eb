"""What forwards cost on this machine: measured once, kept in the cache folder, read back at the next start (ours)."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from paceline._version import __version__
from paceline.costs import CostTable
from paceline.errors import CacheError
from paceline.execution.base import Runner, Segment, SequenceHandle, prefill
from paceline.models.cachedir import cache_root, read_json, write_json_atomic

ROWS = (1, 2, 3, 4, 6, 8, 12, 17, 24, 33)
CONTEXTS = (64, 1024, 4096)
_FIRST_ROWS = (1, 8, 4, 17, 2, 33, 3, 6, 12, 24)
"""Order in which rows are given up when time is short: the last ones first."""
_MOST_REPEATS = 9
_PREFILL_SHARE = 0.4
_SHORTEST_CONTEXT_STEP = 128
T = TypeVar("T")


def measure_costs(
    runner: Runner,
    rows: Sequence[int] = ROWS,
    contexts: Sequence[int] = CONTEXTS,
    budget_seconds: float = 2.5,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:
    """Median seconds of a forward over each number of rows at each context, with real cache contents.

    Repeats are interleaved, so that a passing disturbance meets all rows alike. Contexts that the model or the budget (for
    filling the cache) does not allow are left out or shortened, rows too when a single pass is slow; at least one context with
    one row is measured, whatever the budget. A curve is made monotone by its running maximum, over rows and over contexts.
    """
    stop = clock() + budget_seconds
    sequence = runner.open()
    try:
        stepper = _Stepper(runner, sequence, clock)
        first = max(1, min(contexts[0], runner.info.max_context // 2))
        stepper.extend_to(first)
        rows = [n for n in sorted(rows) if first + n <= runner.info.max_context]
        step = min(stepper.seconds(1) for _ in range(3))
        rows = _affordable(rows, stop - clock(), step)
        known = [c for c in contexts[1:] if c + rows[-1] <= runner.info.max_context]
        slower = stepper.seconds(rows[-1])
        grid = {first: stepper.sweep(rows, clock() + (stop - clock()) * (_PREFILL_SHARE if known else 1.0))}
        for index, wanted in enumerate(known):
            share = (stop - clock()) / (len(known) - index)
            context = _reachable(sequence.length, wanted, share * _PREFILL_SHARE, slower / rows[-1])
            if context is None:
                break
            stepper.extend_to(context)
            grid[context] = stepper.sweep(rows, clock() + share * (1 - _PREFILL_SHARE))
    finally:
        runner.close(sequence)
    table = CostTable(rows=list(rows), contexts=list(grid), verify=_monotone(list(grid.values())))
    return table if runner.rows_at_once is None else _in_passes(table, runner.rows_at_once)


def _in_passes(table: CostTable, most: int) -> CostTable:
    """The table up to two passes of `most` rows, the second of which begins one row behind the first."""

    def seconds(rows: int, context: int) -> float:
        passes, rest = divmod(rows, most)
        return passes * table.t_verify(most, context) + (table.t_verify(rest, context) if rest else 0.0)

    rows = [*(n for n in table.rows if n < most), most, most + 1, 2 * most]
    return CostTable(rows, table.contexts, [[seconds(n, context) for n in rows] for context in table.contexts])


def _affordable(rows: list[int], seconds: float, step: float) -> list[int]:
    """As many rows as four passes each leave time for; at least the single row, and a second one to give a slope."""
    count = max(2, int(seconds / max(step, 1e-9) / 4 / 2))
    ranked = [n for n in _FIRST_ROWS if n in rows] + [n for n in rows if n not in _FIRST_ROWS]
    return sorted(ranked[:count])


def _reachable(length: int, context: int, seconds: float, seconds_per_token: float) -> int | None:
    """The context that filling can reach in this time: the wanted one, a shorter one, or None if not worth it."""
    affordable = length + int(seconds / max(seconds_per_token, 1e-9))
    if affordable >= context:
        return context
    return affordable if affordable >= length + _SHORTEST_CONTEXT_STEP else None


def _monotone(verify: list[list[float]]) -> list[list[float]]:
    """Running maximum along rows, then along contexts."""
    smooth: list[list[float]] = []
    for at_context in verify:
        line: list[float] = []
        for index, seconds in enumerate(at_context):
            below = smooth[-1][index] if smooth else 0.0
            line.append(max(seconds, below, line[-1] if line else 0.0))
        smooth.append(line)
    return smooth


class _Stepper:
    """Times single forwards on one sequence, taking each back afterwards."""

    def __init__(self, runner: Runner, sequence: SequenceHandle, clock: Callable[[], float]) -> None:
        self._runner, self._sequence, self._clock = runner, sequence, clock

    def tokens(self, count: int) -> list[int]:
        """Some ids, spread over the vocabulary."""
        return [(7919 * i + 13) % self._runner.info.vocab_size for i in range(count)]

    def extend_to(self, length: int) -> None:
        prefill(self._runner, self._sequence, self.tokens(length - self._sequence.length))

    def seconds(self, rows: int) -> float:
        """One forward over a chain of `rows` tokens, results read, rows committed; then taken back (untimed)."""
        length, tokens = self._sequence.length, self.tokens(rows)
        start = self._clock()
        out = self._runner.forward([Segment(self._sequence, tokens)])
        out.logits[-1, 0].item()  # waits for the device
        self._runner.accept(self._sequence, range(rows))
        taken = self._clock() - start
        self._runner.truncate(self._sequence, length)
        return taken

    def sweep(self, rows: Sequence[int], stop: float) -> list[float]:
        """Seconds for each number of rows, the lower third (disturbances only ever add); the first pass warms up."""
        samples: dict[int, list[float]] = {n: [] for n in rows}
        for n in rows:
            self.seconds(n)
        for _ in range(_MOST_REPEATS):
            for n in rows:
                if not samples[n] or self._clock() < stop:
                    samples[n].append(self.seconds(n))
        return [sorted(samples[n])[len(samples[n]) // 3] for n in rows]


def load_or_measure(
    runner: Runner, fingerprint: str, measure: Callable[[Runner], CostTable] = measure_costs
) -> tuple[CostTable, str | None]:
    """The stored cost table of this machine, model, precision and backend, or a new one.

    fingerprint: of the model (`ModelSource.fingerprint`). The second value says what went wrong with the cache, if anything: a
    damaged file is replaced, an unwritable folder is tolerated.
    """
    info = runner.info
    key = {
        **machine_key(info.device),
        "model": fingerprint,
        "backend": info.backend,
        "precision": info.precision,
        "max_context": info.max_context,
        "runner": {k: v for k, v in sorted(info.extra.items()) if not k.endswith("_choice")},
    }
    return recall("costs", key, CostTable.from_json, lambda: measure(runner), CostTable.to_json)


def machine_key(device: str) -> dict[str, Any]:
    """What measured times depend on, apart from the model."""
    key: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "paceline": __version__,
    }
    if device.startswith("cuda"):
        key["gpu"] = torch.cuda.get_device_name(device)
    return key


def recall(
    kind: str,
    key: dict[str, Any],
    parse: Callable[[Any], T],
    make: Callable[[], T],
    dump: Callable[[T], Any],
    when_busy: Callable[[], T] | None = None,
) -> tuple[T, str | None]:
    """The value stored under a key in the cache folder's `kind`, or a newly made one, which is then stored.

    parse: raises KeyError, TypeError or ValueError on a damaged document. What other processes disturbed is not stored; when_busy:
    what is taken instead of such a value, for what must not differ from one start to the next. Returns the value and a note on
    the cache, if any.
    """
    path = _path(kind, key)
    document = read_json(path)
    if isinstance(document, dict) and document.get("key") == key:
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            return parse(document["value"]), None
    note = f"{path.name} in the cache folder was damaged; measured again" if path.exists() else None
    if when_busy is not None and _is_busy():
        return when_busy(), f"{kind} are not measured: the machine is busy"
    value = make()
    if _is_busy():
        return value, f"{kind} were measured on a busy machine (load {os.getloadavg()[0]:.1f}) and are not kept"
    try:
        write_json_atomic(path, {"key": key, "value": dump(value)})
    except CacheError as error:
        note = f"measured {kind} are not kept: {error}"
    return value, note


def _is_busy() -> bool:
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) + 1


def _path(kind: str, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_root() / kind / f"{digest}.json"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()

"""From settings to a runner: device, backend and precision, each chosen when left to us, with the reason on record."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from paceline.config import PRECISIONS, RunnerConfig
from paceline.errors import ModelError, OptionError
from paceline.execution.base import Runner, Segment, prefill
from paceline.execution.measure import machine_key, recall
from paceline.execution.probe_source import FirstLayers
from paceline.execution.structure import Matrix, describe_structure, merged_weights
from paceline.models.base import ModelSource

_STEPS = 9
_CLEARLY = 1.25
"""A format must be this many times as fast as the one with the fewest bytes to be taken instead."""
_HF_PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class _Backend:
    """One way to run a model. Loads nothing until asked, so that no backend's libraries are needed by the others."""

    name: str
    reason: Callable[[ModelSource, str], str | None]
    """Why a model cannot run in a precision here, or None."""
    build: Callable[[ModelSource, str], Runner]
    keeps_blocks: bool = False
    """Whether it computes with a file's own quantised blocks."""
    runs_parts: bool = True
    """Whether it can be timed on `FirstLayers`."""
    kernels: Callable[[], str] = lambda: ""
    """Name of the kernels that it would run: other ones take other times."""


def create_runner(source: ModelSource, config: RunnerConfig) -> Runner:
    """Load a model for these settings.

    `info.extra` of the result says why this backend (`backend_choice`) and this precision (`precision_choice`). Raises
    OptionError for a device that is not there, ModelError when nothing can run the model, with each backend's reason.
    """
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    backends = _backends(device, config)
    if config.backend != "auto":
        backends = [b for b in backends if b.name == config.backend]
        if not backends:
            raise OptionError(f"backend = {config.backend!r}: does not run on device {device}; choose another, or auto")
    reasons: list[str] = []
    for backend in backends:
        precision, why = config.precision, "asked for"
        if precision == "auto":
            precision, why = _choose_precision(source, backend, device)
        reason = backend.reason(source, precision)
        if reason is None:
            runner = backend.build(source, precision)
            runner.info.extra["precision_choice"] = why
            runner.info.extra["backend_choice"] = "; ".join(reasons) if reasons else "first choice"
            return runner
        reasons.append(f"{backend.name}: {reason}")
    raise ModelError(f"{source.name} cannot run on {device} at precision {config.precision}: {'; '.join(reasons)}")


def create_graded(source: ModelSource, config: RunnerConfig, narrow: str, wide: str) -> Runner:
    """Load a model with every layer in two precisions, on the first backend that has both; see `Runner.set_grades`.

    Raises as `create_runner`.
    """
    device, precision = choose_device(config.device), f"{narrow}+{wide}"
    reasons = []
    for backend in _backends(device, replace(config, backend="lean")):  # names it, so that it is there on a GPU too
        reason = backend.reason(source, precision)
        if reason is None:
            return backend.build(source, precision)
        reasons.append(f"{backend.name}: {reason}")
    raise ModelError(f"{source.name} cannot run on {device} at precision {precision}: {'; '.join(reasons)}")


def choose_device(device: str) -> str:
    """`auto` resolved to `cuda` where there is one, else `cpu`; others checked. Raises OptionError."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise OptionError(f"device = {device!r}: choose auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise OptionError(f"device = {device!r}: torch sees {count} CUDA devices here; use cpu, or install a CUDA build of torch")
    return device


def _backends(device: str, config: RunnerConfig) -> list[_Backend]:
    """What can run on a device, best first. The lean runner needs a name on a GPU: it has no advantage of its own there."""
    hf = _Backend("hf", _hf_reason, partial(_build_hf, device=device, max_context=config.max_context), runs_parts=False)
    lean = _Backend("lean", _lean_reason, partial(_build_lean, device=device, max_context=config.max_context))
    if device == "cpu":
        build = partial(_build_native, threads=config.threads, max_context=config.max_context)
        return [_Backend("native", _native_reason, build, keeps_blocks=True, kernels=_native_kernels), lean, hf]
    build_cuda = partial(_build_cuda, device=device, max_context=config.max_context, memory_gb=config.memory_gb)
    cuda = _Backend("cuda", _cuda_reason, build_cuda)
    return [cuda, hf, *([lean] if config.backend == "lean" else [])]


def _native_reason(source: ModelSource, precision: str) -> str | None:
    from paceline.execution.native.runner import NativeRunner

    return NativeRunner.unsupported_reason(source, precision)


def _native_kernels() -> str:
    from paceline.execution.native.build import kernels_name

    return kernels_name()


def _build_native(source: ModelSource, precision: str, threads: int | None, max_context: int | None) -> Runner:
    from paceline.execution.native.runner import NativeRunner

    return NativeRunner(source, precision, threads, max_context)


def _lean_reason(source: ModelSource, precision: str) -> str | None:
    from paceline.execution.lean import LeanRunner

    return LeanRunner.unsupported_reason(source, precision)


def _build_lean(source: ModelSource, precision: str, device: str, max_context: int | None) -> Runner:
    from paceline.execution.lean import LeanRunner

    return LeanRunner(source, precision, device, max_context)


def _hf_reason(_: ModelSource, precision: str) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install 'paceline[hf]')"
    return None if precision in _HF_PRECISIONS else f"precision {precision} needs another backend; it has fp32 and bf16"


def _build_hf(source: ModelSource, precision: str, device: str, max_context: int | None) -> Runner:
    from paceline.execution.hf import HFRunner

    return HFRunner(source, precision, device, max_context)


def _cuda_reason(source: ModelSource, precision: str) -> str | None:
    from paceline.execution.cuda.runner import CudaRunner

    return CudaRunner.unsupported_reason(source, precision)


def _build_cuda(source: ModelSource, precision: str, device: str, max_context: int | None, memory_gb: float | None) -> Runner:
    from paceline.execution.cuda.memory import held
    from paceline.execution.cuda.runner import CudaRunner

    left = None if memory_gb is None else int(memory_gb * 1e9) - held(f"cuda:{torch.device(device).index or 0}")
    return CudaRunner(source, precision, device=device, max_context=max_context, memory_bytes=left)


def _choose_precision(source: ModelSource, backend: _Backend, device: str) -> tuple[str, str]:
    """The fastest plain decoding among formats that keep the source's weights, and why. Measured once, then remembered."""
    if device != "cpu":
        return "bf16", "auto: half the memory traffic of fp32 on a GPU"
    possible = [p for p in PRECISIONS if p != "auto" and backend.reason(source, p) is None]
    if not possible:
        return "fp32", "auto: nothing to choose from"
    what = {"model": source.fingerprint, "backend": backend.name, "kernels": backend.kernels(), "possible": possible}
    key = {**machine_key(device), **what}
    allowed = [p for p in (*(kept_formats(source) if backend.keeps_blocks else ()), "bf16", "fp32") if p in possible]

    def measure() -> dict[str, float]:
        if not backend.runs_parts:
            return {p: _linear_seconds(dtype) for p, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
        return {p: _step_seconds(partial(backend.build, FirstLayers(source), p)) for p in allowed}

    def unmeasured() -> dict[str, float]:
        return {}

    # On a busy machine each start would measure something else, and another format writes another text.
    fallback = unmeasured if backend.runs_parts else None
    seconds, _ = recall("precisions", key, _parse_seconds, measure, dict, fallback)
    if not seconds:
        return smallest(allowed), "auto: the smallest format; the machine is too busy to measure"
    best = min(seconds, key=lambda p: seconds[p] * (1.0 if p == smallest(seconds) else _CLEARLY))
    shown = ", ".join(f"{p} {1e3 * s:.2f} ms" for p, s in sorted(seconds.items(), key=lambda item: item[1]))
    return best, f"auto: fastest plain step measured on a part of the model ({shown})"


def smallest(formats: Iterable[str]) -> str:
    """The format that moves the fewest bytes. It is taken unless another is clearly faster, so that a busy moment at the first
    start does not change the text of a model between runs."""
    order = ("int4", "int8", "bf16", "fp32")
    return min(formats, key=order.index)


def _parse_seconds(document: object) -> dict[str, float]:
    if not isinstance(document, Mapping) or not document:
        raise ValueError("not a table of seconds")
    return {str(k): float(v) for k, v in document.items()}


def kept_formats(source: ModelSource) -> tuple[str, ...]:
    """`int4` or `int8` when the file's own blocks are exactly that, so that running them changes no weight; else nothing."""
    spec = describe_structure(source.config)
    if not source.is_quantised or isinstance(spec, str):
        return ()
    weights = merged_weights(source, spec)
    wide = {_bits(m) for m in (weights.embedding, weights.head)}
    inner = {_bits(m) for layer in weights.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)}
    if wide != {8}:  # int4 models keep embedding and head in 8 bits
        return ()
    return ("int4",) if inner == {4} else ("int8",) if inner == {8} else ()


def _bits(matrix: Matrix) -> int:
    """Bits of the file's blocks of a matrix; 0 when it has none that run as they are (8-bit blocks must be symmetric)."""
    blocks = matrix.blocks()
    if blocks is None or (blocks.bits == 8 and not bool((blocks.offsets == -128 * blocks.scales).all())):
        return 0
    return blocks.bits


def _step_seconds(build: Callable[[], Runner]) -> float:
    """Least seconds of a plain step of a runner, which is then dropped."""
    runner = build()
    sequence = runner.open()
    prefill(runner, sequence, range(1, 17))
    seconds = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        runner.forward([Segment(sequence, [5])])
        runner.accept(sequence, [0])
        seconds.append(time.perf_counter() - start)
    runner.close(sequence)
    return min(seconds)


def _linear_seconds(dtype: torch.dtype) -> float:
    """Least seconds of a few single-row linears: what decides a plain step of a model that is too large to load twice."""
    weights = [torch.zeros(1024, 1024, dtype=dtype) for _ in range(8)]
    seconds = []
    with torch.inference_mode():
        for _ in range(_STEPS):
            start = time.perf_counter()
            x = torch.ones(1, 1024, dtype=dtype)
            for weight in weights:
                x = F.linear(x, weight)
            seconds.append(time.perf_counter() - start)
    return min(seconds)

"""Compiling and launching the CUDA C++ kernels: NVRTC and the CUDA driver through `cuda.bindings`, which CUDA builds of torch
bring along.

torch's own launchers do not know programmatic dependent launch. Binaries are kept in the cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any

import torch

from paceline.errors import CacheError, ModelError
from paceline.models.cachedir import atomic_write, cache_root

try:
    from cuda.bindings import driver, nvrtc  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # a CPU build of torch
    driver = nvrtc = None


def missing_reason() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    if driver is None:
        return "the package cuda-bindings is missing (pip install cuda-bindings)"
    return None


class Kernel:
    """A compiled function of one compilation unit."""

    def __init__(self, parts: Sequence[str], name: str, defines: dict[str, int], shared_bytes: int = 0) -> None:
        """parts: files of this package, one after another. shared_bytes: most dynamic shared memory of a launch.

        Compiles it unless the cache folder holds the binary. Raises ModelError.
        """
        text = b"\n".join(files(__package__).joinpath(part).read_bytes() for part in parts)
        self._module = _checked(driver.cuModuleLoadData(_binary(text, defines)))
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        if shared_bytes:
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        arguments: list[Any],
        *,
        shared_bytes: int = 0,
        overlap: bool = False,
        cluster: int = 1,
    ) -> None:
        """Launch on torch's current stream.

        arguments: ctypes values or structures, in the kernel's order.
        overlap: may start while the kernel before it on the stream still runs (it waits inside, before it reads what that made).
        cluster: blocks that run at the same time and read each other's shared memory.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        attributes = [_overlap_attribute()] if overlap else []
        if cluster > 1:
            attributes.append(_cluster_attribute(cluster))
        config.attrs, config.numAttrs = attributes, len(attributes)
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))


def _overlap_attribute() -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _cluster_attribute(blocks: int) -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size = attribute.value.clusterDim
    size.x, size.y, size.z = blocks, 1, 1
    return attribute


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a driver call. Raises ModelError with the driver's own name of the failure."""
    if result[0].value != 0:
        raise ModelError(f"CUDA kernel: {result[0].name}; update the driver, or use backend = 'hf'")
    return result[1] if len(result) > 1 else None


def _binary(text: bytes, defines: dict[str, int]) -> bytes:
    """The machine code for the current device, from the cache folder or compiled now."""
    major, minor = _capability()
    options = [f"--gpu-architecture=sm_{major}{minor}", "-std=c++17", *(f"-D{k}={v}" for k, v in sorted(defines.items()))]
    version = _checked_compile(nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((text, options, version)).encode()).hexdigest()[:32]
    path = cache_root() / "kernels" / f"{key}.cubin"
    with suppress(OSError):
        return path.read_bytes()
    binary: bytes = compile_source(text, options)
    with suppress(CacheError):  # an unwritable cache costs a few seconds at each start, nothing else
        atomic_write(path, binary)
    return binary


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def compile_source(text: bytes, options: list[str]) -> bytes:
    """Machine code of a source text. Raises ModelError with the compiler's log."""
    program = _checked_compile(nvrtc.nvrtcCreateProgram(text, b"kernel.cu", 0, None, None))
    encoded = [option.encode() for option in options]
    if nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0].value != 0:
        log = b" " * _checked_compile(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise ModelError(f"CUDA kernel does not compile here: {log.decode(errors='replace').strip()}; use backend = 'hf'")
    binary: bytes = b" " * _checked_compile(nvrtc.nvrtcGetCUBINSize(program))
    _checked_compile(nvrtc.nvrtcGetCUBIN(program, binary))
    nvrtc.nvrtcDestroyProgram(program)
    return binary


def _checked_compile(result: tuple[Any, ...]) -> Any:
    if result[0].value != 0:
        raise ModelError(f"CUDA compiler: {result[0].name}; update cuda-bindings, or use backend = 'hf'")
    return result[1:] if len(result) > 2 else result[1] if len(result) > 1 else None

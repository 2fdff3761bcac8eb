"""The GGUF container: header, metadata and tensor directory (format: ggml `docs/gguf.md`, versions 2 and 3), and its block formats.

Read without the `gguf` package, so that the default model needs none; formats beyond the plain 4 and 8 bit ones ask for it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline.errors import ModelError
from paceline.models.base import QuantBlocks

GROUP = 32
"""Weights in a block of Q4_0, Q4_1 and Q8_0."""
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One ggml tensor type: `bytes` hold `weights` consecutive numbers of a row."""

    name: str
    weights: int
    bytes: int


FORMATS = {
    0: BlockFormat("F32", 1, 4),
    1: BlockFormat("F16", 1, 2),
    2: BlockFormat("Q4_0", 32, 18),
    3: BlockFormat("Q4_1", 32, 20),
    6: BlockFormat("Q5_0", 32, 22),
    7: BlockFormat("Q5_1", 32, 24),
    8: BlockFormat("Q8_0", 32, 34),
    10: BlockFormat("Q2_K", 256, 84),
    11: BlockFormat("Q3_K", 256, 110),
    12: BlockFormat("Q4_K", 256, 144),
    13: BlockFormat("Q5_K", 256, 176),
    14: BlockFormat("Q6_K", 256, 210),
    20: BlockFormat("IQ4_NL", 32, 18),
    23: BlockFormat("IQ4_XS", 256, 136),
    30: BlockFormat("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. `shape` is row-major, as in torch (the file lists it reversed)."""

    shape: tuple[int, ...]
    kind: int
    """ggml type number, a key of FORMATS."""
    offset: int
    """Bytes from the start of the file."""

    @property
    def num_bytes(self) -> int:
        form = FORMATS[self.kind]
        return prod(self.shape) // form.weights * form.bytes


@dataclass(frozen=True, slots=True)
class GGUFContents:
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


class _Reader:
    """A cursor over the file's bytes."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.number("<Q")
        if length > len(self.data) - self.at:
            raise struct.error("a text reaches beyond the file")
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.number("<I"), self.number("<Q")
            if count > len(self.data) - self.at:  # every item takes a byte or more
                raise struct.error("a list reaches beyond the file")
            if item in _NUMBERS:
                form = f"<{count}{_NUMBERS[item][1]}"
                values = struct.unpack_from(form, self.data, self.at)
                self.at += struct.calcsize(form)
                return list(values)
            return [self.value(item) for _ in range(count)]
        return self.number(_NUMBERS[kind])


def read_gguf(path: Path) -> GGUFContents:
    """Read metadata and directory, and check that every tensor lies inside the file. Raises ModelError."""
    size = path.stat().st_size
    if size < 24:
        raise ModelError(f"model = {str(path)!r}: {size} bytes are no GGUF file; it is cut short, fetch it again")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    reader = _Reader(memoryview(data.data))
    if bytes(data[:4]) != b"GGUF":
        raise ModelError(f"model = {str(path)!r}: not a GGUF file (it begins with {bytes(data[:4])!r}); name another file")
    reader.at = 4
    version = reader.number("<I")
    if version not in (2, 3):
        raise ModelError(f"model = {str(path)!r}: GGUF version {version} cannot be read; convert it to version 3, little-endian")
    try:
        contents = _read_directory(reader)
    except (struct.error, KeyError, RecursionError) as error:
        raise ModelError(f"model = {str(path)!r}: the GGUF header is cut short or damaged; fetch the file again") from error
    for name, entry in contents.tensors.items():
        if entry.kind not in FORMATS:
            raise ModelError(f"model = {str(path)!r}: tensor {name} has the unknown type {entry.kind}; use a Q4, Q8 or F16 file")
        end = entry.offset + entry.num_bytes
        if end > size:
            raise ModelError(f"model = {str(path)!r}: cut short: {name} ends at byte {end}, the file at {size}; fetch it again")
    return contents


def _read_directory(reader: _Reader) -> GGUFContents:
    num_tensors, num_pairs = reader.number("<Q"), reader.number("<Q")
    metadata = {}
    for _ in range(num_pairs):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    found = []
    for _ in range(num_tensors):
        name, rank = reader.string(), reader.number("<I")
        shape = tuple(reader.number("<Q") for _ in range(rank))[::-1]
        found.append((name, shape, reader.number("<I"), reader.number("<Q")))
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-reader.at // alignment) * alignment
    return GGUFContents(metadata, {name: TensorEntry(shape, kind, start + offset) for name, shape, kind, offset in found})


def unpack_blocks(raw: Bytes, kind: int) -> QuantBlocks | None:
    """Blocks of a [rows, row bytes] uint8 matrix of type Q4_0, Q4_1 or Q8_0 (type number `kind`); None for other types."""
    name = FORMATS[kind].name
    if name not in ("Q4_0", "Q4_1", "Q8_0"):
        return None
    rows = len(raw)
    blocks = raw.reshape(rows, -1, FORMATS[kind].bytes)
    scales = _half(blocks, 0)
    if name == "Q8_0":
        quants = blocks[..., 2:] ^ np.uint8(128)  # two's complement + 128
        return QuantBlocks(quants.reshape(rows, -1), scales, -128.0 * scales, bits=8)
    offsets = _half(blocks, 2) if name == "Q4_1" else -8.0 * scales
    packed = np.ascontiguousarray(blocks[..., -GROUP // 2 :])
    quants = np.empty((*packed.shape[:2], 2, GROUP // 2), np.uint8)  # a byte holds weights i and i + 16 of its group
    np.bitwise_and(packed, 15, out=quants[..., 0, :])
    np.right_shift(packed, 4, out=quants[..., 1, :])
    return QuantBlocks(quants.reshape(rows, -1), scales, offsets, bits=4)


def _half(blocks: Bytes, at: int) -> npt.NDArray[np.float32]:
    """The 16 bit float at byte `at` of each block, [rows, blocks] float32."""
    return blocks[..., at : at + 2].view(np.float16)[..., 0].astype(np.float32)


def decode_blocks(blocks: QuantBlocks) -> npt.NDArray[np.float32]:
    """[out, in] float32 weights of quantised blocks: scale * q + offset."""
    rows, columns = blocks.quants.shape
    groups = blocks.quants.reshape(rows, -1, GROUP).astype(np.float32)
    groups *= blocks.scales[..., None]
    groups += blocks.offsets[..., None]
    return groups.reshape(rows, columns)


def decode_rows(raw: Bytes, kind: int) -> npt.NDArray[np.float32]:
    """[rows, columns] float32 weights of a [rows, row bytes] uint8 matrix of any known type.

    Raises ModelError when the type needs the `gguf` package and that is missing.
    """
    name = FORMATS[kind].name
    if name == "F32":
        return raw.view(np.float32).copy()
    if name == "F16":
        return raw.view(np.float16).astype(np.float32)
    if name == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    blocks = unpack_blocks(raw, kind)
    if blocks is not None:
        return decode_blocks(blocks)
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError as error:
        raise ModelError(f"GGUF type {name} needs the gguf package: pip install 'paceline[gguf]'") from error
    decoded: npt.NDArray[np.float32] = dequantize(raw, GGMLQuantizationType(kind)).astype(np.float32, copy=False)
    return decoded

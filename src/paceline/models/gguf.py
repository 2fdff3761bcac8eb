"""GGUF files as models. Configuration, tokenizer and tensor index are converted once and cached; weights are read where they lie.

The file's blocks are mapped and decoded when asked for, which takes a tenth of a second for the default model, so that no second
copy of the weights is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from paceline.models import cachedir
from paceline.models.base import ModelSource, QuantBlocks, Tokenizer
from paceline.models.gguf_arch import find_architecture, hf_config, hf_row_order, parameter_names, rope_scaling
from paceline.models.gguf_file import FORMATS, Bytes, TensorEntry, decode_rows, read_gguf, unpack_blocks
from paceline.models.gguf_tokenizer import tokenizer_config, tokenizer_json
from paceline.models.lazy import LazyTensors, stored_name

if TYPE_CHECKING:
    import torch

Progress = Callable[[str], None]
FORMAT = 1
"""Layout of a converted folder; another number makes another folder."""
_MANIFEST, _TENSORS = "manifest.json", "tensors.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A parameter: where its bytes lie in the file, and what undoes llama.cpp's changes to it."""

    entry: TensorEntry
    rope_heads: int = 0
    """Heads of a q or k projection whose rows were interleaved; 0 where rows are in order."""
    minus_one: bool = False
    """The file holds 1 + weight."""

    def to_json(self) -> list[Any]:
        return [list(self.entry.shape), self.entry.kind, self.entry.offset, self.rope_heads, self.minus_one]

    @classmethod
    def from_json(cls, row: list[Any]) -> StoredTensor:
        shape, kind, offset, rope_heads, minus_one = row
        return cls(TensorEntry(tuple(shape), kind, offset), rope_heads, minus_one)


class GGUFSource(ModelSource):
    """A GGUF file with its converted folder."""

    def __init__(self, path: Path, folder: Path, fingerprint: str, name: str) -> None:
        """folder: made by `open_gguf`. fingerprint: sha256 of the file."""
        self.path = path
        self.folder = folder
        self.fingerprint = fingerprint
        self.name = name
        self.config = json.loads((folder / "config.json").read_bytes())
        rows = json.loads((folder / _TENSORS).read_bytes())
        self._stored = {parameter: StoredTensor.from_json(row) for parameter, row in rows.items()}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from paceline.models.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    def tensors(self) -> LazyTensors:
        return LazyTensors(self._stored, self._load)

    def quant_blocks(self, name: str) -> QuantBlocks | None:
        stored = self._stored.get(stored_name(name, self._stored))
        return None if stored is None else unpack_blocks(self._rows(stored), stored.entry.kind)

    @property
    def is_quantised(self) -> bool:
        return any(FORMATS[stored.entry.kind].weights > 1 for stored in self._stored.values())

    def hf_model(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        from paceline.models.hf import build_model

        return build_model(self.config, self.tensors(), dtype, device)

    @cached_property
    def _bytes(self) -> Bytes:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def _rows(self, stored: StoredTensor) -> Bytes:
        """[rows, row bytes] of the file, rows in the order of the model definition (a view where they lie so)."""
        entry = stored.entry
        flat = self._bytes[entry.offset : entry.offset + entry.num_bytes]
        if stored.rope_heads:
            rows = flat.reshape(entry.shape[0], -1)
            return rows[hf_row_order(len(rows), stored.rope_heads)]
        return flat.reshape(entry.shape[0] if len(entry.shape) > 1 else 1, -1)

    def _load(self, parameter: str) -> torch.Tensor:
        import torch

        stored = self._stored[parameter]
        weights = decode_rows(self._rows(stored), stored.entry.kind)
        if stored.minus_one:
            weights -= 1.0
        return torch.from_numpy(weights).reshape(stored.entry.shape)


def open_gguf(path: Path, *, name: str | None = None, progress: Progress | None = None) -> GGUFSource:
    """Open a GGUF file, converting it at first use (about a second). Raises ModelError, or CacheError when that cannot be stored.

    name: what the user typed, for reports. progress: told in words what takes long.
    """
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{FORMAT}"
    folder = cachedir.cache_root() / "models" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    fingerprint = _intact(folder)
    if fingerprint is None:
        with cachedir.locked(folder):
            fingerprint = _intact(folder)  # another process may have built it while this one waited
            if fingerprint is None:
                if progress is not None:
                    progress(f"preparing {path.name} (once)")
                fingerprint = _sha256(path)
                _convert(path, folder, fingerprint)
    return GGUFSource(path, folder, fingerprint, name or str(path))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _intact(folder: Path) -> str | None:
    """The source's sha256 when the folder holds exactly what was written into it, else None."""
    manifest = cachedir.read_json(folder / _MANIFEST)
    if not isinstance(manifest, dict):
        return None
    try:
        undamaged = all(_sha256(folder / file) == digest for file, digest in manifest["files"].items())
        return str(manifest["source_sha256"]) if undamaged else None
    except (OSError, KeyError, AttributeError):
        return None


def _convert(path: Path, folder: Path, fingerprint: str) -> None:
    contents = read_gguf(path)
    architecture = find_architecture(contents)
    names = parameter_names(contents, architecture)
    config = hf_config(contents, architecture)
    factors = contents.tensors.get("rope_freqs.weight")
    scaling = rope_scaling(contents, None if factors is None else _read_floats(path, factors), config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    stored = {}
    for parameter, tensor in names.items():
        module = parameter.split(".")[-2]
        stored[parameter] = StoredTensor(
            contents.tensors[tensor],
            rope_heads=heads.get(module, 0) if architecture.interleaved_rope else 0,
            minus_one=architecture.norms_plus_one and "norm" in module,
        )
    documents = {
        "config.json": json.dumps(config, indent=1),
        "tokenizer.json": tokenizer_json(contents.metadata, path),
        "tokenizer_config.json": json.dumps(tokenizer_config(contents.metadata), ensure_ascii=False, indent=1),
        _TENSORS: json.dumps({parameter: tensor.to_json() for parameter, tensor in stored.items()}),
    }

    def fill(temporary: Path) -> None:
        for file, text in documents.items():
            (temporary / file).write_bytes(text.encode())
        digests = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in documents.items()}
        manifest = {"source": str(path), "source_sha256": fingerprint, "files": digests}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))

    cachedir.build_folder(folder, fill)


def _read_floats(path: Path, entry: TensorEntry) -> npt.NDArray[np.float32]:
    with path.open("rb") as file:
        file.seek(entry.offset)
        raw = np.frombuffer(file.read(entry.num_bytes), np.uint8)
    return decode_rows(raw.reshape(1, -1), entry.kind).reshape(-1)

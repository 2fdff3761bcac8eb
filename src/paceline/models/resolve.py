"""From what the user typed to a model: the default, a GGUF file, a folder, or a name on the model hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from paceline.errors import ModelError
from paceline.models.base import ModelSource, first_line
from paceline.models.default import DEFAULT_NAME, require_default_model

_UPSCALED = "upscaled:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.safetensors")
_HUB_SECONDS = 10.0
_HUB_PICKLES = ("pytorch_model*.bin",)


def open_model(name: str | None = None, *, progress: Callable[[str], None] | None = None) -> ModelSource:
    """Find and open a model; its weights are not read yet.

    name: `default` (or None), a .gguf file, a model folder, a hub name such as `HuggingFaceTB/SmolLM2-360M-Instruct`, or any of
    these at the cost of a larger one, for studies: `upscaled:8b:default` (`models.upscale`).
    progress: told in words what takes long (a conversion, a download).
    Raises ModelError (CacheError when a conversion cannot be stored), a line that names the value and the remedy.
    """
    if name is None or name == DEFAULT_NAME:
        return _open_file(require_default_model(), DEFAULT_NAME, progress)
    if name.startswith(_UPSCALED):
        return _open_upscaled(name, progress)
    path = Path(name).expanduser()
    if path.is_file():
        return _open_file(path, name, progress)
    if name and path.is_dir():
        return _open_folder(path, name)
    looks_like_a_path = (
        path.is_absolute() or name.startswith(("./", "../", "~")) or path.suffix in (".gguf", ".safetensors", ".bin")
    )
    if looks_like_a_path or not _HUB_NAME.fullmatch(name):
        raise ModelError(
            f"model = {name!r}: no such file or folder; give a .gguf file, a model folder, a hub name or {DEFAULT_NAME!r}"
        )
    return _open_folder(_hub_snapshot(name, progress), name)


def _open_file(path: Path, name: str, progress: Callable[[str], None] | None) -> ModelSource:
    from paceline.models.gguf import open_gguf

    if not os.access(path, os.R_OK):
        raise ModelError(f"model = {name!r}: the file cannot be read; check its permissions")
    if path.suffix.lower() in (".safetensors", ".bin", ".json"):
        raise ModelError(f"model = {name!r}: a single file of a model; name its folder instead")
    return open_gguf(path, name=name, progress=progress)


def _open_upscaled(name: str, progress: Callable[[str], None] | None) -> ModelSource:
    import torch

    from paceline.models.upscale import SHAPES, UpscaledSource

    shape, _, inner = name.removeprefix(_UPSCALED).partition(":")
    if shape not in SHAPES or not inner:
        raise ModelError(f"model = {name!r}: say {_UPSCALED}SHAPE:MODEL with a shape of {', '.join(SHAPES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return UpscaledSource(open_model(inner, progress=progress), SHAPES[shape], device=device)


def _open_folder(folder: Path, name: str) -> ModelSource:
    from paceline.models.hf import HFFolderSource

    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / "config.json").is_file():
        raise ModelError(f"model = {name!r}: name the GGUF file itself, such as {str(files[0])!r}")
    return HFFolderSource(folder, name)


def _hub_snapshot(name: str, progress: Callable[[str], None] | None) -> Path:
    """The folder of a hub model. One that was fetched before is taken as it is, without asking the network."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(f"model = {name!r}: no such file or folder, and hub names need: pip install 'paceline[hf]'") from error
    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        _open_folder(folder, name)  # raises when only a part of it is there
    except Exception:  # whatever the reason, fetching it comes next, and reports what is wrong
        pass
    else:
        return folder
    if progress is not None:
        progress(f"fetching {name} (once)")
    try:
        listed = huggingface_hub.model_info(name, timeout=_HUB_SECONDS).siblings or ()
        weights = () if any(file.rfilename.endswith(".safetensors") for file in listed) else _HUB_PICKLES
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_HUB_FILES, *weights]))
    except Exception as error:  # offline, unknown, gated, full disk: each library version has its own kinds
        raise ModelError(
            f"model = {name!r}: no such file or folder here, and the model hub did not give it ({first_line(error)}); "
            f"check the name and the network, or give a path or {DEFAULT_NAME!r}"
        ) from error

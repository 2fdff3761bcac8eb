"""Files of published heads: which method they belong to, and their tensors under one set of names.

Two layouts are known of each method: that of its authors ("original"), and that of `speculators` and vLLM. Names afterwards are
the authors', with the decoder layer under `layer.` (2401.15077 and 2503.01840 for EAGLE, 2401.10774 for Medusa; keys and
settings as the released code writes them). A tensor without a place is an error: a head that is half loaded drafts nonsense.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paceline.errors import ModelError
from paceline.models.base import first_line

MEDUSA, EAGLE, EAGLE3 = "medusa", "eagle", "eagle3"
Shape = tuple[int, ...]
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt"}
_MEDUSA_ORIGINAL = re.compile(r"(?:medusa_heads?\.)?(\d+)\.(\d+)\.(linear\.)?(weight|bias)")
_MEDUSA_OTHER = re.compile(r"(?:medusa_heads\.)?(?:blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)|lm_heads\.(\d+)\.weight)")
_EAGLE_NAMES = (("fusion_fc.", "fc."), ("transformer.", "layer."), ("midlayer.", "layer."), ("layers.0.", "layer."))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A head as its files have it."""

    name: str
    """What the user typed."""
    method: str
    """`medusa`, `eagle` (1 and 2 have the same weights) or `eagle3`."""
    layout: str
    """`original` or `speculators`."""
    settings: Mapping[str, Any]
    """Of the head: the top level of config.json, with `eagle_config` spread into it."""
    layer: Mapping[str, Any]
    """Of its decoder layer, named as in a Llama's config.json; may lack what equals the defaults of that class."""
    tensors: Mapping[str, torch.Tensor]
    """By name: `layer.*` for the decoder layer; of Medusa `blocks.HEAD.LAYER.weight`, `.bias` and `heads.HEAD.weight`."""

    def refuse(self, why: str) -> ModelError:
        """The error that names this head."""
        return ModelError(f"head {self.name!r}: {why}")

    def check(self, required: Mapping[str, Shape], optional: Mapping[str, Shape]) -> None:
        """Compare names and shapes with those of the method. Raises ModelError that lists every difference."""
        known = {**optional, **required}
        wrong = [f"{name} is missing" for name in sorted(required) if name not in self.tensors]
        wrong += [f"{name} is unknown" for name in sorted(self.tensors) if name not in known]
        for name, want in known.items():
            found = tuple(self.tensors[name].shape) if name in self.tensors else want
            if found != want:
                wrong.append(f"{name} is {_text(found)} and should be {_text(want)}")
        if wrong:
            raise self.refuse(f"the tensors do not make up the {self.method} graph: {'; '.join(wrong)}")


def read_head(name: str) -> Checkpoint:
    """Read a folder, or one weights file with config.json beside it (Medusa needs none). Raises ModelError."""
    path = Path(name).expanduser()
    files = [path] if path.is_file() else _weight_files(path) if path.is_dir() else []
    if not files:
        raise ModelError(
            f"head {name!r}: no weights there; name a folder with config.json and *.safetensors, *.bin or *.pt, or such a file"
        )
    config = _read_config(files[0].parent / "config.json", name)
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        stored |= _read_tensors(file, name)
    method, layout = _recognise(stored, config, name)
    tensors = _medusa_names(stored) if method == MEDUSA else _eagle_names(stored)
    settings = {**config, **(config.get("eagle_config") or {})}
    return Checkpoint(name, method, layout, settings, config.get("transformer_layer_config") or config, tensors)


def _weight_files(folder: Path) -> list[Path]:
    for pattern in _WEIGHTS:
        found = [path for path in sorted(folder.glob(pattern)) if path.name not in _NOT_WEIGHTS]
        if found:
            return found
    return []


def _read_config(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"head {name!r}: config.json cannot be read ({first_line(error)}); fetch it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"head {name!r}: config.json holds no settings; fetch it again")
    return config


def _read_tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each library raises its own kinds for a damaged file
        raise ModelError(f"head {name!r}: {path.name} cannot be read ({first_line(error)}); fetch it again") from error
    if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise ModelError(f"head {name!r}: {path.name} holds something else than tensors by name; give the head's weights")
    return stored


def _recognise(stored: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Method and layout: from the config where it says so, else from the names."""
    said = config.get("speculators_model_type")
    if said is not None:
        if said not in (MEDUSA, EAGLE, EAGLE3):
            raise ModelError(f"head {name!r}: speculators_model_type = {said!r}; known: {MEDUSA}, {EAGLE}, {EAGLE3}")
        return str(said), "speculators"
    if any(_MEDUSA_ORIGINAL.fullmatch(key) for key in stored):
        return MEDUSA, "original"
    if any(_MEDUSA_OTHER.fullmatch(key) for key in stored):
        return MEDUSA, "speculators"
    if any(key.endswith("hidden_norm.weight") for key in stored):
        return EAGLE3, "original" if any(key.startswith("midlayer.") for key in stored) else "speculators"
    if any(key.startswith("fusion_fc.") for key in stored):
        return EAGLE, "speculators"
    if any(key.startswith("fc.") for key in stored):
        return EAGLE, "original"
    raise ModelError(f"head {name!r}: neither a Medusa nor an EAGLE head (first tensors: {', '.join(sorted(stored)[:3])})")


def _eagle_names(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rotary frequencies, which old files keep, follow from the config and are dropped."""
    tensors: dict[str, torch.Tensor] = {}
    for key, value in stored.items():
        if not key.endswith("rotary_emb.inv_freq"):
            old, new = next((pair for pair in _EAGLE_NAMES if key.startswith(pair[0])), ("", ""))
            tensors[new + key.removeprefix(old)] = value
    return tensors


def _medusa_names(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The last module of an original head is its output matrix; those before it are residual blocks."""
    tensors: dict[str, torch.Tensor] = {}
    for key, value in stored.items():
        if (found := _MEDUSA_ORIGINAL.fullmatch(key)) is not None:
            head, place, linear, kind = found.groups()
            tensors[f"blocks.{head}.{place}.{kind}" if linear else f"heads.{head}.{kind}"] = value
        elif (found := _MEDUSA_OTHER.fullmatch(key)) is not None:
            head, place, kind, output = found.groups()
            tensors[f"heads.{output}.weight" if output else f"blocks.{head}.{place}.{kind}"] = value
        else:
            tensors[key] = value
    return tensors


def _text(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a single number"

"""Hugging Face model folders, and the model definitions of transformers filled with any source's weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ModelError
from paceline.models.base import ModelSource, Tokenizer, first_line
from paceline.models.lazy import LazyTensors

if TYPE_CHECKING:
    import torch

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "scheduler.bin"}


class HFFolderSource(ModelSource):
    """A folder with config.json and *.safetensors (or pytorch_model*.bin)."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises ModelError when the folder is not a decoder-only language model with weights."""
        self.folder = folder
        self.name = name
        self.config = _read_config(folder, name)
        self._weight_files = _weight_files(folder, name)
        self.fingerprint = _fingerprint(folder, self._weight_files)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from paceline.models.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    def tensors(self) -> LazyTensors:
        """Raises ModelError when a weight file is cut short or damaged."""
        loaders: dict[str, Callable[[str], torch.Tensor]] = {}
        for path in self._weight_files:
            try:
                loaders |= _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
            except Exception as error:  # each library raises its own kind for a damaged file
                raise ModelError(
                    f"model = {self.name!r}: {path.name} cannot be read ({first_line(error)}); fetch it again"
                ) from error
        return LazyTensors(loaders, lambda name: loaders[name](name))

    def hf_model(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        with _quiet_transformers() as transformers:
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(str(self.folder), dtype=dtype, local_files_only=True)
            except Exception as error:  # many kinds: unknown model types, missing and misshapen weights, damaged files
                raise _definition_error(self.name, error) from error
        return _frozen(model, device)


def build_model(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The model definition of transformers for `config`, with these weights, in eval mode and without gradients.

    tensors: under the definition's parameter names. Raises ModelError when names or shapes do not fit it.
    """
    with _quiet_transformers() as transformers:
        try:
            settings = transformers.AutoConfig.for_model(**config)
            weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            definition = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
            model, report = definition.from_pretrained(
                None, config=settings, state_dict=weights, dtype=dtype, output_loading_info=True
            )
        except Exception as error:  # many kinds, by model type
            raise _definition_error(str(config.get("model_type")), error) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            found = ", ".join(sorted(map(str, report[kind]))[:3])
            raise ModelError(f"model type {config.get('model_type')!r}: the weights do not fit its definition, {kind}: {found}")
    return _frozen(model, device)


def _frozen(model: Any, device: str) -> torch.nn.Module:
    ready: torch.nn.Module = model.to(device).eval().requires_grad_(False)
    return ready


def _definition_error(name: str, error: Exception) -> ModelError:
    return ModelError(f"model = {name!r}: transformers cannot build it ({first_line(error)}); try a newer one")


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """The transformers module, with its warnings, logs and progress bars off inside the block."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError("the hf backend needs transformers: pip install 'paceline[hf]'") from error
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield transformers
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"model = {name!r}: the folder has no config.json; name a Hugging Face model folder or a .gguf file")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"model = {name!r}: config.json cannot be read ({first_line(error)}); fetch it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"model = {name!r}: config.json holds no settings; fetch it again")
    classes = config.get("architectures") or []
    if config.get("is_encoder_decoder") or (classes and not any(str(c).endswith(_DECODERS) for c in classes)):
        kind = classes[0] if classes else config.get("model_type")
        raise ModelError(f"model = {name!r}: {kind} is not a decoder-only language model; name one that is (such as {'default'!r})")
    return config


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The files that hold weights: those that an index names, else all of one kind, safetensors first."""
    for index in _INDEXES:
        if (folder / index).is_file():
            try:
                listed = sorted(set(json.loads((folder / index).read_bytes())["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise ModelError(f"model = {name!r}: {index} cannot be read; fetch it again") from error
            for file in listed:
                if not (folder / file).is_file():
                    raise ModelError(f"model = {name!r}: weight file {file} is missing; fetch the model again")
            return [folder / file for file in listed]
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.bin"):
        found = [path for path in sorted(folder.glob(pattern)) if path.name not in _NOT_WEIGHTS]
        if found:
            return found
    raise ModelError(f"model = {name!r}: the folder has no *.safetensors or pytorch_model.bin; fetch the weights too")


def _fingerprint(folder: Path, weight_files: list[Path]) -> str:
    """sha256 over config.json and each weight file's name, size and time of change (reading gigabytes would take too long)."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files:
        stat = path.stat()
        digest.update(f"|{path.name}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _open_safetensors(path: Path) -> dict[str, Callable[[str], torch.Tensor]]:
    from safetensors import safe_open

    file = safe_open(str(path), framework="pt")
    names: list[str] = file.keys()  # type: ignore[no-untyped-call]
    return dict.fromkeys(names, file.get_tensor)


def _open_pickle(path: Path) -> dict[str, Callable[[str], torch.Tensor]]:
    import torch

    tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return dict.fromkeys(tensors, tensors.__getitem__)

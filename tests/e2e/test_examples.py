"""Every example runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from default_model import Launch, finish

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(launch: Launch, example: Path) -> None:
    done = finish(launch(str(example)))
    assert done.code == 0, done.stderr
    assert done.stdout.strip()
    assert "same tokens: False" not in done.stdout

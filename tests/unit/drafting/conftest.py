from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from unit.drafting.enumeration_kit import put_coins


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of toy models are too small to share between threads: waiting for each other costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers of drafts become coins, as `law_of_text` counts them."""
    put_coins(monkeypatch)

"""The most probable tokens of rows, compiled and plain."""

from __future__ import annotations

import math

import pytest
import torch

from paceline.drafting import rows
from paceline.drafting.rows import load_library, plain_top_tokens, top_tokens

COMPILED = pytest.mark.skipif(isinstance(load_library(), str), reason=str(load_library()))


def random_logits(count: int, width: int, levels: int = 0) -> torch.Tensor:
    """levels: number of different values, so that there are equals."""
    logits = torch.randn(count, width, generator=torch.Generator().manual_seed(width)) * 4
    return logits if not levels else (logits * levels / 8).round() * 8 / levels


@COMPILED
@pytest.mark.parametrize("width", [1, 2, 15, 16, 63, 64, 65, 200, 49_152])
@pytest.mark.parametrize("count", [1, 2, 8, 10])
@pytest.mark.parametrize("levels", [0, 3])
def test_the_compiled_search_finds_what_the_plain_one_finds(width: int, count: int, levels: int) -> None:
    logits = random_logits(4, width, levels)
    found = top_tokens(logits, count, [3, 0, 0], totals=True)
    expected = plain_top_tokens(logits, min(count, width), [3, 0, 0], totals=True)
    assert [(top.ids, top.logits) for top in found] == [(top.ids, top.logits) for top in expected]
    assert [top.log_total for top in found] == pytest.approx([top.log_total for top in expected], rel=1e-5, abs=1e-5)
    assert expected[1].log_total == pytest.approx(float(torch.logsumexp(logits[0], -1)), rel=1e-5, abs=1e-5)


@COMPILED
def test_rows_of_a_wider_matrix_are_read_where_they_lie() -> None:
    logits = random_logits(3, 100)
    assert rows._compiled(logits[:, :70], 5, [0, 2], False) is not None
    for view in (logits[:, :70], logits[:, ::2], logits.double()):
        found = top_tokens(view, 5, [0, 2])
        assert [top.ids for top in found] == [tuple(ids) for ids in torch.topk(view[[0, 2]], 5).indices.tolist()]


def test_impossible_tokens_are_left_to_the_plain_search() -> None:
    logits = torch.full((1, 80), -math.inf)
    logits[0, 70], logits[0, 3] = 1.0, 0.5
    (top,) = top_tokens(logits, 3)
    assert top.ids[:2] == (70, 3)
    assert top.logits[2] == -math.inf
    (top,) = top_tokens(logits, 2, totals=True)
    assert top.log_total == pytest.approx(math.log(math.exp(1.0) + math.exp(0.5)))


def test_no_rows_are_no_tokens() -> None:
    assert top_tokens(torch.zeros(2, 9), 3, []) == []


def test_without_a_compiler_the_plain_search_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "load_library", lambda: "no C compiler was found")
    logits = random_logits(2, 50)
    assert [top.ids for top in top_tokens(logits, 4)] == [tuple(ids) for ids in torch.topk(logits, 4).indices.tolist()]

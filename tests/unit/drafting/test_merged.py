from __future__ import annotations

import pytest
import torch

from paceline.drafting.base import DrafterContext
from paceline.drafting.merged import MergedDrafter
from paceline.drafting.ngram import NgramDrafter
from paceline.drafting.recycling import RecyclingDrafter
from paceline.drafting.registry import create
from paceline.drafting.rows import TopTokens
from paceline.errors import OptionError
from paceline.records import Verdict
from toys import make_view
from unit.drafting.kit import always

CONTEXT = DrafterContext(vocab_size=16, max_context=64)


def test_the_parts_share_one_tree() -> None:
    recycling = RecyclingDrafter(16)
    recycling.learn(2, TopTokens((9, 3), (1.0, 0.0)))
    drafter = MergedDrafter([NgramDrafter(), recycling])
    session = drafter.open(make_view([1, 2, 3, 4, 1, 2]))
    outlook = session.outlook(4)
    draft = session.propose(4, always)
    assert outlook.available >= len(draft)
    assert draft.parents is not None
    roots = {token for token, parent in zip(draft.tokens, draft.parents, strict=True) if parent == -1}
    assert roots == {3, 9}
    assert draft.tokens[0] == 9  # the surer of the two comes first


def test_parts_learn_from_the_committed_path() -> None:
    recycling = RecyclingDrafter(4)
    drafter = MergedDrafter([NgramDrafter(), recycling])
    assert drafter.wants_logits
    view = make_view([1, 2, 1])
    session = drafter.open(view)
    draft = session.propose(2, always)
    assert draft.tokens == (2, 1)
    view.tokens += [2, 3]
    session.observe(Verdict((0,), (2, 3)), torch.eye(4)[[2, 3, 0]])
    assert recycling.successors[[1, 2], 0].tolist() == [2, 3]


def test_only_drafters_that_choose_their_tokens_can_be_merged() -> None:
    assert create("merged:ngram|suffix", {}, CONTEXT).name == "merged:ngram|suffix"
    for part in ("stand", "model", "nothing"):
        with pytest.raises(OptionError, match="cannot merge"):
            create(f"merged:ngram|{part}", {}, CONTEXT)


def test_memory_is_that_of_the_parts() -> None:
    drafter, view = create("merged:ngram|suffix", {}, CONTEXT), make_view([1, 2, 3, 1, 2])
    parts = [create(name, {}, CONTEXT) for name in ("ngram", "suffix")]
    sessions = [part.open(view) for part in (drafter, *parts)]
    for session in sessions:
        session.outlook(4)
    together, *alone = (session.memory_bytes() for session in sessions)
    assert all(alone)
    assert together == sum(alone)
    assert drafter.memory_bytes() == sum(part.memory_bytes() for part in parts) > 0

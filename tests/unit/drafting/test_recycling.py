from __future__ import annotations

import torch

from paceline.drafting.recycling import RecyclingDrafter
from paceline.drafting.rows import TopTokens, row_tokens, top_tokens
from paceline.drafting.templates import LearntTemplate
from paceline.drafting.trees import depths
from paceline.records import Verdict
from toys import make_view
from unit.drafting.kit import always


def filled(*, tree: bool) -> RecyclingDrafter:
    drafter = RecyclingDrafter(6, tree=tree)
    for token, ids in {3: (1, 4), 1: (2, 5), 4: (0, 3), 2: (3, 1)}.items():
        drafter.learn(token, TopTokens(ids, (2.0, 1.0)))
    return drafter


def test_tree_follows_the_matrix_by_rank() -> None:
    drafter = filled(tree=True)
    draft = drafter.open(make_view([9, 3])).propose(63, always)
    assert draft.parents is not None
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    # worked example: ranks (0) (1) (0,0) (0,1) (1,0) (0,0,0) below token 3
    assert {(1,), (4,), (1, 2), (1, 5), (4, 0), (1, 2, 3)} <= set(paths)
    assert len(set(paths)) == len(paths)


def test_chain_follows_the_best_successors_up_to_an_unknown_token() -> None:
    drafter = filled(tree=False)
    session = drafter.open(make_view([9, 4]))
    assert session.propose(8, always).tokens == (0,)
    assert drafter.open(make_view([9, 3])).propose(5, always).tokens == (1, 2, 3, 1, 2)
    assert drafter.open(make_view([5])).outlook(4).available == 0


def test_nothing_follows_an_end_token() -> None:
    for tree in (False, True):
        draft = filled(tree=tree).open(make_view([3], end_ids=[2])).propose(16, always)
        parents = draft.parents or tuple(range(-1, len(draft) - 1))
        assert 2 in draft.tokens
        assert all(parent < 0 or draft.tokens[parent] != 2 for parent in parents)


def test_own_rounds_teach_every_row_and_rounds_of_others_the_committed_path() -> None:
    drafter = filled(tree=False)
    view = make_view([3])
    session = drafter.open(view)
    draft = session.propose(3, always)
    assert draft.tokens == (1, 2, 3)
    logits = torch.zeros(4, 6)
    for row, best in enumerate((5, 4, 3, 2)):
        logits[row, best] = 2.0
        logits[row, 0] = 1.0
    view.tokens += [1, 4]  # one accepted
    session.observe(Verdict((0,), (1, 4)), logits)
    assert drafter.successors[:, 0].tolist()[1:4] == [4, 3, 5]  # 3: by the accepted row 0, not by the rejected row 3
    view.tokens += [5]
    session.observe(None, torch.tensor([[0.0, 0, 0, 0, 0, 9], [9.0, 0, 0, 0, 0, 0]]))
    assert drafter.successors[4, 0] == 5
    assert drafter.successors[5, 0] == -1


def test_the_accepted_occurrence_of_a_token_is_learnt_last() -> None:
    rows = row_tokens([7, 1, 2], 1, (8, 1, 8), Verdict((1,), (1, 2)), 4)
    assert rows == [(1, 8), (3, 8), (0, 7), (2, 1)]


def test_evidence_grows_with_the_lead_of_the_best_successor() -> None:
    drafter = RecyclingDrafter(4)
    signals = []
    for lead in (0.1, 1.5, 3.0, 4.0, 5.0, 9.0):
        drafter.learn(0, TopTokens((1, 2), (lead, 0.0)))
        signals.append(drafter.open(make_view([0])).outlook(4).signal)
    assert signals == [1, 2, 3, 4, 5, 6]


def test_top_tokens_are_in_order() -> None:
    logits = torch.tensor([[0.5, 3.0, -1.0, 2.0]])
    assert top_tokens(logits, 3) == [TopTokens((1, 3, 0), (3.0, 2.0, 0.5))]
    both = torch.cat([logits, -logits])
    assert top_tokens(both, 3, [1, 0]) == [*top_tokens(-logits, 3), *top_tokens(logits, 3)]
    assert logits[0, 1] == 3.0


def test_the_template_follows_what_is_accepted() -> None:
    template = LearntTemplate((0.5, 0.2, 0.1))
    assert max(depths(template.shape(6).parents)) >= 3
    for _ in range(400):
        shape = template.shape(6)
        second = next(i for i, (p, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True)) if p == -1 and rank == 0)
        rejected = Verdict((), (0,))
        template.learn(shape.parents, shape.ranks, rejected if _ % 10 else Verdict((second,), (0, 0)))
    assert template.rank_probs[0] < 0.25
    assert template.rank_probs == sorted(template.rank_probs, reverse=True)
    assert len(template.shape(4)) == 4

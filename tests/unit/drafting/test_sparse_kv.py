"""Which rows a sparse copy keeps, and that the copy holds what it should."""

from __future__ import annotations

import pytest
import torch

from paceline.drafting.self_draft.rows import attended, block_counts, block_shares, ends, pooled, redundancy, spread
from paceline.execution.base import Segment
from unit.drafting.self_kit import BACKENDS, COMPILED, PROMPT, all_of, in_cache, make, target

MASS = torch.tensor([0.09, 0.50, 0.12, 0.05, 0.60, 0.10])


def test_first_and_last_rows() -> None:
    assert ends(20, 8).tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    assert ends(20, 4).tolist() == [0, 1, 18, 19]
    assert ends(5, 8).tolist() == [0, 1, 2, 3, 4]


def test_attention_is_pooled_before_the_best_are_taken() -> None:
    assert pooled(MASS[None], 3)[0].tolist() == pytest.approx([0.1967, 0.2367, 0.2233, 0.2567, 0.25, 0.2333], abs=1e-4)
    mass = torch.cat([MASS, torch.tensor([9.0, 9.0])])[None, None]
    assert attended(mass, 4, recent=2, kernel=3).tolist() == [[[3, 4, 6, 7]]]
    assert attended(mass, 4, recent=2, kernel=1).tolist() == [[[1, 4, 6, 7]]]


def test_attended_rows_are_chosen_for_each_head_before_the_recent_ones() -> None:
    mass = torch.tensor([[[9.0, 0, 0, 0, 5, 0, 7, 7], [0, 0, 9.0, 0, 0, 5, 7, 7]]])
    assert attended(mass, 4, recent=2, kernel=1).tolist() == [[[0, 4, 6, 7], [2, 5, 6, 7]]]
    assert attended(mass, 4, recent=3, kernel=1).tolist() == [[[0, 5, 6, 7], [2, 5, 6, 7]]]


@COMPILED
@pytest.mark.parametrize(("recent", "kept"), [(0.0, 1), (0.75, 3), (0.95, 3)])
def test_attention_decides_over_what_the_recent_rows_leave(recent: float, kept: int) -> None:
    view = in_cache()
    session = make("sparse_kv", choose="attended", budget=4, queries=1, recent=recent, least_context=2).open(view)
    assert view.sequence is not None
    length = view.sequence.length
    rows = session._choose(view.sequence)
    assert rows.shape[-1] == 4
    assert (rows[..., -kept:] == torch.arange(length - kept, length)).all()
    mass = session._runner.attention_mass(view.sequence, view.tokens[length - 1 : length])
    assert torch.equal(rows, attended(mass, 4, recent=kept))


def test_shares_of_blocks_form_a_bell() -> None:
    shares = block_shares(16, centre=2.0)
    assert list(shares) == [1, 2, 4, 8, 16]
    assert list(shares.values()) == pytest.approx([0.0545, 0.2442, 0.4026, 0.2442, 0.0545], abs=1e-4)
    assert sum(k * share for k, share in shares.items()) == pytest.approx(4.979, abs=1e-3)


@pytest.mark.parametrize(("blocks", "block", "budget"), [(10, 16, 50), (126, 64, 321), (7, 8, 56), (40, 64, 39)])
def test_blocks_share_the_budget(blocks: int, block: int, budget: int) -> None:
    counts = block_counts(blocks, block, budget)
    assert len(counts) == blocks
    assert counts == sorted(counts, reverse=True)
    assert set(counts) <= {2**i for i in range(block.bit_length())}
    assert 0.7 * budget < sum(counts) <= max(budget, blocks)


def test_blocks_of_like_keys_are_redundant() -> None:
    alike, mixed = torch.ones(1, 4, 8), torch.eye(8)[None, :4]
    values = redundancy(torch.cat([alike, mixed], dim=1), block=4)[0]
    assert values[0] == pytest.approx(1.0)
    assert values[1] == pytest.approx(0.5)


def test_a_spread_keeps_the_ends_and_more_of_blocks_that_differ() -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 100, 8)
    keys[0, 8:48] = 1.0  # the first head's blocks 1 to 5 are all alike
    mass = torch.rand(2, 100)
    mass[:, 50] = 10.0
    rows = spread(mass, keys, budget=48, block=8)
    assert rows.shape[0] == 2
    assert (rows.diff(dim=-1) > 0).all()
    assert rows.shape[1] <= 48
    for head in rows.tolist():
        assert set(range(8)) | set(range(88, 100)) <= set(head)
        assert any(48 <= row <= 52 for row in head)
    alike, unlike = (sum(low <= row < low + 40 for row in rows[0].tolist()) for low in (8, 48))
    assert alike < unlike


def test_below_its_context_nothing_is_offered() -> None:
    session = make("sparse_kv", "lean", least_context=9).open(in_cache("lean"))
    assert session.outlook(4).available == 0
    assert make("sparse_kv", "lean", least_context=8).open(in_cache("lean")).outlook(4).available == 4


@pytest.mark.parametrize("choose", ["ends", "attended", "spread"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_budget_for_the_whole_context_drafts_what_the_target_says(backend: str, choose: str) -> None:
    run, view = target(backend), in_cache(backend)
    expected, copy = [], run.fork(view.sequence)
    token = PROMPT[-1]
    for _ in range(4):
        token = int(run.forward([Segment(copy, [token])]).logits[0].argmax())
        run.accept(copy, [0])
        expected.append(token)
    drafter = make("sparse_kv", backend, choose=choose, budget=64, least_context=2)
    assert all_of(drafter.open(view), 4).tokens == tuple(expected)


@COMPILED
def test_the_copy_takes_over_verified_rows_and_is_renewed_in_time() -> None:
    run, view = target(), in_cache()
    sequence = view.sequence
    assert sequence is not None
    gathers: list[int] = []
    gather = run.gather

    def counted(whole, rows):
        gathers.append(whole.length)
        return gather(whole, rows)

    drafter = make("sparse_kv", budget=4, refresh=4, least_context=2)
    drafter.runner = run
    session = drafter.open(view)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "gather", counted)
        for _ in range(6):
            draft = all_of(session, 2)
            run.forward([Segment(sequence, (view.tokens[-1], *draft.tokens))])
            run.accept(sequence, [0, 1])
            view.tokens += [draft.tokens[0], 11]
            copied = session._copy
            assert copied is not None
            assert copied.length == 4 + len(view.tokens) - 3 - gathers[-1]
    assert gathers == [7, 11, 15]
    rows = torch.cat([ends(15, 4), torch.arange(15, sequence.length)])
    run.follow(session._copy, sequence)
    fresh = gather(sequence, rows)
    logits = [run.forward([Segment(cache, [5])]).logits.clone() for cache in (session._copy, fresh)]
    assert torch.equal(*logits)


@COMPILED
def test_a_text_that_is_withdrawn_leaves_the_copy_too() -> None:
    run, view = target(), in_cache()
    sequence = view.sequence
    assert sequence is not None
    session = make("sparse_kv", budget=4, least_context=2).open(view)
    all_of(session, 2)
    for token in (3, 4, 5):
        run.forward([Segment(sequence, [view.tokens[-1]])])
        run.accept(sequence, [0])
        view.tokens.append(token)
    all_of(session, 2)
    assert session.rewind(9)
    run.truncate(sequence, 8)
    del view.tokens[9:]
    all_of(session, 3)
    rows = torch.cat([ends(7, 4), torch.tensor([7])])
    logits = [run.forward([Segment(cache, [5])]).logits.clone() for cache in (session._copy, run.gather(sequence, rows))]
    assert torch.equal(*logits)
    assert session.rewind(3)
    assert session._copy is None

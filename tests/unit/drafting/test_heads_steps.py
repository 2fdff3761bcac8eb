"""Every step of every head against the plain reference: chains, drawn chains, trees, after any acceptance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.config import SamplingParams
from paceline.drafting.base import Drafter, DraftSession, SequenceView
from paceline.drafting.heads.medusa import MedusaDrafter
from paceline.drafting.heads.recurrent import RecurrentSession
from paceline.execution.lean import LeanRunner
from paceline.records import Draft, Verdict
from toys import make_view
from unit.drafting.heads_reference import (
    TARGET,
    VOCAB,
    Head,
    PlainHead,
    PlainMedusa,
    drafter_of,
    plain,
    random_eagle,
    random_eagle3,
    random_medusa,
    target_states,
)
from unit.drafting.kit import always
from unit.execution.toy_sources import ToySource, random_tokens

HEADS = {
    "eagle": random_eagle(),
    "eagle without bias": random_eagle(5, bias=False),
    "eagle with biases of q, k and v": random_eagle(6, qkv_biases=True),
    "eagle3": random_eagle3(),
    "eagle3 over the whole vocabulary": random_eagle3(7, reduced=False),
    "eagle3 norm_before_residual": random_eagle3(8, norm_before_residual=True),
    "eagle3 norm_output": random_eagle3(9, norm_output=True),
    "eagle3 norm_before_fc": random_eagle3(10, norm_before_fc=True),
    "eagle3 fc_norm": random_eagle3(11, fc_norm=True),
    "eagle3 of qwen3 layers": random_eagle3(12, qk_norm=True),
    "eagle3 with layers of its own choice": random_eagle3(13, eagle_aux_hidden_state_layer_ids=[1, 6]),
    "medusa": random_medusa(),
    "medusa of two blocks": random_medusa(14, layers=2),
    "medusa on the target's output matrix": random_medusa(15, own=False, bias=False),
}


@lru_cache
def target() -> LeanRunner:
    return LeanRunner(ToySource(TARGET), "fp32")


def make(head: Head, folder: Path, layout: str = "original", *, tree: bool = False, **options: object) -> Drafter:
    return drafter_of(head, folder, target(), layout, tree=tree, **options)


def states_of(drafter: Drafter, tokens: Sequence[int]) -> torch.Tensor:
    """[n, layers, H]: what a runner hands out for these tokens."""
    states = target_states(TARGET, tokens)
    return torch.stack([states[layer] for layer in drafter.wants_hidden], dim=1)


def follow(session: DraftSession, drafter: Drafter, tokens: Sequence[int], seen: int) -> int:
    """Hand the states of all but the pending token to a session that has `seen` some. Returns how many it has now."""
    session.follow(states_of(drafter, tokens)[seen : len(tokens) - 1])
    return len(tokens) - 1


def open_session(drafter: Drafter, tokens: Sequence[int], **view: object) -> tuple[SequenceView, DraftSession]:
    made = make_view(tokens, **view)  # type: ignore[arg-type]
    session = drafter.open(made)
    follow(session, drafter, tokens, 0)
    return made, session


@pytest.mark.parametrize("layout", ["original", "speculators"])
@pytest.mark.parametrize("name", HEADS)
def test_chains_are_those_of_the_reference_step_by_step(name: str, layout: str, tmp_path: Path) -> None:
    head = HEADS[name]
    drafter, reference = make(head, tmp_path, layout), plain(head)
    tokens = random_tokens(7, seed=1)
    view, session = open_session(drafter, tokens)
    draft = session.propose(3, always)
    assert draft.draft_probs is None
    assert len(draft) == 3
    for i, token in enumerate(draft.tokens):
        row = reference.row(view.tokens, draft.tokens[:i])
        assert token == int(row.argmax())
        assert draft.confidences[i] == pytest.approx(float(torch.softmax(row, 0).max()), rel=1e-3)


@pytest.mark.parametrize("name", ["eagle", "eagle3", "eagle3 norm_output"])
def test_drawn_chains_carry_the_references_distribution(name: str, tmp_path: Path) -> None:
    drafter, reference = make(HEADS[name], tmp_path), plain(HEADS[name])
    sampling = SamplingParams(temperature=0.7)
    for seed in range(3):
        view, session = open_session(drafter, random_tokens(5, seed=2), sampling=sampling, seed=seed)
        draft = session.propose(4, always)
        assert draft.draft_probs is not None
        for i, token in enumerate(draft.tokens):
            want = torch.softmax(reference.row(view.tokens, draft.tokens[:i]) / 0.7, 0)
            assert draft.draft_probs[i][token] > 0
            torch.testing.assert_close(draft.draft_probs[i], want, rtol=1e-3, atol=1e-5)


def expanded(reference: PlainHead, tokens: Sequence[int], width: int, levels: int, count: int) -> dict[tuple[int, ...], float]:
    """EAGLE-2's tree as the notes have it: paths and their probabilities, the `count` best of all candidates."""
    candidates: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for _ in range(levels):
        new = []
        for path, prob in frontier:
            best = torch.softmax(reference.row(tokens, path), 0).topk(width)
            new += [((*path, int(t)), prob * float(p)) for t, p in zip(best.indices, best.values, strict=True)]
        candidates |= dict(new)
        frontier = sorted(new, key=lambda item: -item[1])[:width]
    return dict(sorted(candidates.items(), key=lambda item: -item[1])[:count])


def paths_of(draft: Draft) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents or (), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


@pytest.mark.parametrize("name", ["eagle", "eagle3", "eagle3 norm_output"])
def test_trees_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    drafter, reference = make(HEADS[name], tmp_path, tree=True, tree_width=3, tree_levels=3), plain(HEADS[name])
    assert isinstance(reference, PlainHead)
    for seed in range(3):
        view, session = open_session(drafter, random_tokens(5, seed=seed))
        draft = session.propose(8, always)
        paths = paths_of(draft)
        want = expanded(reference, view.tokens, 3, 3, 8)
        assert set(paths) == set(want)
        probs = {(): 1.0}
        for path, confidence in zip(paths, draft.confidences, strict=True):
            probs[path] = probs[path[:-1]] * confidence
            assert probs[path] == pytest.approx(want[path], rel=1e-3)


def test_medusa_trees_hold_each_heads_best_tokens_in_the_learnt_shape(tmp_path: Path) -> None:
    drafter, reference = make(HEADS["medusa"], tmp_path, tree=True), plain(HEADS["medusa"])
    assert isinstance(drafter, MedusaDrafter)
    assert isinstance(reference, PlainMedusa)
    view, session = open_session(drafter, random_tokens(6))
    draft = session.propose(12, always)
    shape = drafter.template.shape(12)
    assert draft.parents == shape.parents
    for path, rank in zip(paths_of(draft), shape.ranks, strict=True):
        row = reference.row(view.tokens, path[:-1])
        assert path[-1] == int(row.topk(rank + 1).indices[rank])
    assert max(len(path) for path in paths_of(draft)) <= drafter.heads.count


def test_medusa_learns_its_trees_shape_from_verdicts(tmp_path: Path) -> None:
    drafter = make(HEADS["medusa"], tmp_path, tree=True)
    assert isinstance(drafter, MedusaDrafter)
    before = drafter.template.rank_probs
    _, session = open_session(drafter, random_tokens(6))
    for _ in range(30):
        draft = session.propose(8, always)
        second = next(i for i, parent in enumerate(draft.parents or ()) if parent == -1 and i)
        session.observe(Verdict((second,), (draft.tokens[second], 5)), None)
    after = drafter.template.rank_probs
    assert after[1] / after[0] > 3 * before[1] / before[0]


@pytest.mark.parametrize("name", ["eagle", "eagle3", "medusa"])
def test_drafts_are_the_references_after_any_acceptance(name: str, tmp_path: Path) -> None:
    drafter, reference = make(HEADS[name], tmp_path), plain(HEADS[name])
    rng = np.random.default_rng(0)
    view, session = open_session(drafter, random_tokens(3))
    seen = 2
    for _ in range(6):
        draft = session.propose(3, always)
        for i, token in enumerate(draft.tokens):
            assert token == int(reference.row(view.tokens, draft.tokens[:i]).argmax())
        accepted = int(rng.integers(0, len(draft) + 1))
        view.tokens += [*draft.tokens[:accepted], int(rng.integers(VOCAB))]
        seen = follow(session, drafter, view.tokens, seen)
        session.observe(None, None)


rounds = st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(0, 4), st.integers(0, VOCAB - 1)), max_size=6)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=rounds, tree=st.booleans(), prompt=st.integers(2, 6))
@pytest.mark.parametrize("name", ["eagle", "eagle3"])
def test_a_head_after_rollbacks_equals_one_that_reads_the_text_at_once(
    name: str, history: list[tuple[bool, int, int, int]], tree: bool, prompt: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    drafter = shared_drafter(name, tree, tmp_path_factory)
    view, session = open_session(drafter, random_tokens(prompt))
    seen = prompt - 1
    for drafts, num_draft, accepted, other in history:
        path = draft_path(session.propose(num_draft, always)) if drafts else []
        view.tokens += [*path[:accepted], other]
        seen = follow(session, drafter, view.tokens, seen)
        session.observe(None, None)
    _, afresh = open_session(drafter, view.tokens)
    assert isinstance(session, RecurrentSession)
    assert isinstance(afresh, RecurrentSession)
    mine, new = session.propose(6, always), afresh.propose(6, always)
    assert session.cached_pairs == afresh.cached_pairs == len(view.tokens) - 1
    for part, other_part in zip(session._cache.committed(0) or (), afresh._cache.committed(0) or (), strict=True):
        torch.testing.assert_close(part, other_part, rtol=1e-4, atol=1e-5)
    assert mine.tokens == new.tokens
    assert mine.parents == new.parents
    assert mine.confidences == pytest.approx(new.confidences, rel=3e-3)


_DRAFTERS: dict[tuple[str, bool], Drafter] = {}


def shared_drafter(name: str, tree: bool, folders: pytest.TempPathFactory) -> Drafter:
    """Sessions do not change a head, so the examples of a property share it."""
    if (name, tree) not in _DRAFTERS:
        _DRAFTERS[name, tree] = make(HEADS[name], folders.mktemp("head"), tree=tree, tree_width=2, tree_levels=3)
    return _DRAFTERS[name, tree]


def draft_path(draft: Draft) -> list[int]:
    """The first root-to-leaf path of a draft."""
    return list(draft.tokens) if draft.parents is None else list(max(paths_of(draft), key=len, default=()))


@pytest.mark.parametrize("name", ["eagle", "eagle3", "medusa"])
def test_a_draft_asked_for_twice_is_the_same(name: str, tmp_path: Path) -> None:
    for tree in (False, True):
        _, session = open_session(make(HEADS[name], tmp_path, tree=tree), random_tokens(5))
        assert session.propose(3, always) == session.propose(3, always)


@pytest.mark.parametrize("name", ["eagle", "medusa"])
def test_states_that_were_missed_leave_nothing_to_propose(name: str, tmp_path: Path) -> None:
    drafter = make(HEADS[name], tmp_path)
    view = make_view(random_tokens(5))
    session = drafter.open(view)
    assert session.outlook(4).available == 0
    assert session.propose(4, always).tokens == ()
    follow(session, drafter, view.tokens, 1)
    assert session.outlook(4).available == 0
    assert drafter.open(make_view([3])).outlook(4).available == 0


def test_a_prompt_that_comes_in_chunks_is_read_in_chunks(tmp_path: Path) -> None:
    drafter = make(HEADS["eagle"], tmp_path)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(700, 1, 32, generator=generator)
    view = make_view((torch.arange(701) % VOCAB).tolist())
    session, whole = drafter.open(view), drafter.open(view)
    for start in range(0, 700, 200):
        session.follow(states[start : start + 200])
    whole.follow(states)
    assert isinstance(session, RecurrentSession)
    assert session.cached_pairs == 600  # more than a chunk waited
    assert session.outlook(4).catch_up == 99
    mine, want = session.propose(4, always), whole.propose(4, always)
    assert mine.tokens == want.tokens
    assert mine.confidences == pytest.approx(want.confidences, rel=1e-3)


def test_a_chain_stops_where_the_controller_or_an_end_token_says_so(tmp_path: Path) -> None:
    for name in ("eagle", "medusa"):
        drafter = make(HEADS[name], tmp_path / name)
        tokens = random_tokens(5)
        _, session = open_session(drafter, tokens)
        free = session.propose(3, always)
        assert len(session.propose(3, lambda f: f.position < 2)) == 2
        _, session = open_session(drafter, tokens, end_ids=[free.tokens[0]])
        assert session.propose(3, always).tokens == free.tokens[:1]


def test_nothing_grows_below_an_end_token(tmp_path: Path) -> None:
    for name in ("eagle", "medusa"):
        drafter = make(HEADS[name], tmp_path / name, tree=True)
        tokens = random_tokens(5)
        _, session = open_session(drafter, tokens)
        end = session.propose(10, always).tokens[0]
        _, session = open_session(drafter, tokens, end_ids=[end])
        draft = session.propose(10, always)
        ends = {i for i, token in enumerate(draft.tokens) if token == end}
        assert ends
        assert not ends & set(draft.parents or ())


def test_tokens_outside_the_reduced_vocabulary_are_impossible(tmp_path: Path) -> None:
    head = HEADS["eagle3"]
    ids = {i + int(offset) for i, offset in enumerate(head.tensors["d2t"])}
    _, session = open_session(make(head, tmp_path), random_tokens(5), sampling=SamplingParams(temperature=1.0))
    probs = session.propose(2, always).draft_probs
    assert probs is not None
    assert probs.shape == (2, VOCAB)
    assert {int(i) for i in probs[0].nonzero()} <= ids
    assert math.isclose(float(probs[0].sum()), 1.0, rel_tol=1e-5)

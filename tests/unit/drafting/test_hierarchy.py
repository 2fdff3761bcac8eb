"""Drafters for drafters: caches that follow, their control, and the borders of context and text."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.config import SamplingParams
from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable, DraftCost
from paceline.drafting.base import Drafter, DrafterContext
from paceline.drafting.hierarchy import CascadeDrafter, CascadeOptions
from paceline.drafting.model import ModelDrafter
from paceline.drafting.ngram import NgramDrafter
from paceline.drafting.registry import create, parse_spec
from paceline.errors import OptionError
from paceline.records import Draft, DraftFeatures, Plan, StepRecord
from toys import ToyRunner, make_view, next_token_language, random_language, speculate_toy
from unit.drafting.hierarchy_kit import SPECS, VOCAB, make
from unit.drafting.kit import always, greedy_text

# ---------- caches and stores ----------


@pytest.mark.parametrize("spec", [spec for specs in SPECS.values() for spec in specs])
def test_drafts_are_the_upper_models_own_text_after_any_acceptance(spec: str) -> None:
    # A language of the whole prefix: any token that is missing from, or stale in, a cache changes the draft.
    target = random_language(VOCAB, order=None, seed=3)
    drafter = make(spec, target, num_draft=3)
    own = drafter.runner.language  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    view = make_view([1, 2, 3])
    session = drafter.open(view)
    for _ in range(40):
        kind = rng.integers(4)
        if kind == 0:  # a round in which another drafter, or none, ran
            view.tokens += rng.integers(0, VOCAB, int(rng.integers(1, 6))).tolist()
            session.observe(None, None)
            continue
        num_tokens = int(rng.integers(1, 8))
        draft = session.propose(num_tokens, always)
        assert 1 <= len(draft) <= num_tokens
        assert list(draft.tokens) == greedy_text(own, view.tokens, len(draft))
        accepted = len(draft) if kind == 1 else int(rng.integers(0, len(draft) + 1))
        view.tokens += [*draft.tokens[:accepted], int(rng.integers(VOCAB))]
    session.close()
    runner = drafter.runner
    assert isinstance(runner, ToyRunner)
    assert runner.open_sequences == 0


def test_a_rewound_look_up_proposes_as_before() -> None:
    view = make_view([1, 2, 3, 9, 8, 1, 2])
    session = NgramDrafter().open(view)
    before = session.propose(4, always)
    assert before.tokens == (3, 9, 8, 1)
    for withdrawn in ([3, 5], [7, 1, 2], [0], [3, 9, 8, 1, 2]):
        view.tokens += withdrawn
        session.outlook(4)
        assert session.rewind(7)
        del view.tokens[7:]
        assert (session.propose(4, always), session.outlook(4)) == (before, NgramDrafter().open(view).outlook(4))


def test_a_fully_kept_draft_is_not_fed_again() -> None:
    language = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 1) % VOCAB)
    runner = ToyRunner(language, VOCAB)
    drafter = CascadeDrafter(
        ModelDrafter(runner), ModelDrafter(ToyRunner(language, VOCAB)), options=CascadeOptions(controller="fixed")
    )
    view = make_view([0, 1, 2])
    session = drafter.open(view)
    draft = session.propose(6, always)
    view.tokens += [*draft.tokens, (draft.tokens[-1] + 1) % VOCAB]
    assert session.outlook(6).catch_up == 1  # the last drafted token; the pending one is always fed
    runner.fed.clear()
    session.propose(1, always)
    assert runner.fed == [view.tokens[-2:]]


def test_a_good_lower_draft_saves_passes_and_a_hopeless_one_costs_none_more() -> None:
    language = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 1) % VOCAB)
    wrong = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 2) % VOCAB)
    passes = []
    for lower in (language, wrong):
        runner = ToyRunner(language, VOCAB)
        drafter = CascadeDrafter(
            ModelDrafter(runner), ModelDrafter(ToyRunner(lower, VOCAB)), options=CascadeOptions(controller="fixed", num_draft=3)
        )
        draft = drafter.open(make_view([0, 1, 2, 3])).propose(9, always)
        assert len(draft) == 8  # the last place is not worth a pass
        passes.append(runner.forwards)
    assert passes == [2, 8]


def test_drafters_that_learn_from_rows_learn_the_upper_models() -> None:
    target = random_language(VOCAB, order=1, seed=2)
    drafter = make("cascade:token_recycling>model:0", target)
    own = drafter.runner.language  # type: ignore[union-attr]
    view = make_view([0, 1, 2])
    session = drafter.open(view)
    for bonus in range(VOCAB):
        view.tokens += [*session.propose(6, always).tokens, bonus]
        session.observe(None, None)
    known = drafter.lower.successors  # type: ignore[attr-defined]
    assert [known[token, 0] for token in range(VOCAB)] == [int(np.argmax(own((token,)))) for token in range(VOCAB)]


# ---------- control ----------


class Scripted(Controller):
    """Plans given lengths, and keeps what it is told."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = list(lengths)
        self.contexts: list[RoundContext] = []
        self.records: list[StepRecord] = []
        self.finished: list[int] = []

    def plan(self, context: RoundContext) -> Plan:
        self.contexts.append(context)
        length = min(self.lengths.pop(0), context.max_draft, context.outlooks[0].available)
        return Plan(context.outlooks[0].drafter if length else None, length)

    def observe(self, record: StepRecord) -> None:
        self.records.append(record)

    def finish(self, request_id: int) -> None:
        self.finished.append(request_id)


def test_a_levels_controller_may_leave_out_its_lower_draft() -> None:
    language = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 1) % VOCAB)
    drafter = CascadeDrafter(ModelDrafter(ToyRunner(language, VOCAB)), ModelDrafter(ToyRunner(language, VOCAB)))
    drafter.controller = script = Scripted(0, 2, 0, 0)
    session = drafter.open(make_view([0, 1, 2], request_id=7))
    draft = session.propose(6, always)
    session.close()
    assert draft.tokens == (3, 4, 0, 1, 2, 3)
    assert [(r.drafter, r.num_drafted, r.num_accepted, r.num_emitted) for r in script.records] == [
        (None, 0, 0, 1),
        ("model", 2, 2, 3),
        (None, 0, 0, 1),
        (None, 0, 0, 1),
    ]
    assert [context.max_draft for context in script.contexts] == [5, 4, 1]  # a last single place is the upper model's own
    assert script.finished == [7]


def test_a_stop_from_above_ends_the_draft_after_the_running_round() -> None:
    language = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 1) % VOCAB)
    drafter = CascadeDrafter(ModelDrafter(ToyRunner(language, VOCAB)), ModelDrafter(ToyRunner(language, VOCAB)))
    drafter.controller = Scripted(2, 2, 2)
    asked: list[int] = []

    def stop_at_two(features: DraftFeatures) -> bool:
        asked.append(features.position)
        assert features.max_prob == pytest.approx(1.0)
        return features.position != 2

    draft = drafter.open(make_view([0, 1])).propose(12, stop_at_two)
    assert len(draft) == 3  # kept: it was drawn when the answer came
    assert asked == [1, 2, 3]
    assert len(draft.confidences) == 3


def test_the_pacer_of_a_level_gets_the_measured_costs() -> None:
    seen: list[tuple[str, str]] = []

    def level_costs(upper: Drafter, lower: Drafter) -> CostTable:
        seen.append((upper.name, lower.name))
        return CostTable([1, 9], [1], [[1e-3, 2e-3]], drafters={lower.name: DraftCost(1e-5)})

    context = DrafterContext(
        vocab_size=VOCAB, max_context=64, open_model=lambda _: ToyRunner(random_language(VOCAB), VOCAB), level_costs=level_costs
    )
    create("cascade:ngram>model:a>model:b", {}, context)
    assert seen == [("model:a", "ngram"), ("model:b", "cascade:ngram>model:a")]


# ---------- borders ----------


def test_nothing_follows_an_end_token() -> None:
    language = next_token_language(VOCAB, lambda tokens: (tokens[-1] + 1) % VOCAB)
    drafter = CascadeDrafter(
        ModelDrafter(ToyRunner(language, VOCAB)),
        ModelDrafter(ToyRunner(language, VOCAB)),
        options=CascadeOptions(controller="fixed"),
    )
    view = make_view([0, 1], end_ids=[4])
    session = drafter.open(view)
    assert session.propose(12, always).tokens == (2, 3, 4)
    view.tokens += [2, 0]  # it was not kept
    assert session.propose(12, always).tokens == (1, 2, 3, 4)


def test_end_tokens_are_not_drafted_before_min_tokens() -> None:
    drafter = CascadeDrafter(
        ModelDrafter(ToyRunner(next_token_language(VOCAB, lambda _: 4), VOCAB)),
        ModelDrafter(ToyRunner(next_token_language(VOCAB, lambda _: 1), VOCAB)),
        options=CascadeOptions(controller="fixed"),
    )
    draft = drafter.open(make_view([1, 2], end_ids=[4], sampling=SamplingParams(min_tokens=3))).propose(8, always)
    assert len(draft) == 4
    assert 4 not in draft.tokens[:3]
    assert draft.tokens[3] == 4


def test_prompts_beyond_the_upper_models_context_are_left_alone() -> None:
    drafter = make("cascade:ngram>model:0.4", random_language(VOCAB), max_context=8)
    session = drafter.open(make_view([1] * 9))
    assert session.outlook(5).available == 0
    assert session.propose(5, always) == Draft((), drafter=drafter.name)
    assert drafter.runner.forwards == 0  # type: ignore[attr-defined]
    assert speculate_toy(ToyRunner(random_language(VOCAB), VOCAB), drafter, make_view([1] * 20), 5, 4)


@pytest.mark.parametrize("spec", ["cascade:ngram>model:0", "cascade:model:0>model:0>model:0"])
def test_the_context_of_the_upper_model_is_used_to_its_end(spec: str) -> None:
    target = random_language(VOCAB, order=3, seed=4)
    drafter = make(spec, target, max_context=12)
    view = make_view([1, 2, 3, 1, 2])
    session = drafter.open(view)
    while (available := session.outlook(4).available) > 0:
        assert available == min(4, 13 - len(view.tokens))
        draft = session.propose(available, always)
        assert draft.tokens
        view.tokens += draft.tokens
    assert len(view.tokens) == 13


def test_a_narrower_vocabulary_is_padded_with_impossible_tokens() -> None:
    runner = ToyRunner(random_language(4), 4)
    drafter = CascadeDrafter(
        ModelDrafter(runner, vocab_size=VOCAB), ModelDrafter(runner, vocab_size=VOCAB), options=CascadeOptions(controller="fixed")
    )
    draft = drafter.open(make_view([1, 2], sampling=SamplingParams(temperature=1.0))).propose(5, always)
    assert draft.draft_probs is not None
    assert draft.draft_probs.shape == (len(draft), VOCAB)
    assert float(draft.draft_probs[:, 4].sum()) == 0.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cascade:ngram", "write cascade:LOWER>UPPER"),
        ("cascade:>model:1", "write cascade:LOWER>UPPER"),
        ("cascade:ngram>", "write cascade:LOWER>UPPER"),
        ("cascade:model:1>ngram", "'ngram' cannot verify for another drafter"),
        ("cascade:ngram>model:1+tree>model:1", r"'model:1\+tree' cannot verify"),
        ("cascade:ngarm>model:1", "no drafter is named 'ngarm'"),
        ("cascade:quantized_self>model:1", "cannot be loaded again here"),
    ],
)
def test_malformed_hierarchies_are_refused(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(spec, random_language(VOCAB))


def test_heads_cannot_draft_below_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.drafting.ngram.NgramDrafter.wants_hidden", (1,))
    with pytest.raises(OptionError, match="'ngram' reads the target's own states"):
        make("cascade:ngram>model:1", random_language(VOCAB))


def test_names_pass_through_specifications() -> None:
    assert parse_spec("cascade:ngram>model:a/b,ngram") == ["cascade:ngram>model:a/b", "ngram"]
    with pytest.raises(OptionError, match="cascade has no tree form"):
        parse_spec("cascade:ngram>model:a+tree")
    with pytest.raises(OptionError, match="write cascade:LOWER>UPPER"):
        parse_spec("cascade")

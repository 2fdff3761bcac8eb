"""Which rule verifies what, and which combinations are refused."""

import pytest
import torch

from paceline.config import SamplingParams
from paceline.errors import OptionError
from paceline.records import Draft
from paceline.verification.registry import choose_rule, create, names

GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.8)
ROWS = torch.full((2, 4), 0.25)
EMPTY = Draft(())
CHOSEN_CHAIN, CHOSEN_TREE = Draft((1, 2), drafter="ngram"), Draft((1, 2), (-1, -1), drafter="ngram")
DRAWN_CHAIN, DRAWN_TREE = Draft((1, 2), draft_probs=ROWS), Draft((1, 2), (-1, -1), ROWS, without_replacement=True)


@pytest.mark.parametrize(
    ("params", "draft", "seeded", "expected"),
    [
        (GREEDY, CHOSEN_CHAIN, False, "greedy"),
        (GREEDY, DRAWN_TREE, True, "greedy"),
        (SAMPLED, EMPTY, False, "match"),
        (SAMPLED, CHOSEN_CHAIN, False, "match"),
        (SAMPLED, CHOSEN_TREE, False, "match"),
        (SAMPLED, DRAWN_CHAIN, False, "block"),
        (SAMPLED, DRAWN_TREE, False, "traversal"),
        (SAMPLED, DRAWN_CHAIN, True, "match"),
        (SAMPLED, DRAWN_TREE, True, "match"),
    ],
)
def test_auto_takes_the_best_exact_rule(params, draft, seeded, expected):
    assert choose_rule("auto", params, draft, seeded).name == expected


def test_every_rule_carries_its_registered_name_and_is_made_once():
    assert [create(name).name for name in names()] == list(names())
    assert create("block") is create("block")
    assert all(create(name).lossless for name in names())


def test_a_named_rule_is_taken_where_it_fits():
    assert choose_rule("leviathan", SAMPLED, DRAWN_CHAIN, True).name == "leviathan"
    assert choose_rule("rrs", SAMPLED, DRAWN_TREE, False).name == "rrs"
    assert choose_rule("leviathan", SAMPLED, EMPTY, False).name == "match"
    assert choose_rule("leviathan", GREEDY, CHOSEN_TREE, False).name == "greedy"


@pytest.mark.parametrize(
    ("name", "draft", "message"),
    [
        ("blok", DRAWN_CHAIN, "rule = 'blok': unknown; choose one of auto, greedy"),
        ("block", CHOSEN_CHAIN, "draft 'ngram': its tokens are chosen, not drawn"),
        ("traversal", CHOSEN_TREE, "would bias the text"),
        ("block", DRAWN_TREE, "it verifies chains, not trees"),
        ("greedy", DRAWN_CHAIN, "temperature = 0.8"),
    ],
)
def test_combinations_that_would_be_biased_are_refused(name, draft, message):
    with pytest.raises(OptionError, match=message):
        choose_rule(name, SAMPLED, draft, False)


@pytest.mark.parametrize("name", [name for name in names() if create(name).needs_draft_probs])
def test_a_ratio_rule_on_its_own_refuses_a_chosen_draft(name):
    with pytest.raises(ValueError, match="'ngram' lacks"):
        create(name).verify(None, CHOSEN_CHAIN, None, 0)

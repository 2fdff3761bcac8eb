"""Two vocabularies side by side: what ids mean, which are shared, and one text in the ids of both."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from paceline.drafting.cross_vocab.alignment import Alignment, align
from paceline.drafting.cross_vocab.transcript import Transcript
from paceline.drafting.cross_vocab.vocabulary import Vocabulary, shared_ids
from paceline.errors import OptionError
from paceline.models.base import Tokenizer
from paceline.models.tokenizer import FastTokenizer
from tiny_models import SPECIALS, byte_fallback_tokenizer, byte_level_backend, byte_level_tokenizer
from unit.drafting.cross_toys import draft_letters, target_letters


def gemma_like() -> FastTokenizer:
    """As byte_fallback_tokenizer, without a space before a text, with a begin token and a token of two line ends."""
    letters = ["▁", *"abcdehlorstw", "\n", "▁a", "lo", "he", "hel", "hello", "▁hello", "▁w", "é", "\n\n"]
    vocabulary = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "a"), ("l", "o"), ("h", "e"), ("he", "l"), ("hel", "lo"), ("▁", "hello"), ("▁", "w"), ("\n", "\n")]
    backend = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(
        single=["<bos>", "$A"], pair=["<bos>", "$A", "$B"], special_tokens=[("<bos>", 1)]
    )
    return FastTokenizer(backend, end_ids=frozenset({2}))


KINDS = {"byte_level": byte_level_tokenizer, "prefixing": byte_fallback_tokenizer, "gemma_like": gemma_like}


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, "toy")


# ---------- what ids mean ----------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [" hello world", "hello", "a\n\nb", "café 日本 😀", "  two", "\t\r\n"])
def test_ids_inside_a_text_are_its_bytes(kind: str, text: str) -> None:
    one = vocabulary(KINDS[kind]())
    assert one.join(one.encode_inside(text)).decode() == text


def test_conventions_of_the_beginning_are_noticed() -> None:
    found = {kind: (vocabulary(make()).adds_space, vocabulary(make()).begin) for kind, make in KINDS.items()}
    assert found == {"byte_level": (False, ()), "prefixing": (True, ()), "gemma_like": (False, (1,))}
    assert vocabulary(gemma_like()).encode("hello")[0] == 1


def test_spellings_of_spaces_and_bytes_agree_across_kinds() -> None:
    level, fallback = byte_level_tokenizer(), gemma_like()
    pairs = shared_ids(vocabulary(level), vocabulary(fallback), 10**6, 10**6)
    names = {(level.backend.id_to_token(ours), fallback.backend.id_to_token(theirs)) for ours, theirs in pairs}
    assert {("Ġa", "▁a"), ("Ġ", "▁"), ("ĊĊ", "\n\n"), ("hello", "hello"), ("Ã", "<0xC3>"), ("h", "h")} <= names
    assert ("h", "<0x68>") not in names  # the piece that the tokenizer uses, not the byte
    assert len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs}) == len(pairs)


def test_special_tokens_are_shared_by_name_and_lone_end_tokens_by_their_part() -> None:
    level = byte_level_tokenizer()
    renamed = FastTokenizer(byte_level_backend(extra=["<x>"]), end_ids=frozenset({2}))
    assert dict(shared_ids(vocabulary(level), vocabulary(renamed), 10**6, 10**6))[1] == 1
    pairs = dict(shared_ids(vocabulary(target_letters("<end>")), vocabulary(draft_letters("<stop>")), 10**6, 10**6))
    assert pairs == {0: 5, 1: 2, 3: 0, 4: 6}
    assert vocabulary(draft_letters("<stop>")).names_in(vocabulary(target_letters("<end>"))) == {6: "<end>"}


def test_rows_that_a_model_lacks_are_not_shared() -> None:
    assert shared_ids(vocabulary(target_letters()), vocabulary(draft_letters()), 3, 3) == [(1, 2)]


def test_a_tokenizer_that_marks_word_parts_otherwise_is_refused() -> None:
    parts = ["[UNK]", *(f"##{a}{b}" for a in "abcd" for b in "efgh"), *"abcdefgh", *(f"##{a}" for a in "abcdefgh")]
    backend = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(parts)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(OptionError, match=r"tokenizer of 'toy': its texts are not the bytes of its tokens .* cannot be translated"):
        Vocabulary(FastTokenizer(backend), "toy")


# ---------- alignment: the examples of drafting.md section 7 ----------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([11, 12, 13, 14, 15], [13, 14, 20, 21, 22], Alignment(1, [20], [21, 22])),
        ([11, 12, 13], [12, 13, 30, 31], Alignment(0, [], [30, 31])),
        ([1, 2, 3], [4, 5], None),
        ([1, 2, 3, 4], [9, 2, 3], Alignment(1, [], [])),
    ],
)
def test_windows_align_along_the_longest_diagonal(old: list[int], new: list[int], expected: Alignment | None) -> None:
    assert align(old, new) == expected


# ---------- one text in the ids of both ----------


def follow(transcript: Transcript, pieces: list[list[int]]) -> list[int]:
    """Reads a text in pieces; the smallest length that the ids were cut back to, for each piece."""
    tokens: list[int] = []
    cuts = []
    for piece in pieces:
        tokens += piece
        cut = [len(transcript.ids)]
        transcript.read(tokens)
        transcript.catch_up(cut.append)
        cuts.append(min(cut))
    return cuts


def test_a_token_that_merges_with_the_next_one_is_encoded_again() -> None:
    target, draft = vocabulary(target_letters()), vocabulary(draft_letters())
    transcript = Transcript(target, draft)
    assert follow(transcript, [[3, 0], [1], [3]]) == [0, 2, 1]  # c a | b | c: the three become one
    assert transcript.ids == [0, 3]  # c abc
    assert transcript.num_encoded == 4


TEXT = st.text(alphabet=st.sampled_from(list("abchelo wé日😀\n")), max_size=120)


@settings(max_examples=80, deadline=None)
@given(text=TEXT, seed=st.integers(0, 99), target=st.sampled_from(sorted(KINDS)), draft=st.sampled_from(sorted(KINDS)))
def test_the_transcript_says_what_the_target_said_however_it_arrives(text: str, seed: int, target: str, draft: str) -> None:
    ours, theirs = vocabulary(KINDS[target]()), vocabulary(KINDS[draft]())
    ids = ours.encode(text)
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(ids) + 1, 6)).tolist()
    transcript = Transcript(ours, theirs)
    before: list[int] = []
    for end in [*cuts, len(ids)]:
        withdrawn: list[int] = []
        transcript.read(ids[:end])
        transcript.catch_up(withdrawn.append)
        kept = withdrawn[0] if withdrawn else len(before)
        assert transcript.ids[:kept] == before[:kept]
        before = list(transcript.ids)
    assert not transcript.in_character
    said = theirs.join(transcript.ids[len(theirs.begin) :]).decode()
    assert said == (" " + text if theirs.adds_space and text else text)
    assert tuple(transcript.ids[: len(theirs.begin)]) == theirs.begin


def test_a_long_text_is_followed_by_windows_and_stays_canonical() -> None:
    target, draft = vocabulary(byte_level_tokenizer()), vocabulary(gemma_like())
    words = " ".join("hello world ab cd lo hel"[i : i + 7] for i in np.random.default_rng(0).integers(0, 17, 300))
    ids = target.encode(words)
    transcript = Transcript(target, draft)
    cuts = follow(transcript, [ids[i : i + 5] for i in range(0, len(ids), 5)])
    assert transcript.ids == draft.encode(words)
    assert cuts == sorted(cuts)  # what is cut off lies in the last words


def test_an_unfinished_character_is_held_back() -> None:
    target, draft = vocabulary(byte_level_tokenizer()), vocabulary(gemma_like())
    transcript = Transcript(target, draft)
    ids = target.encode("aé")
    transcript.read(ids[:2])
    transcript.catch_up(pytest.fail)
    assert transcript.in_character
    assert draft.join(transcript.ids[1:]) == b"a"
    transcript.read(ids)
    assert not transcript.in_character


def test_special_tokens_keep_their_names() -> None:
    target, draft = vocabulary(byte_level_tokenizer()), vocabulary(gemma_like())
    transcript = Transcript(target, draft)
    transcript.read([1, *target.encode("a"), 2])
    transcript.catch_up(pytest.fail)
    assert draft.join(transcript.ids[1:]).decode() == f"{SPECIALS[1]}a{SPECIALS[2]}"


def test_the_targets_own_begin_token_is_not_text() -> None:
    target, draft = vocabulary(gemma_like()), vocabulary(byte_level_tokenizer())
    transcript = Transcript(target, draft)
    transcript.read(target.encode("hello"))
    transcript.catch_up(pytest.fail)
    assert draft.join(transcript.ids) == b"hello"

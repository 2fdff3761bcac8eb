"""Tokenizer pairs: the same, padded, different vocabularies, different splitting."""

from __future__ import annotations

import json

import tokenizers
from tokenizers import normalizers

from paceline.models.compat import compare_tokenizers
from paceline.models.tokenizer import FastTokenizer
from tiny_models import byte_fallback_tokenizer, byte_level_backend, byte_level_tokenizer, byte_vocabulary


def test_a_tokenizer_is_compatible_with_itself() -> None:
    found = compare_tokenizers(byte_level_tokenizer(), byte_level_tokenizer(), "small")
    assert (found.same, found.shared) == (True, len(byte_vocabulary()))
    assert found.message == f"draft 'small' shares the target's tokenizer ({found.shared} entries)"


def test_padding_beyond_the_shorter_vocabulary_is_ignored() -> None:
    longer = FastTokenizer(byte_level_backend(extra=["<pad0>", "<pad1>"]))
    assert compare_tokenizers(byte_level_tokenizer(), longer).same
    assert compare_tokenizers(longer, byte_level_tokenizer()).same


def test_other_vocabularies_are_refused_with_figures_and_a_remedy() -> None:
    found = compare_tokenizers(byte_level_tokenizer(), byte_fallback_tokenizer(), "other")
    assert not found.same
    assert found.shared == 0
    assert "draft 'other' has another tokenizer than the target (276 vs 274 entries, 0 % shared)" in found.message
    assert "name it as tli:other, slem:other or uag:other" in found.message
    assert "use a draft of the same family" in found.message
    assert "\n" not in found.message


def test_one_swapped_entry_is_enough_to_differ() -> None:
    document = json.loads(byte_level_backend().to_str())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    swapped = FastTokenizer(tokenizers.Tokenizer.from_str(json.dumps(document)))
    found = compare_tokenizers(byte_level_tokenizer(), swapped)
    assert (found.same, found.shared) == (False, len(byte_vocabulary()) - 2)


def test_one_vocabulary_with_other_rules_is_refused() -> None:
    backend = byte_level_backend()
    backend.normalizer = normalizers.Lowercase()
    found = compare_tokenizers(byte_level_tokenizer(), FastTokenizer(backend))
    assert not found.same
    assert "splits text otherwise" in found.message
    assert "name it as slem:draft or uag:draft" in found.message

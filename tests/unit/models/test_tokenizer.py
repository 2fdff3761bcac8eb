"""Tokenizers without transformers, chat templates, and text piece by piece."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from paceline.errors import ModelError, PromptError
from paceline.models.tokenizer import FastTokenizer, StreamDecoder, TransformersTokenizer, byte_alphabet, load_tokenizer
from tiny_models import END, TEMPLATE, byte_fallback_tokenizer, byte_level_tokenizer, byte_vocabulary, save_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
FALLBACK = byte_fallback_tokenizer()


def test_text_survives_encoding_and_decoding() -> None:
    text = "hello the 😀 é\n\n  x  STOP"
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


def test_special_tokens_spelt_out_become_their_own_ids_and_are_skipped_in_text() -> None:
    ids = BYTE_LEVEL.encode("a<|im_end|>b")
    assert END in ids
    assert BYTE_LEVEL.decode(ids) == "ab"
    assert BYTE_LEVEL.decode(ids, skip_special=False) == "a<|im_end|>b"


def test_the_byte_alphabet_is_the_librarys() -> None:
    from tokenizers import pre_tokenizers

    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))


def test_token_strings_are_the_vocabulary_by_id() -> None:
    assert BYTE_LEVEL.token_strings() == byte_vocabulary()
    assert BYTE_LEVEL.vocab_size == len(byte_vocabulary())


def test_padding_and_truncation_of_the_file_do_not_apply() -> None:
    backend = BYTE_LEVEL.backend
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert FastTokenizer(backend).encode("abcd") == [BYTE_LEVEL.encode(c)[0] for c in "abcd"]


def streamed(tokenizer: FastTokenizer, ids: list[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join([*map(decoder.push, ids), decoder.flush()])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 1), max_size=40))
def test_pieces_of_any_ids_make_the_decoded_text_with_byte_level_tokens(ids: list[int]) -> None:
    assert streamed(BYTE_LEVEL, ids) == BYTE_LEVEL.decode(ids)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.integers(0, FALLBACK.vocab_size - 1), st.integers(200, FALLBACK.vocab_size - 1)), max_size=40))
def test_pieces_of_any_ids_make_the_decoded_text_with_byte_fallback(ids: list[int]) -> None:
    assert streamed(FALLBACK, ids) == FALLBACK.decode(ids)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=30))
def test_pieces_of_any_text_make_it_again(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert streamed(BYTE_LEVEL, BYTE_LEVEL.encode(text)) == text


def test_pieces_with_a_decoder_of_another_kind() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(["▁a", "▁", "b", "▁c"])}, unk_token="b"))
    backend.decoder = decoders.Metaspace()
    tokenizer = FastTokenizer(backend)
    for ids in ([0, 2, 3], [1, 0], [1, 1, 2, 0], [2, 1, 3]):
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, FALLBACK])
def test_text_is_shown_as_soon_as_its_token_is_known(tokenizer: FastTokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode("a hello the word")]
    assert all(pieces[1:])


def test_a_long_stream_never_decodes_it_all_again() -> None:
    calls: list[int] = []

    class Counting(FastTokenizer):
        def decode(self, ids, *, skip_special=True):
            calls.append(len(ids))
            return super().decode(ids, skip_special=skip_special)

    tokenizer = Counting(byte_fallback_tokenizer().backend)
    ids = tokenizer.encode("hello 😀 word " * 50)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert max(calls[:-1]) < 20


def test_a_folder_gives_end_ids_of_all_its_files_and_the_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_ids == {0, 1, 7, END}
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]).endswith("hi<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_file_and_a_named_default_template_are_found(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=[{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}])
    assert load_tokenizer(tmp_path).render_chat([]) == "yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).render_chat([]) == "file"


def test_without_a_template_chat_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=None)
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(ModelError, match="no chat template; give a plain prompt"):
        tokenizer.render_chat([])


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    save_tokenizer(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=rf"{file}.* cannot be read .*fetch the model again"):
        load_tokenizer(tmp_path)


def test_a_folder_without_any_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"cannot be loaded .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_loading_and_chatting_import_no_transformers_and_no_torch(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    code = (
        "import sys; from pathlib import Path; from paceline.models.tokenizer import load_tokenizer\n"
        "t = load_tokenizer(Path(sys.argv[1])); t.encode(t.render_chat([{'role': 'user', 'content': 'hi'}]))\n"
        "assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


REFERENCE_TEMPLATES = [
    TEMPLATE,
    "{{ bos_token }}{%- for m in messages %}\n  {% if m.role == 'user' %}\n[U] {{ m.content | trim }}\n  {% endif %}\n{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}{{ eos_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ tools is none }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
]


@pytest.mark.parametrize("template", REFERENCE_TEMPLATES)
def test_templates_render_as_in_transformers(template: str) -> None:
    transformers = pytest.importorskip("transformers")
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    messages = [{"role": "user", "content": ' <b>"hé"</b> '}, {"role": "assistant", "content": "x"}]
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer().backend, **special)
    ours = FastTokenizer(byte_level_tokenizer().backend, special_tokens=special, chat_template=template)
    expected = reference.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == expected


def test_messages_that_a_template_refuses_are_a_prompt_error() -> None:
    tokenizer = byte_level_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match="refuses them: roles must alternate"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_a_template_that_cannot_be_read_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="chat template cannot be read"):
        byte_level_tokenizer("{% for %}").render_chat([])


def test_a_template_cannot_reach_python() -> None:
    with pytest.raises(PromptError):
        byte_level_tokenizer("{{ messages.__class__.__base__.__subclasses__() }}").render_chat([])


def test_tokenizers_of_transformers_behave_alike() -> None:
    transformers = pytest.importorskip("transformers")
    inner = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer().backend, eos_token="<|im_end|>")
    ours = TransformersTokenizer(inner, frozenset({END}))
    ids = BYTE_LEVEL.encode("hello , the 😀 é<|im_end|> .")
    assert ours.encode("hello , the 😀 é<|im_end|> .") == ids
    assert ours.decode(ids) == BYTE_LEVEL.decode(ids)
    assert ours.token_strings() == BYTE_LEVEL.token_strings()
    assert streamed(ours, ids) == ours.decode(ids)

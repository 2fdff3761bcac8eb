"""Tokenizers without transformers: the `tokenizers` library, a model's special tokens and its chat template.

`StreamDecoder` turns ids into text piece by piece, so that the pieces together are exactly `decode` of all ids.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import decoders

from paceline.errors import ModelError
from paceline.models.base import Tokenizer, first_line

if TYPE_CHECKING:
    import tokenizers

_REPLACEMENT = "\ufffd"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LONGEST_CHARACTER = 8
"""Ids after which text that ends in U+FFFD is taken to be broken for good: no character is this many tokens long."""
NO_TEMPLATE = "chat: this model has no chat template; give a plain prompt instead"


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable Latin-1 stands for itself, the rest is moved past U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


class FastTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` with what surrounds it in a model folder."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_ids: frozenset[int] = frozenset(),
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """special_tokens: `bos_token`, `eos_token`, ... as the chat template may name them."""
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.end_ids = end_ids
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.has_chat_template = chat_template is not None
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._alphabet = byte_alphabet() if isinstance(backend.decoder, decoders.ByteLevel) else None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        if self.chat_template is None:
            raise ModelError(NO_TEMPLATE)
        from paceline.models.chat import render

        return render(self.chat_template, messages, self.special_tokens)

    def token_strings(self) -> list[str | None]:
        return _by_id(self.backend.get_vocab(with_added_tokens=True))

    def token_bytes(self, token_id: int) -> bytes | None:
        if token_id in self._special_ids:
            return b""
        if self._alphabet is None:
            return None
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(self._alphabet[char] for char in token)
        except KeyError:  # an added token, spelt as plain text
            return token.encode()

    @cached_property
    def byte_fallback_ids(self) -> frozenset[int]:
        return _byte_fallback_ids(self.backend.token_to_id)


class TransformersTokenizer(Tokenizer):
    """Any tokenizer of transformers, for folders without a tokenizer.json."""

    def __init__(self, inner: Any, end_ids: frozenset[int]) -> None:
        self.inner = inner
        self.vocab_size = len(inner)
        self.end_ids = end_ids
        self.has_chat_template = bool(inner.chat_template)
        self._special_ids = frozenset(inner.all_special_ids)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=add_special))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        text: str = self.inner.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        if not self.has_chat_template:
            raise ModelError(NO_TEMPLATE)
        text: str = self.inner.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
        return text

    def token_strings(self) -> list[str | None]:
        return _by_id(self.inner.get_vocab())

    def token_bytes(self, token_id: int) -> bytes | None:
        return b"" if token_id in self._special_ids else None

    @cached_property
    def byte_fallback_ids(self) -> frozenset[int]:
        vocabulary = self.inner.get_vocab()
        return _byte_fallback_ids(vocabulary.get)


def _by_id(vocabulary: Mapping[str, int]) -> list[str | None]:
    strings: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        strings[token_id] = token
    return strings


def _byte_fallback_ids(lookup: Callable[[str], int | None]) -> frozenset[int]:
    found = (lookup(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in found if token_id is not None)


class StreamDecoder:
    """Incremental detokenisation: the pieces of `push` and `flush` together are `tokenizer.decode` of all ids.

    Text is held back while it may still change: an unfinished UTF-8 character, or a run of byte-fallback tokens. Each id costs
    O(1) amortised: with fixed bytes it goes through a UTF-8 decoder, else only the last few ids are decoded again. (Ours.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []
        """Last ids whose text is out: what follows is decoded behind them, so that it is not taken for a beginning."""
        self._pending: list[int] = []
        """Ids whose text is not out."""

    def push(self, token_id: int) -> str:
        """Text that became certain with this id; often its own, sometimes none."""
        known = self._tokenizer.token_bytes(token_id)
        if known is not None:
            return self._utf8.decode(known)
        self._pending.append(token_id)
        return "" if token_id in self._tokenizer.byte_fallback_ids else self._release(final=False)

    def flush(self) -> str:
        """The rest, at the end: unfinished characters become U+FFFD."""
        return self._release(final=True) + self._utf8.decode(b"", final=True)

    def _release(self, *, final: bool) -> str:
        if not self._pending:
            return ""
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)[len(before) :]
        if not text or (text.endswith(_REPLACEMENT) and not final and len(self._pending) < _LONGEST_CHARACTER):
            return ""
        self._context, self._pending = self._pending, []
        return text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, without transformers where there is a tokenizer.json. Raises ModelError."""
    config, generation, settings = (_read(folder / f"{name}.json") for name in ("config", "generation_config", "tokenizer_config"))
    path = folder / "tokenizer.json"
    if not path.exists():
        return _load_with_transformers(folder, (config, generation))
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise ModelError(f"tokenizer {str(path)!r} cannot be read ({first_line(error)}); fetch the model again") from error
    special = {name: _content(settings[name]) for name in _SPECIAL_NAMES if settings.get(name)}
    end_ids = _declared_end_ids(config, generation)
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    if eos is not None:
        end_ids |= {eos}
    return FastTokenizer(
        backend, end_ids=end_ids, special_tokens=special, chat_template=_chat_template(folder, settings.get("chat_template"))
    )


def _load_with_transformers(folder: Path, configs: Sequence[Mapping[str, Any]]) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(
            f"tokenizer of {str(folder)!r}: no tokenizer.json, needs transformers: pip install 'paceline[hf]'"
        ) from error
    try:
        inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # many kinds, by tokenizer class
        raise ModelError(f"tokenizer of {str(folder)!r} cannot be loaded ({first_line(error)}); add its tokenizer.json") from error
    end_ids = _declared_end_ids(*configs)
    return TransformersTokenizer(inner, end_ids | ({inner.eos_token_id} if inner.eos_token_id is not None else set()))


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(path)!r} cannot be read ({first_line(error)}); fetch the model again") from error
    return document if isinstance(document, dict) else {}


def _declared_end_ids(*configs: Mapping[str, Any]) -> frozenset[int]:
    """`eos_token_id` of all of them: a chat model often ends turns with one and texts with another."""
    found: set[int] = set()
    for config in configs:
        declared = config.get("eos_token_id")
        found.update(declared if isinstance(declared, list) else [] if declared is None else [declared])
    return frozenset(found)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _chat_template(folder: Path, setting: Any) -> str | None:
    """The template file beside the tokenizer, else the setting: a text, or a list of named ones of which `default` counts."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    named = {entry["name"]: entry["template"] for entry in setting} if isinstance(setting, list) else {"default": setting}
    return named.get("default")

"""A tokenizer.json from the vocabulary and merges of a GGUF.

Byte-level BPE of the families in SPLITS is built here in a second, as the models' own tokenizers split text. Others go through
the conversion of transformers, which is slower. (For SmolLM2 that conversion loses the separate split of digits, so that blank
lines before a digit get other ids; ours keeps it.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ModelError
from paceline.models.base import first_line

if TYPE_CHECKING:
    import tokenizers

_CONTROL, _USER_DEFINED = 3, 4  # of `tokenizer.ggml.token_type`
_DIGITS = "digits"
_GPT2 = "gpt2"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")

SPLITS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""`tokenizer.ggml.pre` -> how text is split before merging (a regular expression, or one of the two named ways)."""


def tokenizer_json(meta: Mapping[str, Any], path: Path) -> str:
    """The tokenizer.json of a GGUF file at `path` with this metadata. Raises ModelError."""
    if meta.get("tokenizer.ggml.model") == "gpt2" and meta.get("tokenizer.ggml.pre") in SPLITS:
        return _byte_level_bpe(meta).to_str()
    return _converted_by_transformers(path)


def tokenizer_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json: special tokens and the chat template."""
    tokens = meta["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = meta.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    if meta.get("tokenizer.chat_template"):
        config["chat_template"] = meta["tokenizer.chat_template"]
    return config


def _byte_level_bpe(meta: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    pre = meta["tokenizer.ggml.pre"]
    split = SPLITS[pre]
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split is _LLAMA3))
    if split in (_GPT2, _DIGITS):
        before: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split == _DIGITS else []
        before.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    else:
        cut = pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated")
        before = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(before)
    tokenizer.decoder = decoders.ByteLevel()
    if split is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    kinds = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for kind in (_CONTROL, _USER_DEFINED):
        marked = [t for t, k in zip(tokens, kinds, strict=True) if k == kind]
        tokenizer.add_tokens([tokenizers.AddedToken(t, special=kind == _CONTROL, normalized=False) for t in marked])
    if meta.get("tokenizer.ggml.add_bos_token", split is _LLAMA3):
        bos_id = meta["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _converted_by_transformers(path: Path) -> str:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError("GGUF tokenizer: this kind needs transformers and gguf: pip install 'paceline[gguf]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except ImportError as error:
        raise ModelError("GGUF tokenizer: this kind needs the gguf package: pip install 'paceline[gguf]'") from error
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"GGUF tokenizer of {path.name!r} cannot be converted ({first_line(error)}); use a model folder"
        ) from error
    text: str = converted.backend_tokenizer.to_str()
    return text

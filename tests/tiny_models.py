"""Tiny tokenizers, model folders and GGUF files, made on the spot."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from paceline.models.tokenizer import FastTokenizer, byte_alphabet

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2
MERGES = ("Ġ t", "h e", "Ġt he", "i n", "Ġ a", "l l", "he ll", "hell o", "Ġ w", "o r", "Ċ Ċ", "Ġ Ġ", "S T", "O P", "ST OP")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_vocabulary(extra: Sequence[str] = ()) -> list[str]:
    """Special tokens, 256 bytes, merged pieces; `extra` goes last."""
    return [*SPECIALS, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES), *extra]


def byte_level_backend(extra: Sequence[str] = ()) -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate(byte_vocabulary(extra))}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return backend


def byte_level_tokenizer(chat_template: str | None = None) -> FastTokenizer:
    return FastTokenizer(byte_level_backend(), end_ids=frozenset({END}), chat_template=chat_template)


def byte_fallback_tokenizer() -> FastTokenizer:
    """In the manner of SentencePiece models: ▁ for spaces, bytes for what the vocabulary lacks."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *"abcdehlorstw"]
    vocabulary = ["<unk>", "<s>", "</s>", *bytes_, *letters, "▁a", "lo", "▁▁", "he"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)},
            [("▁", "a"), ("l", "o"), ("▁", "▁"), ("h", "e")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return FastTokenizer(backend, end_ids=frozenset({2}))


def save_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> None:
    byte_level_backend().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": SPECIALS[END]}, "bos_token": SPECIALS[1], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


_KINDS = {bool: 7, int: 4, float: 6, str: 8}
_FORMS = {bool: "<?", int: "<I", float: "<f"}


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(value: Any) -> bytes:
    return _text(value) if isinstance(value, str) else struct.pack(_FORMS[type(value)], value)


def _pair(key: str, value: Any) -> bytes:
    if isinstance(value, (list, tuple)):
        head = struct.pack("<IIQ", 9, _KINDS[type(value[0])], len(value))
        return _text(key) + head + b"".join(map(_value, value))
    return _text(key) + struct.pack("<I", _KINDS[type(value)]) + _value(value)


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]]) -> None:
    """tensors: name -> (shape as in torch, ggml type number, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(_pair(*item) for item in metadata.items())
    offset, body = 0, b""
    for name, (shape, kind, data) in tensors.items():
        head += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, offset)
        body += data + bytes(-len(data) % 32)
        offset = len(body)
    path.write_bytes(head + bytes(-len(head) % 32) + body)


def q4_1_bytes(quants: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> bytes:
    """quants [rows, columns] 0..15, scales and offsets [rows, columns / 32] float16, as ggml's Q4_1 lays them out."""
    groups = quants.reshape(-1, 32)
    blocks = zip(groups, scales.ravel(), offsets.ravel(), strict=True)
    return b"".join(d.tobytes() + m.tobytes() + bytes(q[:16] | (q[16:] << 4)) for q, d, m in blocks)


def llama_gguf(path: Path, *, hidden: int = 64, layers: int = 2, seed: int = 0, **metadata: Any) -> dict[str, np.ndarray]:
    """A tiny Llama in GGUF: Q4_1 linears, F32 norms and embedding. Returns its weights as stored (before any reordering)."""
    random = np.random.default_rng(seed)
    vocabulary = byte_vocabulary()
    heads, kv_heads, width = 4, 2, 96
    head_dim = hidden // heads
    shapes = {"token_embd.weight": (len(vocabulary), hidden), "output_norm.weight": (hidden,)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (heads * head_dim, hidden),
            f"blk.{i}.attn_k.weight": (kv_heads * head_dim, hidden),
            f"blk.{i}.attn_v.weight": (kv_heads * head_dim, hidden),
            f"blk.{i}.attn_output.weight": (hidden, heads * head_dim),
            f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.ffn_gate.weight": (width, hidden),
            f"blk.{i}.ffn_up.weight": (width, hidden),
            f"blk.{i}.ffn_down.weight": (hidden, width),
        }
    weights, tensors = {}, {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name != "token_embd.weight":
            quants = random.integers(0, 16, shape).astype(np.uint8)
            groups = (shape[0], shape[1] // 32)
            scales = random.uniform(0.01, 0.02, groups).astype(np.float16)
            offsets = random.uniform(-0.2, 0, groups).astype(np.float16)
            spread = [np.repeat(part.astype(np.float32), 32, axis=1) for part in (scales, offsets)]
            weights[name] = quants.astype(np.float32) * spread[0] + spread[1]
            tensors[name] = (shape, 3, q4_1_bytes(quants, scales, offsets))
        else:
            weights[name] = random.normal(0, 0.5, shape).astype(np.float32)
            tensors[name] = (shape, 0, weights[name].tobytes())
    meta = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 128,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": width,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(vocabulary) - len(SPECIALS)),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    write_gguf(path, meta | metadata, tensors)
    return weights

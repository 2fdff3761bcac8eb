"""Hugging Face folders: what is a model folder, lazy tensors, definitions, damaged and missing files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paceline.errors import ModelError
from paceline.models.hf import HFFolderSource, build_model
from tiny_models import END, save_tokenizer

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "eos_token_id": END,
}


def save_model(folder: Path, *, kind: str = "Llama", shard: str = "1GB", **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_tensors_have_the_definitions_names_and_values(tmp_path: Path, tied: bool, shard: str) -> None:
    model = save_model(tmp_path, tie_word_embeddings=tied, shard=shard)
    tensors = HFFolderSource(tmp_path, "tiny").tensors()
    assert set(tensors) == set(model.state_dict())
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_the_definition_is_filled_ready_for_inference(tmp_path: Path, tied: bool) -> None:
    model = save_model(tmp_path, tie_word_embeddings=tied)
    source = HFFolderSource(tmp_path, "tiny")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
    for built in (source.hf_model(torch.float32, "cpu"), build_model(source.config, source.tensors(), torch.float32, "cpu")):
        assert not built.training
        assert not any(parameter.requires_grad for parameter in built.parameters())
        assert torch.equal(built(ids).logits, expected)
        assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
    assert source.hf_model(torch.bfloat16, "cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Mistral", "Gemma3", "Phi", "GPTNeoX"])
def test_other_families_open_without_special_care(tmp_path: Path, kind: str) -> None:
    name = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{name}Config")(**SMALL, **({"head_dim": 8} if kind in ("Qwen3", "Gemma3") else {}))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(HFFolderSource(tmp_path, "tiny").hf_model(torch.float32, "cpu")(ids).logits, model(ids).logits)


def test_pickled_weights_are_read_without_running_code(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    tensors = HFFolderSource(tmp_path, "tiny").tensors()
    assert torch.equal(tensors["model.norm.weight"], model.state_dict()["model.norm.weight"])


def test_configuration_limits_tokenizer_and_precision(tmp_path: Path) -> None:
    save_model(tmp_path)
    source = HFFolderSource(tmp_path, "tiny")
    assert (source.name, source.max_context, source.is_quantised) == ("tiny", 96, False)
    assert source.quant_blocks("model.norm.weight") is None
    assert source.tokenizer.end_ids == {END}


def test_the_fingerprint_follows_configuration_and_weights(tmp_path: Path) -> None:
    save_model(tmp_path)
    first = HFFolderSource(tmp_path, "a").fingerprint
    assert HFFolderSource(tmp_path, "b").fingerprint == first
    save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors")
    second = HFFolderSource(tmp_path, "a").fingerprint
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert len({first, second, HFFolderSource(tmp_path, "a").fingerprint}) == 3


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model = 'tiny': the folder has no config\.json"):
        HFFolderSource(tmp_path, "tiny")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json .*fetch it again"):
        HFFolderSource(tmp_path, "tiny")


@pytest.mark.parametrize("config", [{"architectures": ["BertForMaskedLM"]}, {"model_type": "t5", "is_encoder_decoder": True}])
def test_models_that_are_no_decoders_are_refused(tmp_path: Path, config: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not a decoder-only language model"):
        HFFolderSource(tmp_path, "tiny")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(ModelError, match=r"no \*\.safetensors or pytorch_model\.bin"):
        HFFolderSource(tmp_path, "tiny")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"weight file {shard.name} is missing"):
        HFFolderSource(tmp_path, "tiny")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_cut_weight_file_is_named_in_one_line(tmp_path: Path, file: str) -> None:
    model = save_model(tmp_path)
    if file.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / file)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=rf"{file} cannot be read .*fetch it again") as caught:
        HFFolderSource(tmp_path, "tiny").tensors()
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_the_definition_are_refused() -> None:
    config = {"model_type": "llama", **SMALL}
    with pytest.raises(ModelError, match="do not fit its definition, missing"):
        build_model(config, {"model.norm.weight": torch.ones(32)}, torch.float32, "cpu")


def test_an_unknown_model_type_is_a_model_error(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="transformers cannot build it") as caught:
        HFFolderSource(tmp_path, "tiny").hf_model(torch.float32, "cpu")
    assert "\n" not in str(caught.value)


def test_opening_and_reading_import_no_transformers(tmp_path: Path) -> None:
    save_model(tmp_path)
    code = (
        "import sys; from paceline.models.resolve import open_model\n"
        "source = open_model(sys.argv[1]); source.tokenizer; source.tensors()['model.norm.weight']\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)

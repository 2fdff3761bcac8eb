"""GGUF files: reading, conversion, the cache, weights in the order of the model definition, damaged files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline.errors import CacheError, ModelError
from paceline.models import gguf as gguf_module
from paceline.models.gguf import open_gguf
from paceline.models.gguf_arch import hf_row_order, llama3_factors
from paceline.models.gguf_file import FORMATS, decode_blocks, decode_rows, read_gguf, unpack_blocks
from tiny_models import END, byte_vocabulary, llama_gguf, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PACELINE_CACHE", str(folder))
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.gguf"
    llama_gguf(file)
    return file


def test_the_header_comes_back_as_written(path: Path) -> None:
    contents = read_gguf(path)
    assert contents.metadata["general.architecture"] == "llama"
    assert contents.metadata["tokenizer.ggml.tokens"] == byte_vocabulary()
    assert contents.tensors["blk.0.attn_k.weight"].shape == (32, 64)


def test_the_reader_agrees_with_the_gguf_package(path: Path) -> None:
    package = pytest.importorskip("gguf")
    contents, reference = read_gguf(path), package.GGUFReader(path)
    assert {t.name: (tuple(map(int, t.shape))[::-1], int(t.tensor_type), t.data_offset) for t in reference.tensors} == {
        name: (entry.shape, entry.kind, entry.offset) for name, entry in contents.tensors.items()
    }


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    package = pytest.importorskip("gguf")
    sizes = {int(kind): (kind.name, *size) for kind, size in package.GGML_QUANT_SIZES.items()}
    assert {kind: sizes[kind] for kind in FORMATS} == {k: (f.name, f.weights, f.bytes) for k, f in FORMATS.items()}


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_unpacked_blocks_are_exactly_the_stored_weights(name: str) -> None:
    package = pytest.importorskip("gguf")
    kind = package.GGMLQuantizationType[name]
    weights = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    raw = package.quantize(weights, kind)
    blocks = unpack_blocks(raw, int(kind))
    assert blocks is not None
    assert blocks.quants.dtype == np.uint8
    assert blocks.quants.max() < 2**blocks.bits
    assert np.array_equal(decode_blocks(blocks), package.dequantize(raw, kind))
    assert np.array_equal(decode_rows(raw, int(kind)), package.dequantize(raw, kind))


def test_worked_blocks_by_hand() -> None:
    halves = struct.pack("<ee", 0.5, -1.0)
    q4_1 = np.frombuffer(halves + bytes([0x3A] + [0] * 15), np.uint8).reshape(1, -1)
    weights = decode_rows(q4_1, 3)[0]
    assert (weights[0], weights[16], weights[1]) == (0.5 * 10 - 1, 0.5 * 3 - 1, -1.0)
    q4_0 = np.frombuffer(halves[:2] + bytes([0x3A] + [0] * 15), np.uint8).reshape(1, -1)
    assert decode_rows(q4_0, 2)[0][[0, 16, 1]].tolist() == [0.5 * 2, 0.5 * -5, 0.5 * -8]
    q8_0 = np.frombuffer(halves[:2] + struct.pack("<bb", -3, 127) + bytes(30), np.uint8).reshape(1, -1)
    assert decode_rows(q8_0, 8)[0][:3].tolist() == [-1.5, 63.5, 0.0]


@pytest.mark.parametrize(("kind", "dtype"), [(0, np.float32), (1, np.float16)])
def test_plain_floats_are_read(kind: int, dtype: type) -> None:
    values = np.array([[1.5, -2.0, 0.25]], dtype)
    assert decode_rows(values.view(np.uint8), kind).tolist() == [[1.5, -2.0, 0.25]]
    assert unpack_blocks(values.view(np.uint8), kind) is None


def test_bfloat16_is_read() -> None:
    values = torch.tensor([[1.5, -2.0, 0.25]], dtype=torch.bfloat16)
    assert decode_rows(values.view(torch.uint8).numpy(), 30).tolist() == [[1.5, -2.0, 0.25]]


def test_other_types_go_through_the_gguf_package() -> None:
    package = pytest.importorskip("gguf")
    raw = package.quantize(np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32), package.GGMLQuantizationType.Q5_0)
    assert np.array_equal(decode_rows(raw, 6), package.dequantize(raw, package.GGMLQuantizationType.Q5_0))


def test_without_the_gguf_package_other_types_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"Q5_0 needs the gguf package: pip install 'paceline\[gguf\]'"):
        decode_rows(np.zeros((1, 22), np.uint8), 6)


def test_reordered_rows_rotate_alike() -> None:
    """llama.cpp turns neighbours (2i, 2i+1); model definitions turn (i, i + d/2). On reordered rows both are one rotation."""
    heads, dim = 3, 8
    stored = np.random.default_rng(0).normal(size=heads * dim)
    angle = np.arange(dim // 2) * 0.3 + 0.1

    def rotate(first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
        return [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)]

    neighbours = np.stack(rotate(*np.moveaxis(stored.reshape(heads, dim // 2, 2), 2, 0)), axis=-1).ravel()
    order = hf_row_order(heads * dim, heads)
    halves = np.concatenate(rotate(*np.split(stored[order].reshape(heads, dim), 2, axis=1)), axis=1).ravel()
    np.testing.assert_allclose(halves, neighbours[order])


def test_weights_have_the_definitions_names_and_order(tmp_path: Path) -> None:
    stored = llama_gguf(tmp_path / "tiny.gguf")
    source = open_gguf(tmp_path / "tiny.gguf")
    tensors = source.tensors()
    order = np.arange(64).reshape(4, 8, 2).transpose(0, 2, 1).ravel()
    assert np.array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], stored["blk.1.attn_q.weight"][order])
    assert np.array_equal(tensors["model.layers.1.self_attn.v_proj.weight"], stored["blk.1.attn_v.weight"])
    assert np.array_equal(tensors["model.layers.0.mlp.down_proj.weight"], stored["blk.0.ffn_down.weight"])
    assert np.array_equal(tensors["model.norm.weight"], stored["output_norm.weight"])
    assert tensors["model.norm.weight"].shape == (64,)


def test_a_tied_head_appears_under_both_names(path: Path) -> None:
    source = open_gguf(path)
    tensors = source.tensors()
    assert source.config["tie_word_embeddings"]
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert "lm_head.weight" in tensors
    assert len(list(tensors)) == len(tensors)
    with pytest.raises(KeyError):
        tensors["model.layers.9.mlp.up_proj.weight"]


def test_quant_blocks_are_the_weights_without_rounding(path: Path) -> None:
    source = open_gguf(path)
    tensors = source.tensors()
    assert source.is_quantised
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"):
        name = f"model.layers.1.{module}.weight"
        blocks = source.quant_blocks(name)
        assert blocks is not None
        assert (blocks.bits, blocks.scales.dtype, blocks.offsets.dtype) == (4, np.float32, np.float32)
        assert blocks.quants.flags.c_contiguous
        assert np.array_equal(decode_blocks(blocks), tensors[name])
    assert source.quant_blocks("model.norm.weight") is None
    assert source.quant_blocks("lm_head.weight") is None
    assert source.quant_blocks("nothing") is None


def test_the_model_definition_takes_the_weights(path: Path) -> None:
    pytest.importorskip("transformers")
    source = open_gguf(path)
    model = source.hf_model(torch.float32, "cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in source.tensors().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert source.hf_model(torch.bfloat16, "cpu").dtype == torch.bfloat16


def test_tokenizer_configuration_and_limits_come_from_the_file(path: Path) -> None:
    source = open_gguf(path)
    assert source.max_context == 128
    assert source.tokenizer.end_ids == {END}
    text = "hello the 😀 12\n\n3<|im_end|>"
    assert source.tokenizer.decode(source.tokenizer.encode(text), skip_special=False) == text
    assert source.tokenizer.render_chat([{"role": "user", "content": "a"}]).endswith("<|im_start|>assistant\n")


def test_digits_are_split_before_blank_space(path: Path) -> None:
    encode = open_gguf(path).tokenizer.encode
    assert encode("\n\n1") == encode("\n\n") + encode("1")
    assert encode(" 12") == encode(" ") + encode("1") + encode("2")
    assert encode(" a") != encode(" ") + encode("a")


@pytest.mark.parametrize(("settings", "added"), [({}, []), ({"tokenizer.ggml.add_bos_token": True}, [1])])
def test_a_begin_token_is_added_where_the_file_asks_for_it(tmp_path: Path, settings: dict, added: list[int]) -> None:
    llama_gguf(tmp_path / "tiny.gguf", **settings)
    tokenizer = open_gguf(tmp_path / "tiny.gguf").tokenizer
    assert tokenizer.encode("a") == added + tokenizer.encode("a", add_special=False)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_other_byte_level_splits_keep_text(tmp_path: Path, pre: str) -> None:
    llama_gguf(tmp_path / "tiny.gguf", **{"tokenizer.ggml.pre": pre})
    tokenizer = open_gguf(tmp_path / "tiny.gguf").tokenizer
    text = "hello the  12345 it's\r\n\n 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_is_converted_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = open_gguf(path, name="tiny", progress=said.append)
    monkeypatch.setattr(gguf_module, "_convert", None)
    second = open_gguf(path, progress=said.append)
    assert said == ["preparing tiny.gguf (once)"]
    assert (first.name, second.name) == ("tiny", str(path))
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64


def test_a_changed_file_is_converted_again(path: Path) -> None:
    before = open_gguf(path).fingerprint
    llama_gguf(path, seed=1, **{"llama.context_length": 256})
    after = open_gguf(path)
    assert after.fingerprint != before
    assert after.max_context == 256


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tensors.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_conversion_is_built_anew(path: Path, file: str, damage: str) -> None:
    folder = open_gguf(path).folder
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    content, target = before[file], folder / file
    if damage == "gone":
        target.unlink()
    else:
        target.write_bytes(content[:-40] if damage == "cut" else content.replace(b":", b": 1,"))
    open_gguf(path)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_full_disk_leaves_nothing_behind(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes

    def write_bytes(self: Path, data: bytes) -> int:
        if self.name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(CacheError, match=r"cannot write .*No space left on device; .*PACELINE_CACHE"):
        open_gguf(path)
    assert [p.suffix for p in (cache / "models").iterdir()] == [".lock"]
    monkeypatch.undo()
    monkeypatch.setenv("PACELINE_CACHE", str(cache))
    assert open_gguf(path).max_context == 128


def test_two_processes_that_start_together_convert_once(path: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from paceline.models.gguf import open_gguf\n"
        "print(len(open_gguf(Path(sys.argv[1]), progress=print).tokenizer.encode('hello')))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].split("\n") for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("preparing tiny.gguf (once)" in lines for lines in said) == 1
    assert all("1" in lines for lines in said)
    assert len(list((cache / "models").iterdir())) == 2


def test_opening_imports_neither_transformers_nor_gguf_nor_torch(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from paceline.models.gguf import open_gguf\n"
        "source = open_gguf(Path(sys.argv[1])); source.tokenizer; source.quant_blocks('model.layers.0.mlp.up_proj.weight')\n"
        "assert not {'transformers', 'gguf', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


@pytest.mark.parametrize("keep", [0, 3, 10, 30, 200, 3000, -20000, -64, -1])
def test_a_file_cut_anywhere_is_refused_with_a_line(path: Path, cache: Path, keep: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(ModelError, match=r"tiny\.gguf.*fetch ") as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)
    assert not cache.exists() or [p.suffix for p in (cache / "models").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("at", "bytes_", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "GGUF version 1"),
        (4, struct.pack(">I", 3), "little-endian"),
        (8, struct.pack("<Q", 2**60), "cut short or damaged"),
        (16, struct.pack("<Q", 2**60), "cut short or damaged"),
        (24, struct.pack("<Q", 2**60), "cut short or damaged"),
    ],
)
def test_a_damaged_header_is_refused(path: Path, at: int, bytes_: bytes, message: str) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(bytes_)] = bytes_
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_gguf(path)


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "mamba"}, {"a": ((2,), 0, bytes(8))})
    with pytest.raises(ModelError, match=r"'mamba' is not supported \(known: llama, .*use its Hugging Face folder"):
        open_gguf(tmp_path / "x.gguf")


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, {"blk.0.ffn_gate_exps.weight": ((2,), 0, bytes(8))})
    with pytest.raises(ModelError, match=r"'blk\.0\.ffn_gate_exps\.weight' has no place in a LlamaForCausalLM"):
        open_gguf(tmp_path / "x.gguf")


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, {"token_embd.weight": ((2, 2), 0, bytes(16))})
    with pytest.raises(ModelError, match=r"lacks 'llama\.attention\.head_count'"):
        open_gguf(tmp_path / "x.gguf")


def test_unknown_rope_scaling_is_refused_and_linear_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    llama_gguf(path, **{"llama.rope.scaling.type": "yarn"})
    with pytest.raises(ModelError, match=r"llama\.rope\.scaling\.type = 'yarn' is not supported"):
        open_gguf(path)
    llama_gguf(path, **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert open_gguf(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_llama3_factors_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=1, rope_theta=500000.0, rope_scaling=scaling)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / llama3_factors(scaling, 500000.0, 64), frequencies.numpy(), rtol=1e-5)


def test_a_stored_configuration_is_plain_json(path: Path) -> None:
    config = json.loads((open_gguf(path).folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert (config["rms_norm_eps"], config["rope_theta"], config["eos_token_id"]) == (1e-05, 10000.0, END)

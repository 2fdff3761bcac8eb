"""Files of heads: what is recognised, and that whatever does not fit is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.drafting import registry
from paceline.drafting.base import DrafterContext, DrafterSpec
from paceline.drafting.heads.checkpoint import Checkpoint, read_head
from paceline.drafting.heads.recurrent import RecurrentDrafter
from paceline.drafting.heads.target import DraftVocabulary, HeadTarget
from paceline.errors import ModelError, OptionError
from paceline.execution.kvcache import KVCache
from paceline.execution.lean import LeanRunner
from toys import ToyRunner, random_language
from unit.drafting.heads_reference import TARGET, VOCAB, Head, random_eagle, random_eagle3, random_medusa, write
from unit.execution.toy_sources import ToySource


@pytest.fixture(scope="module")
def context() -> DrafterContext:
    source = ToySource(TARGET)
    return DrafterContext(vocab_size=VOCAB, max_context=512, target=LeanRunner(source, "fp32"), source=source)


def build(head: Head, folder: Path, context: DrafterContext, layout: str = "original", **config: Any) -> RecurrentDrafter:
    return registry.create(f"{head.method}:{write(head, folder, layout, **config)}", {}, context)  # type: ignore[return-value]


def without(head: Head, *names: str) -> Head:
    return replace(head, tensors={name: value for name, value in head.tensors.items() if name not in names})


def with_tensor(head: Head, name: str, value: torch.Tensor) -> Head:
    return replace(head, tensors={**head.tensors, name: value})


@pytest.mark.parametrize("layout", ["original", "speculators"])
@pytest.mark.parametrize("head", [random_eagle(), random_eagle3(), random_medusa()], ids=lambda head: head.method)
def test_both_layouts_are_recognised_by_config_and_by_names_alone(head: Head, layout: str, tmp_path: Path) -> None:
    folder = Path(write(head, tmp_path, layout))
    checkpoint = read_head(str(folder))
    assert (checkpoint.method, checkpoint.layout) == (head.method, layout)
    config = json.loads((folder / "config.json").read_text())
    config.pop("speculators_model_type", None)
    (folder / "config.json").write_text(json.dumps(config))
    by_names = read_head(str(folder))
    assert (by_names.method, by_names.layout) == (head.method, layout)
    assert by_names.tensors.keys() == checkpoint.tensors.keys()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "medusa_lm_head.pt"])
def test_one_file_with_its_config_is_a_head(file: str, tmp_path: Path, context: DrafterContext) -> None:
    folder = write(random_eagle3(), tmp_path, file=file)
    assert registry.create(f"eagle3:{folder}/{file}", {}, context).wants_hidden == (2, 3, 3)


def test_layers_of_the_target_are_those_of_the_config_or_of_the_paper(tmp_path: Path, context: DrafterContext) -> None:
    assert build(random_eagle(), tmp_path / "a", context).wants_hidden == (6,)
    assert build(random_eagle3(), tmp_path / "b", context).wants_hidden == (2, 3, 3)
    own = random_eagle3(eagle_aux_hidden_state_layer_ids=[1, 4, 5])
    assert build(own, tmp_path / "c", context).wants_hidden == (1, 4, 5)
    nested = build(random_eagle3(), tmp_path / "d", context, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 6]})
    assert nested.wants_hidden == (0, 2, 6)
    with pytest.raises(ModelError, match=r"layers \[1, 4, 9\], and heads_target has 6 layers"):
        build(random_eagle3(eagle_aux_hidden_state_layer_ids=[1, 4, 9]), tmp_path / "e", context)


def test_settings_that_equal_a_llamas_defaults_may_be_left_out(tmp_path: Path, context: DrafterContext) -> None:
    head = random_eagle3()
    folder = Path(write(head, tmp_path, "speculators"))
    config = json.loads((folder / "config.json").read_text())
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "hidden_act", "num_hidden_layers", "vocab_size"):
        del config["transformer_layer_config"][name]
    (folder / "config.json").write_text(json.dumps(config))
    drafter = registry.create(f"eagle3:{folder}", {}, context)
    assert isinstance(drafter, RecurrentDrafter)


WRONG = {
    "eagle: a tensor is missing": (without(random_eagle(), "layers.0.mlp.up_proj.weight"), r"mlp\.up_proj\.weight is missing"),
    "eagle: fc is missing": (without(random_eagle(), "fc.weight"), r"fc\.weight missing"),
    "eagle: an unknown tensor": (with_tensor(random_eagle(), "layers.0.gate", torch.ones(2)), r"layer\.gate is unknown"),
    "eagle: a second layer": (
        with_tensor(random_eagle(), "layers.1.mlp.up_proj.weight", torch.ones(2, 2)),
        r"layers\.1\.mlp\.up_proj\.weight is unknown",
    ),
    "eagle: only one bias": (
        with_tensor(random_eagle(), "layers.0.self_attn.q_proj.bias", torch.ones(32)),
        r"layer\.self_attn\.k_proj\.bias is missing; layer\.self_attn\.v_proj\.bias is missing",
    ),
    "eagle: embedding of another vocabulary": (
        with_tensor(random_eagle(), "embed_tokens.weight", torch.ones(64, 32)),
        r"embed_tokens\.weight is 64 x 32 and should be 97 x 32",
    ),
    "eagle3: a tensor is missing": (without(random_eagle3(), "norm.weight"), r"norm\.weight is missing"),
    "eagle3: no output matrix": (without(random_eagle3(), "lm_head.weight"), r"lm_head\.weight is missing"),
    "eagle3: a norm that the settings do not name": (
        with_tensor(random_eagle3(), "input_norm.weight", torch.ones(96)),
        r"input_norm\.weight is unknown",
    ),
    "eagle3: ids beyond the vocabulary": (
        with_tensor(random_eagle3(), "d2t", torch.arange(33) * 3),
        r"ids up to 128, and heads_target has 97 tokens",
    ),
    "eagle3: two ids for one": (with_tensor(random_eagle3(), "d2t", -torch.arange(33)), "maps two tokens"),
    "medusa: a block is missing": (without(random_medusa(), "1.0.linear.weight"), r"blocks\.1\.0\.weight is missing"),
    "medusa: one output matrix is missing": (without(random_medusa(), "2.1.weight"), r"heads\.2\.weight is missing"),
    "medusa: a block of another kind": (
        with_tensor(random_medusa(), "blocks.0.layers.0.norm.weight", torch.ones(1)),
        r"blocks\.0\.layers\.0\.norm\.weight is unknown",
    ),
    "medusa: an unknown tensor": (with_tensor(random_medusa(), "prefix.weight", torch.ones(1)), r"prefix\.weight is unknown"),
    "medusa: an output matrix of another vocabulary": (
        with_tensor(random_medusa(), "1.1.weight", torch.ones(64, 32)),
        r"heads\.1\.weight is 64 x 32 and should be 97 x 32",
    ),
    "another thing altogether": (replace(random_eagle(), tensors={"a": torch.ones(1)}), "neither a Medusa nor an EAGLE head"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path, context: DrafterContext) -> None:
    head, message = WRONG[case]
    with pytest.raises(ModelError, match=message):
        build(head, tmp_path, context)


@pytest.mark.parametrize("head", [random_eagle(), random_eagle3(), random_medusa()], ids=lambda head: head.method)
def test_a_head_of_another_hidden_size_is_refused_with_both_figures(head: Head, tmp_path: Path, context: DrafterContext) -> None:
    assert context.source is not None
    larger = ToySource(TARGET)
    larger.config = {**larger.config, "hidden_size": 64}
    with pytest.raises(ModelError, match="hidden size 32, and heads_target has 64"):
        build(head, tmp_path, replace(context, source=larger))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layernorms": True}, "extra norms"),
        ({"speculators_model_type": "mlp"}, "speculators_model_type = 'mlp'; known: medusa, eagle, eagle3"),
        ({"hidden_act": "gelu"}, "known: llama, qwen2, qwen3, mistral with silu"),
        ({"model_type": "mamba"}, "model_type = 'mamba'"),
        ({"hidden_size": 64}, r"fc\.weight is 32 x 64 and should be 64 x 128"),
    ],
)
def test_settings_of_unknown_variants_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path, context: DrafterContext
) -> None:
    with pytest.raises(ModelError, match=message):
        build(random_eagle(), tmp_path, context, **config)


def test_a_head_under_the_wrong_name_is_told_its_own(tmp_path: Path, context: DrafterContext) -> None:
    for head, kind in (
        (random_eagle(), "eagle3"),
        (random_eagle3(), "eagle"),
        (random_eagle3(), "medusa"),
        (random_medusa(), "eagle"),
    ):
        folder = write(head, tmp_path / f"{head.method}-{kind}")
        with pytest.raises(OptionError, match=f"write {head.method}:"):
            registry.create(f"{kind}:{folder}", {}, context)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no weights there"):
        read_head(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        read_head(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_head(str(tmp_path))
    torch.save([1, 2], tmp_path / "list.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="something else than tensors"):
        read_head(str(tmp_path / "list.bin"))


def test_a_layer_needs_its_config(tmp_path: Path, context: DrafterContext) -> None:
    folder = Path(write(random_eagle(), tmp_path))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        registry.create(f"eagle:{folder}", {}, context)
    medusa = Path(write(random_medusa(), tmp_path / "medusa"))
    (medusa / "config.json").unlink()
    assert registry.create(f"medusa:{medusa}", {}, context).wants_hidden == (6,)


def test_a_target_without_states_is_refused_with_a_remedy(tmp_path: Path, context: DrafterContext) -> None:
    name = f"eagle:{write(random_eagle(), tmp_path)}"
    with pytest.raises(OptionError, match="no target to attach a head to"):
        registry.create(name, {}, DrafterContext(vocab_size=9, max_context=9))
    with pytest.raises(OptionError, match=r"toy backend does not hand out hidden states; use backend = 'lean'"):
        registry.create(name, {}, replace(context, target=ToyRunner(random_language(VOCAB), VOCAB)))


@pytest.mark.parametrize(
    "options", [{"precision": "int2"}, {"tree_width": 0}, {"tree_levels": 99}, {"temperature": -1.0}, {"depth": 3}]
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], tmp_path: Path, context: DrafterContext) -> None:
    with pytest.raises(OptionError):
        registry.create(f"eagle:{write(random_eagle(), tmp_path)}", options, context)


def test_draft_ids_are_offsets_into_the_targets_vocabulary(context: DrafterContext) -> None:
    # drafting.md section 5.5: kept {0, 3, 4, 9} -> d2t = [0, 2, 2, 6]
    checkpoint = Checkpoint("made", "eagle3", "original", {}, {}, {"d2t": torch.tensor([0, 2, 2, 6])})
    vocabulary = DraftVocabulary(checkpoint, HeadTarget.of(DrafterSpec("eagle3", "made"), context, "auto"), 4)
    assert vocabulary.target_ids is not None
    assert vocabulary.target_ids.tolist() == [0, 3, 4, 9]
    wide = vocabulary.widen(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert wide.shape == (1, VOCAB)
    assert wide[0, [0, 3, 4, 9]].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert int(wide.isfinite().sum()) == 4


def test_narrow_precisions_draft_nearly_the_same(tmp_path: Path, context: DrafterContext) -> None:
    folder = write(random_eagle3(), tmp_path)
    tokens, states = [1, 2, 3], torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for precision in ("fp32", "bf16", "int8"):
        head = registry.create(f"eagle3:{folder}", {"precision": precision}, context).head  # type: ignore[attr-defined]
        found[precision] = torch.softmax(head.logits(head.run(KVCache(1, 16), tokens, head.read(states))), -1)
    for precision in ("bf16", "int8"):
        assert float((found[precision] - found["fp32"]).abs().max()) < 0.08
    assert not torch.equal(found["bf16"], found["fp32"])

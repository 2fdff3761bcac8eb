"""Which device, backend and precision a model gets, and what is said about it."""

import numpy as np
import pytest
import torch

from paceline.config import RunnerConfig
from paceline.errors import ModelError, OptionError
from paceline.execution import factory
from paceline.execution.factory import choose_device, create_runner, kept_formats
from paceline.execution.lean import LeanRunner
from paceline.execution.native import build
from paceline.execution.native.runner import NativeRunner
from paceline.execution.probe_source import FirstLayers
from paceline.models.base import QuantBlocks
from unit.execution.toy_sources import CONFIGS, EXTRA_CONFIGS, ToySource, feed, random_tokens, stock_logits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(NativeRunner, "unsupported_reason", staticmethod(lambda source, precision: "no C compiler was found"))


def create(name, **settings):
    return create_runner(ToySource(name), RunnerConfig(device="cpu", **settings))


def test_without_kernels_the_lean_runner_serves_and_says_why(without_kernels):
    info = create("llama", precision="fp32").info
    assert info.backend == "lean"
    assert info.extra["backend_choice"] == "native: no C compiler was found"
    assert info.extra["precision_choice"] == "asked for"


def test_a_structure_that_only_transformers_knows_goes_there(without_kernels):
    runner = create("gpt_neox", precision="fp32")
    assert runner.info.backend == "hf"
    assert "lean: model_type = 'gpt_neox'" in runner.info.extra["backend_choice"]
    tokens = random_tokens(5)
    torch.testing.assert_close(feed(runner, runner.open(), tokens).logits, stock_logits("gpt_neox", tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_a_named_backend_is_taken(backend):
    assert create("llama", backend=backend, precision="fp32").info.backend == backend


def test_auto_precision_takes_the_fastest_and_remembers_it(without_kernels, monkeypatch):
    seconds = iter([3e-3, 1e-3])  # bf16, fp32
    monkeypatch.setattr(factory, "_step_seconds", lambda build: next(seconds))
    for _ in range(2):  # the second time from the cache folder
        info = create("llama").info
        assert info.precision == "fp32"
        assert "fp32 1.00 ms, bf16 3.00 ms" in info.extra["precision_choice"]


@pytest.mark.skipif(isinstance(build.load_library(), str), reason=str(build.load_library()))
def test_auto_precision_is_measured_anew_for_other_kernels_since_the_choice_once_outlived_them(monkeypatch):
    monkeypatch.setitem(EXTRA_CONFIGS, "wide_heads", {**CONFIGS["llama"], "head_dim": 16})
    for kernels, seconds in (("old", {"bf16": 1e-3, "fp32": 2e-3}), ("new", {"bf16": 3e-3, "fp32": 1e-3})):
        monkeypatch.setattr(factory, "_step_seconds", lambda build, seconds=seconds: seconds[build.args[1]])
        monkeypatch.setattr(factory, "_native_kernels", lambda kernels=kernels: kernels)
        info = create("wide_heads").info
        assert info.backend == "native"
        assert info.precision == min(seconds, key=seconds.__getitem__)


def test_auto_precision_is_the_same_at_every_start_on_a_busy_machine_since_another_one_writes_another_text(
    without_kernels, monkeypatch, tmp_path
):
    monkeypatch.setattr("os.getloadavg", lambda: (1e3, 0.0, 0.0))
    monkeypatch.setattr(factory, "_step_seconds", lambda build: pytest.fail("measured on a busy machine"))
    info = create("llama").info
    assert info.precision == "bf16"
    assert "busy" in info.extra["precision_choice"]
    assert not list((tmp_path / "precisions").glob("*"))


def test_auto_precision_really_measures(without_kernels):
    info = create("llama").info
    assert info.precision in ("bf16", "fp32")
    assert " ms" in info.extra["precision_choice"]


def test_auto_precision_of_a_model_for_transformers(without_kernels):
    assert create("phi").info.precision in ("bf16", "fp32")


def test_nothing_that_runs_it_names_every_reason(without_kernels):
    with pytest.raises(ModelError, match=r"native: .*; lean: .*gpt_neox.*; hf: precision int8"):
        create("gpt_neox", precision="int8")


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1", "cuda:99"])
def test_devices_that_are_not_there_are_refused(device):
    with pytest.raises(OptionError, match=f"device = '{device}'"):
        choose_device(device)


def test_a_backend_of_another_device_is_refused():
    with pytest.raises(OptionError, match="backend = 'cuda'"):
        create("llama", backend="cuda")


class Quantised(ToySource):
    """Claims blocks of the file for every matrix: 4 bits inside, 8 bits for the embedding."""

    def __init__(self, name, odd=""):
        super().__init__(name)
        self._odd = odd

    @property
    def is_quantised(self):
        return True

    def quant_blocks(self, name):
        if self._odd and self._odd in name:
            return None
        rows, columns = self.tensors()[name].shape
        bits = 8 if "embed" in name or "lm_head" in name else 4
        scales = np.ones((rows, columns // 32), np.float32)
        return QuantBlocks(np.zeros((rows, columns), np.uint8), scales, -128 * scales if bits == 8 else 0 * scales, bits)


def test_only_whole_files_of_one_format_are_kept_as_they_are():
    assert kept_formats(Quantised("llama")) == ("int4",)
    assert kept_formats(Quantised("llama", odd="layers.1.mlp.up_proj")) == ()
    assert kept_formats(ToySource("llama")) == ()
    assert kept_formats(Quantised("gpt_neox")) == ()


def test_a_part_of_a_model_runs_and_is_small(monkeypatch):
    monkeypatch.setattr("paceline.execution.probe_source._WEIGHTS", 1)
    monkeypatch.setattr("paceline.execution.probe_source._VOCABULARY", 50)
    part = FirstLayers(Quantised("gemma3"))
    assert part.config["num_hidden_layers"] == 2
    assert not [n for n in part.tensors() if ".layers.2." in n]
    assert part.quant_blocks("model.embed_tokens.weight").quants.shape == (50, 32)
    runner = LeanRunner(part)
    assert feed(runner, runner.open(), [1, 2, 3]).logits.shape == (3, 50)

"""Method names, peers' adapters, result files."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fake_engine import FakeEngine
from paceline.config import SamplingParams, SpeculationConfig
from paceline.errors import OptionError, PacelineError
from paceline.study import report
from paceline.study.methods import EngineMethod, make_methods, parse_speculation, split_names
from paceline.study.peers import PEERS, TransformersMethod, peer_result, refuse_unsupported


def test_method_names_carry_drafters_controller_and_options() -> None:
    assert parse_speculation("auto") == SpeculationConfig()
    assert parse_speculation("ngram@fixed:num_draft=4:mode=x") == SpeculationConfig(
        draft="ngram", controller="fixed", controller_options={"num_draft": 4, "mode": "x"}
    )
    assert parse_speculation("ngram,model:some/folder@pacer").draft == "ngram,model:some/folder"


def test_methods_are_separated_by_commas_unless_a_semicolon_is_there() -> None:
    assert split_names("plain, auto") == ["plain", "auto"]
    assert split_names("plain;ngram,model:x@fixed; ") == ["plain", "ngram,model:x@fixed"]


@pytest.mark.parametrize("name", ["@fixed", "ngram@", "ngram@fixed:num_draft"])
def test_method_names_that_say_nothing_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="method"):
        parse_speculation(name)


def test_plain_shares_the_engine_of_the_first_method() -> None:
    made: list[SpeculationConfig] = []

    def engine_for(config: SpeculationConfig) -> Any:
        made.append(config)
        return FakeEngine()

    plain, auto, fixed = make_methods(["plain", "auto", "ngram@fixed"], engine_for)
    assert [config.controller for config in made] == ["pacer", "fixed"]
    assert isinstance(plain, EngineMethod)
    assert isinstance(auto, EngineMethod)
    assert plain.plain
    assert plain.engine is auto.engine
    assert auto.generate([97, 98], SamplingParams(), "").text == "AB"
    assert fixed.name == "ngram@fixed"


def test_plain_alone_still_gets_an_engine() -> None:
    (plain,) = make_methods(["plain"], lambda config: FakeEngine())  # type: ignore[arg-type,return-value]
    assert plain.generate([97], SamplingParams(), "").num_drafted == 0


def test_peer_speed_counts_the_steps_after_the_first_token() -> None:
    engine: Any = FakeEngine()
    result = peer_result(engine, [97] * 11, 5, (0.0, 2.0, 7.0))
    assert result.prefill_seconds == pytest.approx(2.0)
    assert result.tokens_per_second == pytest.approx(10 / 5.0)
    assert result.num_prompt_tokens == 5


def test_peers_refuse_options_that_they_would_ignore() -> None:
    with pytest.raises(OptionError, match="presence_penalty"):
        refuse_unsupported("transformers", SamplingParams(presence_penalty=1.0), ("temperature",))
    refuse_unsupported("transformers", SamplingParams(temperature=0.5, seed=3, max_tokens=5), ("temperature",))


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}])
def test_transformers_answers_greedily_like_its_own_argmax(options: dict[str, int]) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = transformers.LlamaForCausalLM(config).eval()
    engine: Any = FakeEngine()
    engine.source = SimpleNamespace(hf_model=lambda dtype, device: model)
    peer = TransformersMethod("transformers", engine, **options)
    prompt = [5, 6, 7, 5, 6]
    answer = peer.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True), "")
    expected = list(prompt)
    with torch.inference_mode():
        for _ in range(6):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1, 1:].argmax()) + 1)
    assert list(answer.token_ids) == expected[len(prompt) :]
    assert answer.seconds > answer.prefill_seconds > 0


def test_result_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.json"
    report.write_json(target, {"results": []})
    assert json.loads(target.read_text()) == {"results": []}
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(PacelineError, match="choose a place"):
        report.write_json(blocked / "out.json", {})
    assert [path.name for path in target.parent.iterdir()] == ["out.json"]


def test_result_files_hold_a_row_a_line_and_read_back_the_same() -> None:
    rows = [
        {"method": f"method {i}", "category": "x" * 60, "speed": 1.0 / 3.0, "interval": [0.9, 1.1], "none": None} for i in range(5)
    ]
    document = {
        "command": "c",
        "nested": {"deep": {"list": list(range(60)), "rows": rows}},
        "results": rows,
        "answers": report.table(rows),
    }
    text = report.as_text(document)
    assert json.loads(text) == document
    lines = text.splitlines()
    assert sum('"method": "method 3"' in line for line in lines) == 2  # `nested` and `results`
    assert sum(line.strip().startswith('["method 3"') for line in lines) == 1  # the table
    assert len(lines) < 40


def test_a_table_names_its_columns_once_and_gives_its_rows_back() -> None:
    rows = [{"a": 1, "b": "x"}, {"b": "y", "a": 2}]
    assert report.table(rows) == {"columns": ["a", "b"], "rows": [[1, "x"], [2, "y"]]}
    assert report.table_rows(report.table(rows)) == rows
    assert report.table_rows(rows) == rows
    assert report.table_rows(report.table([])) == []


def test_figures_of_a_recording_have_six_digits_and_unfinished_ones_say_so(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    recording = report.Recording(path, lambda: {"speed": 1.23456789, "rows": [(0.1234567, 7)]}, every=0.0)
    recording.update()
    assert json.loads(path.read_text()) == {"speed": 1.23457, "rows": [[0.123457, 7]], "complete": False}
    recording.write(complete=True)
    assert json.loads(path.read_text())["complete"] is True
    with pytest.raises(OptionError, match="is a folder"):
        report.Recording(tmp_path, dict)


def test_result_path_is_checked_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a folder"):
        report.check_writable(tmp_path)
    report.check_writable(tmp_path / "fine.json")


def test_plot_is_a_picture_and_needs_two_methods(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"method": method, "category": category, "tokens_per_second": 1.0, "speedup_vs_plain": 1.5}
        for method in ("plain", "auto")
        for category in ("all", "chat")
    ]
    picture = tmp_path / "bench.png"
    report.plot_results({"results": rows}, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    report.plot_results({"results": rows + [row | {"method": f"m{i}"} for i in range(9) for row in rows[:2]]}, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match=r"--plot .*unknown"):
        report.plot_results({"results": rows}, tmp_path / "bench.unknown")
    with pytest.raises(OptionError, match="nothing to draw"):
        report.plot_results({"results": rows[:2]}, picture)


def test_the_chart_of_both_clocks_puts_the_fastest_first_and_frames_the_best(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {
            "method": method,
            "category": category,
            "speedup_vs_plain": 1.0,
            "accounted_vs_plain": speed,
            "accounted_tokens_per_second": speed,
        }
        for method, speed in (("plain", 1.0), ("fixed_2", 1.4), ("pacer", 1.5))
        for category in ("all", "chat")
    ]
    panel = report.speed_panel("toy", rows, bold="pacer", best={"all": "fixed_2", "chat": "fixed_2"})
    assert panel.rows == ["pacer", "fixed_2", "plain"]
    assert panel.columns == ["all by wall clock", "all prompts", "chat"]
    assert panel.values[1] == [1.0, 1.4, 1.4]
    assert panel.framed == {(1, 1), (1, 2)}
    report.heat_chart([panel, panel], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for llama-cpp-python that says 5, 6, 7, end, 8."""
    made: list[dict[str, Any]] = []

    class Llama:
        def __init__(self, **options: Any) -> None:
            made.append(options)

        def reset(self) -> None:
            made[-1]["reset"] = True

        def generate(self, tokens: list[int], **options: Any) -> Any:
            assert tokens == [1, 2]
            assert options["temp"] == 0.0
            yield from (5, 6, 7, 0, 8)

    package, speculative = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_speculative")
    package.Llama = Llama  # type: ignore[attr-defined]
    package.__spec__ = ModuleSpec("llama_cpp", None)
    speculative.LlamaPromptLookupDecoding = lambda num_pred_tokens: f"lookup {num_pred_tokens}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)
    return made


def test_llama_cpp_runs_the_same_file_and_stops_where_we_stop(llama: list[dict[str, Any]]) -> None:
    engine: Any = FakeEngine()
    with pytest.raises(OptionError, match="needs a model that is a GGUF file"):
        PEERS["llama.cpp"]("llama.cpp", engine)
    engine.source.path = "model.gguf"
    method = PEERS["llama.cpp:prompt_lookup"]("llama.cpp:prompt_lookup", engine)
    assert method.generate([1, 2], SamplingParams(), "").token_ids == (5, 6, 7, 0)
    assert method.generate([1, 2], SamplingParams(max_tokens=2), "").token_ids == (5, 6)
    assert method.generate([1, 2], SamplingParams(ignore_eos=True), "").token_ids == (5, 6, 7, 0, 8)
    assert llama[-1]["model_path"] == "model.gguf"
    assert llama[-1]["draft_model"] == "lookup 10"
    assert llama[-1]["reset"] is True
    with pytest.raises(OptionError, match="temperature = 1"):
        method.generate([1, 2], SamplingParams(temperature=1.0), "")


def test_missing_llama_cpp_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr("paceline.study.peers.find_spec", lambda name: None)
    engine: Any = FakeEngine()
    with pytest.raises(OptionError, match="llama-cpp-python is not installed"):
        PEERS["llama.cpp"]("llama.cpp", engine)
